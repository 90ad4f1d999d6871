"""The comparison with peers: its steps, its gates, and that two contenders are measured on the same documents."""

from __future__ import annotations

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import contenders, gates, run, tables, venvs, workloads
from benchmarks.peers.common import Clock, Spec, Step, adapter_name, digest

STEPS = 2


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of rows as the workloads name them, of lengths that differ."""
    folder = tmp_path / "data"
    (folder / "instruct").mkdir(parents=True)
    rows = [
        {
            "instruction": f"Name llama {n}.",
            "input": "It lives on a hill. " * (n % 5),
            "output": f"Llama {n}" * (1 + n % 7),
        }
        for n in range(60)
    ]
    (folder / "instruct" / "alpaca_5000.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def small(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W1 on the tiny model, with peers out of this environment."""
    base = (f"model.base={tiny_base}",)
    monkeypatch.setitem(workloads.WORKLOADS, "W1", replace(workloads.WORKLOADS["W1"], overrides=base, pool=60))
    for name in ("hf", "trl-default"):
        monkeypatch.setitem(contenders.CONTENDERS, name, replace(contenders.CONTENDERS[name], pins=None))


def options(data: Path, **changes) -> Namespace:
    arguments = ["--workload", "W1", "--data", str(data), "--dtype", "float32", "--steps", str(STEPS)]
    return Namespace(**{**vars(run.parse(arguments)), **changes})


def test_all_are_measured_on_the_same_documents(small, data: Path, tmp_path: Path):
    """Real processes: ours by its launcher, transformers' trainer, and one that shuffles the later steps."""
    found = run.compare(options(data, peers="ours,hf,trl-default", rounds=1), tmp_path)
    for name in ("ours", "hf"):
        (result,) = found["rows"][name]["runs"]
        assert result["faults"] == [] and result["loss_gap"] < 1e-5 and result["cosine"] > 0.9999, name
        assert [step["tokens"] for step in result["steps"]] == [step["tokens"] for step in found["expected"]]
        assert result["rss_gib"] > 0.1 and result["ready_seconds"] > 0
    ours, hf = (found["rows"][name]["runs"][0]["steps"] for name in ("ours", "hf"))
    assert [a["loss"] for a in ours] == pytest.approx([b["loss"] for b in hf], abs=1e-5)
    assert all(step["computed"] == step["tokens"] for step in ours)
    assert sum(step["computed"] for step in hf) > sum(step["tokens"] for step in hf)
    (shuffled,) = found["rows"]["trl-default"]["runs"]
    assert not any("documents" in fault for fault in shuffled["faults"])
    found |= {"command": "python -m benchmarks.run", "dtype": "float32", "rounds": 1, "machine": about()}
    text = tables.markdown(found)
    assert "| ours | " in text and "1.00×" in text and found["documents"][:12] in text
    tables.plot(found, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def about() -> dict:
    return {
        "cpu": "CPU",
        "cores": 2,
        "gemm_gflops": {"float32": 1, "bfloat16": 1},
        "versions": {"torch": "2"},
        "date": "",
    }


def test_a_peer_that_cannot_run_says_why_and_keeps_its_row(small, data: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setitem(contenders.CONTENDERS, "litgpt", contenders.Contender("litgpt", "nobody", None, "nobody"))
    really = run.turn

    def turn(contender, job, *others) -> dict:
        """The peer's process is real; ours answers what it must."""
        if contender.name != "ours":
            return really(contender, job, *others)
        told = [
            {"seconds": 1.0, "tokens": s.tokens, "labelled": s.labelled, "computed": s.tokens} for s in job.expected
        ]
        return {"steps": told, "rss_gib": 1.0, "ready_seconds": 1.0, "loss_gap": 0.0, "cosine": 1.0, "faults": []}

    monkeypatch.setattr(run, "turn", turn)
    found = run.compare(options(data, peers="ours,litgpt", rounds=2), tmp_path)
    assert len(found["rows"]["ours"]["runs"]) == 2
    assert "nobody" in found["rows"]["litgpt"]["error"] and not found["rows"]["litgpt"]["runs"]
    found |= {"command": "", "dtype": "float32", "rounds": 2, "machine": about()}
    assert "| litgpt | " in tables.markdown(found) and "nobody" in tables.markdown(found)
    assert capsys.readouterr().err.count("nobody") == 1  # it is not asked again


def test_rows_are_filled_and_hold_as_many_documents():
    lengths = [n * 37 % 700 + 100 for n in range(120)]
    chosen = workloads.filled(lengths, 4, 2048, 6)
    rows = [sum(lengths[n] for n in chosen[first : first + 4]) for first in range(0, 24, 4)]
    assert len(set(chosen)) == 24 and all(1900 < tokens <= 2048 for tokens in rows)
    assert rows == sorted(rows, reverse=True)
    with pytest.raises(ValueError, match="do not give"):
        workloads.filled(lengths[:8], 4, 2048, 6)
    with pytest.raises(ValueError, match="do not give"):
        workloads.filled([1000] * 40, 4, 2048, 2)


def reference(**changes) -> gates.Reference:
    return gates.Reference(**{"loss": 2.0, "gradients": Path(), "noise": 0.05, "labelled": 100, **changes})


def steps(**changes) -> list[Step]:
    one = {"seconds": 1.0, "tokens": 10, "labelled": 5, "computed": 12, "documents": ["a", "b"], "loss": 2.0}
    return [Step(**{**one, **changes}), Step(**{**one, "documents": ["c", "d"]})]


def test_gates_name_what_is_not_honest():
    def judge(own: list[Step], dtype: str = "float32", cosine: float = 1.0, *, in_order: bool = True) -> list[str]:
        return gates.faults(own, steps(), reference(), dtype, cosine, in_order=in_order)

    assert judge(steps()) == [] == judge(steps(documents=["b", "a"]))
    assert "other documents in step 1" in judge(steps(documents=["a", "c"]))
    assert "9 tokens, 5 labelled in step 1, not 10 and 5" in judge(steps(tokens=9))
    assert "first loss" in judge(steps(loss=2.00002))[0] and "first loss" in judge(steps(loss=None))[0]
    assert "first loss" in judge(steps(loss=math.nan), "bfloat16")[0]
    assert "cosine" in judge(steps(), cosine=0.9998)[0] and judge(steps(), "bfloat16", 0.9) == []
    assert judge(steps()[:1]) == ["1 steps, not 2"]
    swapped = [steps()[0], replace(steps()[1], documents=["d", "e"])]
    assert judge(swapped, in_order=False) == ["other documents in all"]


def test_bfloat16_may_be_apart_by_what_rounding_does():
    assert reference().allowed("float32") == 1e-5
    assert reference().allowed("bfloat16") == pytest.approx(4 * 0.05 / 10)
    assert reference(labelled=10**6).allowed("bfloat16") == 2e-3


def test_cosine_is_over_all_weights_and_none_may_lack(tmp_path: Path):
    gradients = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[0.0, 1.0]])}
    save_file(gradients, tmp_path / "right")
    save_file({"a": 3 * gradients["a"], "b": 3 * gradients["b"]}, tmp_path / "same")
    save_file({**gradients, "b": torch.tensor([[1.0, 0.0]])}, tmp_path / "other")
    save_file({"a": gradients["a"]}, tmp_path / "less")
    assert gates.cosine(tmp_path / "same", tmp_path / "right") == pytest.approx(1.0)
    assert gates.cosine(tmp_path / "other", tmp_path / "right") == pytest.approx(0.5)
    assert gates.cosine(tmp_path / "less", tmp_path / "right") == 0.0


