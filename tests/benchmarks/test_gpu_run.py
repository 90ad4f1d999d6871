"""The comparison on one GPU, tried on a CPU with a tiny shape; its plan of the minutes; the wheels that travel."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_data, gpu_judge, gpu_run, wheels
from benchmarks.gpu_judge import Job
from benchmarks.gpu_run import JOBS, Plan
from benchmarks.peers import ours_gpu
from benchmarks.peers.common import Spec, digest
from llama_ft.llama.shapes import PRESETS

OPTIONS = SimpleNamespace(shape="tiny", layers=0, steps=5, dtype="float32", device="cpu")


def test_what_does_not_end_in_time_is_left_out():
    plan = Plan([Job("W1", "ours"), Job("W6", "ours", 50), Job("W2", "ours", 20), Job("W1", "hf")])
    assert plan.next(100) == Job("W1", "ours")
    assert plan.next(40) == Job("W2", "ours", 20)  # W6 would need 50
    assert plan.next(29) is None
    assert [job.name for job in plan.left_out] == ["W6-ours-1", "W1-hf-1"]


def test_the_plan_learns_the_machines_pace():
    plan = Plan([Job("W1", "ours", round=2), Job("W1", "hf", round=2), Job("W2", "hf", 40)])
    assert plan.expected(Job("W2", "hf", 40)) == 40 and plan.limit(Job("W2", "hf", 40), 500) == 100
    plan.took(Job("W1", "ours"), 15, well=True)
    plan.took(Job("W3", "ours"), 15, well=True)
    plan.took(Job("W1", "hf"), 200, well=False)
    assert plan.expected(Job("W2", "hf", 40)) == 20 and plan.expected(Job("W1", "ours", round=2)) == 15
    assert plan.limit(Job("W1", "ours"), 500) == 45 and plan.limit(Job("W1", "ours"), 30) == 30
    assert plan.next(100) == Job("W1", "ours", round=2)
    assert plan.next(100) == Job("W2", "hf", 40)  # a second round of what failed tells nothing


def test_the_jobs_are_known():
    assert len({job.name for job in JOBS}) == len(JOBS)
    assert {job.workload for job in JOBS} == set(gpu_data.WORKLOADS)
    assert all(job.contender.split("-")[0] in gpu_run.MODULES for job in JOBS)
    firsts = {job.kind for job in JOBS if job.round == 1}
    assert {job.kind for job in JOBS} == firsts
    assert JOBS[0] == Job("W1", "ours")


def test_documents_have_the_lengths_that_are_said():
    real = SimpleNamespace(**{**vars(OPTIONS), "shape": "llama-3-8b", "steps": 12})
    rows = gpu_data.rows_of(real, "W1")
    lengths = [length for [length] in rows]
    assert len(rows) == 12 * 16 and min(lengths) >= 60 and max(lengths) <= 512
    assert 150 < sum(lengths) / len(lengths) < 260 and lengths[0] == max(lengths)
    batches = [lengths[n : n + 8] for n in range(0, len(lengths), 8)]
    assert sum(8 * max(batch) for batch in batches) < 1.2 * sum(lengths)  # of like length
    packed = gpu_data.rows_of(real, "W2")
    assert len(packed) == 48 and max(map(sum, packed)) <= 2048 and sum(map(sum, packed)) > 0.7 * 48 * 2048
    assert packed == gpu_data.rows_of(real, "W3")
    growing = [length for [length] in gpu_data.rows_of(real, "W6")]
    assert growing[0] == 8192 and growing == sorted(growing) and growing[-1] < gpu_data.CONTEXT


def test_names_and_sizes_of_the_weights():
    for name in ("tiny", "llama-3-8b"):
        counted = sum(torch.Size(size).numel() for _, size in gpu_data.tensors(PRESETS[name]))
        assert counted == PRESETS[name].parameters


def test_a_torch_without_enable_gqa(monkeypatch):
    """Our kernel's call comes through, one that would not be the same does not."""
    from torch.nn.attention import varlen

    seen = {}

    def older(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        seen.update(window_size=window_size, key=tuple(key.shape))
        return query

    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert ours_gpu.fit_varlen() and not ours_gpu.fit_varlen()
    q, k = torch.zeros(6, 4, 8), torch.zeros(6, 2, 8)
    varlen.varlen_attn(q, k, k, None, None, 6, 6, window_size=(-1, 0), enable_gqa=True)
    assert seen == {"window_size": (-1, 0), "key": (6, 2, 8)}
    with pytest.raises(AssertionError):
        varlen.varlen_attn(q, k, k, None, None, 6, 6)


def step(documents: list[list[int]], seconds: float = 1.0, loss: float = 6.0) -> dict:
    tokens = sum(map(len, documents))
    names = [digest(ids, ids) for ids in documents]
    return {"documents": names, "tokens": tokens, "computed": tokens, "seconds": seconds, "loss": loss}


def test_the_gates(tmp_path):
    documents = [[1, 2, 3], [4, 5], [6, 7, 8], [9, 10]]
    file = tmp_path / "W1.jsonl"
    file.write_text("".join(json.dumps({"input_ids": ids, "labels": ids}) + "\n" for ids in documents))
    Spec(contender="W1", model="", documents=str(file), steps=2, micro_batch=1, accumulation=2).write(
        tmp_path / "W1.spec.json"
    )
    prepared = {"W1": {"flop_per_token": 1e9, "loss": 6.0}, "gemm_flops": 2e10}
    good = {"steps": [step(documents[:2]), step(documents[2:], 0.5)], "allocated": 2**30, "reserved": 2**31}

    def row(found: dict, contender: str = "ours", workload: str = "W1") -> dict:
        return gpu_judge.judge(Job(workload, contender), found, tmp_path, prepared, "float32")

    kept = row(good)
    assert "gates" not in kept and kept["tokens_per_second"] == 10 and kept["fraction"] == 0.5
    turned = {"steps": [good["steps"][1], good["steps"][0]]}
    assert row(turned)["gates"] == ["other documents in step 1"]
    assert "gates" not in row(turned, "trl-default")
    assert row({"steps": [step(documents[:2], loss=6.1), good["steps"][1]]})["gates"] == [
        "first loss 1.0e-01 from the reference's"
    ]
    assert row({"steps": good["steps"][:1]})["gates"] == ["1 steps of 2"]
    assert row({"reason": "no kernels"}, "unsloth")["reason"] == "no kernels"
    longest = row({"steps": good["steps"], "stopped": "out of memory"}, "ours-checkpointed", "W6")
    assert longest["longest"] == 5 and longest["ended"] == "out of memory"
    rows = [kept, row(good) | {"round": 2}, row({"reason": "no kernels"}, "unsloth"), longest]
    text = gpu_judge.table(rows, [Job("W2", "hf")])
    assert "| ours | 10 (10, 10) | 50% | 1.0 / 2.0 | 0.0e+00 | – | kept |" in text
    assert "| unsloth | no kernels | | | | | |" in text and "| hf | no time was left | | | | | |" in text
    assert "| ours-checkpointed | 5 tokens, then out of memory |" in text


def test_folders_stay_below_the_limit():
    sizes = {"a": 40, "b": 30, "c": 20, "d": 10, "e": 5}
    groups = wheels.split(sizes, 60)
    assert sorted(name for group in groups for name in group) == sorted(sizes) and len(groups) == 2
    assert all(sum(sizes[name] for name in group) <= 60 for group in groups)
    with pytest.raises(ValueError, match="a has"):
        wheels.split(sizes, 39)


def a_wheel(folder: Path, name: str, needs: list[str], files: dict[str, str] | None = None) -> Path:
    info = f"{name}-1.0.dist-info"
    contents = {f"{name}/__init__.py": "", **(files or {})}
    contents[f"{info}/METADATA"] = "\n".join(f"Requires-Dist: {need}" for need in needs)
    contents[f"{info}/RECORD"] = "".join(f"{file},sha256=x,1\n" for file in contents) + f"{info}/RECORD,,\n"
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file, text in contents.items():
            archive.writestr(file, text)
    return wheel


def test_only_what_is_missing_travels(tmp_path):
    asks = {
        "one": ["two>=1", "there>=2", "old>=2", "xformers", 'other; sys_platform == "win32"', 'more; extra == "all"'],
        "two": ["one", "gone", "old>=3"],
        "old": [],
    }

    def fetch(need: str) -> Path:
        name = need.partition(">")[0]
        if name not in asks:
            raise FileNotFoundError("no wheel")
        return a_wheel(tmp_path, name, asks[name])

    found = wheels.collect(("one",), wheels.read_there(["there==2.1", "old==1.0", "# no line"]), fetch)
    assert sorted(found.wheels) == ["old", "one", "two"] and found.asked["two"] == "one"
    assert found.missing["gone"] == "two asks for it: no wheel" and "torch" in found.missing["xformers"]
    assert found.missing["old>=3"] == "two asks for it, 1.0 is carried"


def test_a_slimmed_wheel_has_a_right_record(tmp_path):
    wheel = a_wheel(tmp_path, "bitsandbytes", [], {"bitsandbytes/libx_cuda121.so": "x" * 9999, "bitsandbytes/k.so": ""})
    assert wheels.slim(wheel, wheels.SLIM["bitsandbytes"]) > 0
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read("bitsandbytes-1.0.dist-info/RECORD").decode().splitlines()
    assert "bitsandbytes/libx_cuda121.so" not in names and "bitsandbytes/k.so" in names
    assert sorted(line.split(",")[0] for line in record) == sorted(names)


def test_a_trial_on_a_cpu(tmp_path, capsys):
    """Preparation, two runs and one that cannot be: every gate against the float32 reference is kept."""
    asked = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--shape", "tiny"]
    asked += ["--dtype", "float32", "--steps", "4", "--workloads", "W1", "--minutes", "3", "--rounds", "1"]
    contenders = ["ours", "axolotl", "hf"]
    text = gpu_run.compare(gpu_run.parse([*asked, "--contenders", ",".join(contenders)]))
    rows = {row["contender"]: row for row in json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]}
    for name in contenders:
        if name != "axolotl":
            assert "gates" not in rows[name] and "reason" not in rows[name], rows[name]
            assert rows[name]["cosine"] > 0.9999 and rows[name]["loss_apart"] < 1e-5
            assert 0 < rows[name]["fraction"] < 1
    assert rows["ours"]["padding"] == 0
    assert "torch>=2.13" in rows["axolotl"]["reason"]
    assert (tmp_path / "out" / "gpu.md").read_text() == text and "| ours |" in text
    assert "W1-ours-1" in capsys.readouterr().out