def test_the_clock_tells_documents_of_padded_and_of_packed_rows_alike(tmp_path: Path):
    spec = Spec(contender="x", model="", documents="", gradients=str(tmp_path / "g"), out=str(tmp_path / "out.json"))
    first, second = ([5, 6, 7], [-100, 6, 7]), ([8, 9], [-100, 9])
    padded = {"ids": [[5, 6, 7], [8, 9, 0]], "labels": [[-100, 6, 7], [-100, 9, -100]], "real": [[1, 1, 1], [1, 1, 0]]}
    packed = {"ids": [[5, 6, 7, 8, 9]], "labels": [[-100, 6, 7, -100, 9]], "position_ids": [[0, 1, 2, 0, 1]]}
    for batch in (padded, packed):
        clock = Clock(spec)
        clock.begin_step()
        clock.saw(**{name: torch.tensor(value) for name, value in batch.items()})
        clock.save_gradients([("base_model.model.q.lora_A.default.weight", torch.ones(2))])
        clock.end_step()
        clock.add_loss(1.5)
        clock.write()
        (step,) = json.loads((tmp_path / "out.json").read_text())["steps"]
        assert step["documents"] == [digest(*first), digest(*second)]
        assert (step["tokens"], step["labelled"], step["loss"]) == (5, 3, 1.5)
        assert step["computed"] == (6 if batch is padded else 5)
    assert list(load_file(tmp_path / "g")) == ["q.lora_A.weight"]
    assert adapter_name("module.model.embed_tokens.weight") == "model.embed_tokens.weight"


def test_an_environment_is_made_once_by_its_pins(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(venvs, "PINS", tmp_path)
    monkeypatch.setattr(venvs, "cache_dir", lambda name: tmp_path / name)
    (tmp_path / "peers").mkdir()
    (tmp_path / "none.txt").write_text("# nothing\n")
    (tmp_path / "bad.txt").write_text("./no-such-package\n")
    python = venvs.python_of("none")
    assert python.exists() and venvs.python_of("none") == python
    with pytest.raises(venvs.NoEnvironment, match="could not install bad"):
        venvs.python_of("bad")


def test_all_pins_are_exact():
    files = sorted(venvs.PINS.glob("*.txt"))
    named = {one.pins for one in contenders.CONTENDERS.values()} - {None}
    assert named <= {file.stem for file in files}
    for file in files:
        for line in file.read_text().splitlines():
            assert line.startswith("#") or ("==" in line and "@" not in line and "/" not in line), (file.name, line)


def test_the_command_line_refuses_what_it_does_not_know(capsys):
    for peers in ("ours,axolotls", "trl-tuned,ours"):
        with pytest.raises(SystemExit):
            run.parse(["--workload", "W1", "--peers", peers])
    assert "axolotls" in capsys.readouterr().err
    assert sys.version_info >= (3, 11)
    assert run.parse(["--workload", "W2-full"]).dtype == "float32"
