"""Compressed checkpoints: what lies in them, what is proven, what is refused, what is not made twice.

llm-compressor itself runs in test_compressed_real.py; here each row is rounded by tests/export/compressed_runs.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from llama_ft.errors import MachineFault, UserError
from llama_ft.export.compressed import calibrate, proof, runtime
from llama_ft.export.compressed import write as write_module
from llama_ft.export.compressed.types import check_types
from llama_ft.export.compressed.write import CompressedRefused, check_compressed, write_compressed
from llama_ft.export.gguf.write import hash_of
from llama_ft.export.run import export_run
from llama_ft.recipe.run import Run
from tests.export.compressed_runs import edit, stand_in, swap
from tests.export.gguf_runs import formats_of
from tests.tiny_run import make_base, make_run


@pytest.fixture(scope="session")
def merged(trained, tmp_path_factory) -> Run:
    """A tiny run with merged/, on which no checkpoint stands yet."""
    folder = tmp_path_factory.mktemp("merged") / "run"
    shutil.copytree(trained()[0].path, folder, ignore=shutil.ignore_patterns("merged*", "export.json"))
    export_run(Run(folder))
    return Run(folder)


@pytest.fixture
def run(merged, tmp_path) -> Run:
    shutil.copytree(merged.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture
def tool(monkeypatch):
    """Puts something else in the place of llm-compressor's processes, by itself what rounds correctly."""

    def put(found):
        for module in (write_module, proof, runtime):
            monkeypatch.setattr(module, "run_script", found)
        monkeypatch.setattr(write_module, "environment", lambda aside: [])

    put(stand_in())
    return put


def never(*args, **kwargs):
    raise AssertionError("it stood already")


# What is inside


def test_a_tiny_run(run, tool, capsys):
    found = write_compressed(run, ["w8a8", "fp8", "w8a8"])
    assert list(found) == ["compressed/w8a8", "compressed/fp8"]
    assert found == formats_of(run)
    assert json.loads(run.proof_file.read_text())["measured"]["positions"] == 320, "the proof of merged/ stays"
    assert not list(run.path.glob(".*")), "nothing is left aside"
    for name, said in found.items():
        folder = run.path / name
        assert said["ok"] is True and said["faults"] == []
        assert said["file"] == name and said["sha256"] == hash_of(folder)
        assert said["bytes"] == (folder / "model.safetensors").stat().st_size
        beside = {file.name for file in run.merged.iterdir()} - {"model.safetensors", "config.json"}
        assert {file.name for file in folder.iterdir()} == beside | {"model.safetensors", "config.json"}
        for file in beside:
            assert (folder / file).read_bytes() == (run.merged / file).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["dtype"] == "bfloat16" and config["quantization_config"]["ignore"] == ["lm_head"]
        places = (str(run.path), str(Path.home()) + "/")
        assert not any(place in file.read_text() for file in folder.glob("*.json") for place in places)
        assert said["runtime"]["faults"] == []
        assert said["measured"]["documents"] == 8 and 1e-8 < said["measured"]["mean_kl"] < 0.02
        assert 1e-4 < said["weights"]["unrounded_largest_error"] < 3e-3
    assert 0.003 < found["compressed/w8a8"]["weights"]["largest_error"] < 0.02
    assert 0.02 < found["compressed/fp8"]["weights"]["largest_error"] < 0.03
    calibrated = found["compressed/w8a8"]["made_by"]["calibrated_on"]
    assert calibrated["documents"] == 16 and calibrated["tokens"] > 16 * 20
    assert "calibrated_on" not in found["compressed/fp8"]["made_by"]
    told = capsys.readouterr()
    assert "proof passed: compressed checkpoints against merged" in told.out
    assert f"compressing to w8a8 on 16 documents, {calibrated['tokens']} tokens" in told.err
    card = run.card_file.read_text()
    assert "| compressed/w8a8 |" in card and "| compressed/fp8 |" in card


def test_models_read_from_disk_measure_the_same(run, tool):
    whole = write_compressed(run, ["w8a8"])["compressed/w8a8"]
    shutil.rmtree(run.path / "compressed")
    streamed = write_compressed(run, ["w8a8"], low_memory=True)["compressed/w8a8"]
    assert streamed["greedy"] == [] and streamed["runtime"] is None
    assert streamed["computed_in"].endswith("read as they are multiplied with")
    assert streamed["weights"] == whole["weights"]
    assert streamed["measured"]["mean_kl"] == pytest.approx(whole["measured"]["mean_kl"], rel=0.5)


def test_documents_to_calibrate_on(trained, monkeypatch):
    """Spread over training, cut, and never what is held out."""
    prepared = trained()[2]
    rows = calibrate.choose_rows(prepared)
    assert rows == [list(row["input_ids"]) for row in prepared.train]
    assert not any(list(row["input_ids"]) in rows for row in prepared.eval)
    monkeypatch.setattr(calibrate, "DOCUMENTS", 5)
    monkeypatch.setattr(calibrate, "LONGEST", 7)
    assert calibrate.choose_rows(prepared) == [rows[index][:7] for index in (0, 3, 6, 9, 12)]


# What is not made twice


def test_a_checkpoint_that_stands_is_left(run, tool, monkeypatch):
    first = write_compressed(run, ["w8a8", "fp8"])
    tool(never)
    assert write_compressed(run, ["fp8", "w8a8"]) == first
    export_run(run)  # the same weights again; it writes export.json anew
    assert write_compressed(run, ["w8a8", "fp8"]) == first
    monkeypatch.setattr(calibrate, "DOCUMENTS", 3)
    assert write_compressed(run, ["fp8"])["compressed/fp8"] == first["compressed/fp8"]
    with pytest.raises(AssertionError, match="it stood already"):
        write_compressed(run, ["w8a8"])
    assert (run.path / "compressed" / "w8a8").is_dir(), "until there is another one"


@pytest.mark.parametrize("part", ["weights", "beside", "merged", "note"])
def test_a_change_has_it_made_again(run, tool, part):
    first = write_compressed(run, ["fp8"])["compressed/fp8"]
    folder = run.path / "compressed" / "fp8"
    if part == "weights":
        edit(folder, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"] * 2}))
    elif part == "beside":
        (folder / "chat_template.jinja").unlink()
    elif part == "merged":
        template = run.merged / "chat_template.jinja"
        template.write_text("{#- -#}" + template.read_text())
    else:
        (run.path / "compressed" / "fp8.json").write_text("{")
    again = write_compressed(run, ["fp8"])["compressed/fp8"]
    assert (again["sha256"] == first["sha256"]) is (part != "merged")
    assert again["ok"] and hash_of(folder) == again["sha256"]


def test_what_was_removed_is_not_spoken_of(run, tool):
    write_compressed(run, ["w8a8", "fp8"])
    shutil.rmtree(run.path / "compressed" / "fp8")
    write_compressed(run, ["w8a8"])
    assert list(formats_of(run)) == ["compressed/w8a8"]


def test_a_checkpoint_of_other_weights_loses_its_name(run, tool):
    """Also when another type is asked for."""
    write_compressed(run, ["w8a8", "fp8"])
    settings = run.merged / "generation_config.json"
    settings.write_text(settings.read_text() + "\n")
    write_compressed(run, ["fp8"])
    assert {file.name for file in (run.path / "compressed").iterdir()} == {"fp8", "fp8.json", "w8a8.outdated"}
    assert list(formats_of(run)) == ["compressed/fp8"]


# What is refused: the checkpoint is not what was trained


def scaled(name: str, factor: float):
    return lambda tensors: tensors.update({name: tensors[name] * factor})


DAMAGES = {
    "one tensor a tenth too large": (
        scaled("model.layers.1.mlp.up_proj.weight_scale", 1.1),
        r"model\.layers\.1\.mlp\.up_proj\.weight: \|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1\| is 0\.",
    ),
    "two layers swapped": (
        lambda tensors: swap(tensors, "0.mlp.down_proj", "1.mlp.down_proj"),
        r"mlp\.down_proj\.weight: ‖Ŵ − W‖ / ‖W‖ is 1\.",
    ),
    "gate and up swapped": (
        lambda tensors: swap(tensors, "0.mlp.gate_proj", "0.mlp.up_proj"),
        r"model\.layers\.0\.mlp\.\w+_proj\.weight: ‖Ŵ − W‖ / ‖W‖ is 1\.",
    ),
    "a norm a tenth too large": (
        scaled("model.layers.1.post_attention_layernorm.weight", 1.1),
        r"model\.layers\.1\.\S+: \|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1\| is 0\.",
    ),
    "the embedding a hundredth too large": (
        scaled("model.embed_tokens.weight", 1.01),
        r"model\.embed_tokens\.weight: .* is 0\.0\d+, allowed 0\.0001",
    ),
    "a value that is none": (
        scaled("model.layers.0.self_attn.q_proj.weight_scale", float("nan")),
        "is not finite",
    ),
    "a projection in 16 bits": (
        lambda tensors: tensors.update(
            {"model.layers.0.mlp.up_proj.weight": torch.zeros(160, 64, dtype=torch.bfloat16)}
        ),
        r"model\.layers\.0\.mlp\.up_proj\.weight is stored as BF16, not ",
    ),
    "a tensor gone": (
        lambda tensors: tensors.pop("model.layers.1.input_layernorm.weight"),
        r"model\.layers\.1\.input_layernorm\.weight is missing",
    ),
}


@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(run, tool, capsys, damage, said, kind):
    tool(stand_in(lambda task: edit(Path(task["out"]), damage)))
    with pytest.raises(CompressedRefused, match=said) as caught:
        write_compressed(run, [kind])
    assert caught.value.exit_code == 2
    assert caught.value.block().startswith("llama-ft: the export was refused")
    assert {file.name for file in (run.path / "compressed").iterdir()} == {f"{kind}.rejected"}
    assert formats_of(run)[f"compressed/{kind}"]["ok"] is False
    assert json.loads(run.proof_file.read_text())["ok"] is True and run.merged.is_dir()
    assert not list(run.path.glob(".*"))
    assert "proof FAILED: compressed" in capsys.readouterr().out
    tool(stand_in())
    assert write_compressed(run, [kind])[f"compressed/{kind}"]["ok"]
    assert not (run.path / "compressed" / f"{kind}.rejected").exists()


def test_a_refused_one_does_not_keep_the_others_back(run, tool):
    def damage(task):
        if task["method"] == "round":
            edit(Path(task["out"]), scaled("model.norm.weight", 1.1))

    tool(stand_in(damage))
    with pytest.raises(CompressedRefused, match=r"compressed/fp8: model\.norm\.weight"):
        write_compressed(run, ["fp8", "w8a8"])
    kept = {name: said["ok"] for name, said in formats_of(run).items()}
    assert kept == {"compressed/fp8": False, "compressed/w8a8": True}


def test_what_shows_only_when_it_runs(run, tool):
    """Weights in order, but other answers from the checkpoint itself: its own limits, named as such."""

    def run_script(script, task, *args, **kwargs):
        answer = stand_in()(script, task)
        if script == "ask":
            import numpy as np

            for file in Path(task["logits"]).iterdir():
                np.save(file, np.load(file)[:, ::-1])
        return answer

    tool(run_script)
    with pytest.raises(CompressedRefused, match="as it runs: mean KL is"):
        write_compressed(run, ["fp8"])


@pytest.mark.parametrize(("script", "said"), [("decompress", "cannot read it"), ("ask", "cannot open the checkpoint")])
def test_what_its_own_reader_refuses(run, tool, script, said):
    def run_script(asked, task, *args, **kwargs):
        return {"version": "0", "error": "KeyError: scale"} if asked == script else stand_in()(asked, task)

    tool(run_script)
    with pytest.raises(CompressedRefused, match=f"{said}: KeyError: scale"):
        write_compressed(run, ["fp8"])


# What cannot begin


def test_wrong_types(run, tool):
    with pytest.raises(UserError) as caught:
        write_compressed(run, ["AWQ", "f8", "gptq"])
    assert [problem.hint for problem in caught.value.problems] == ["did you mean 'awq'?", "did you mean 'fp8'?"]
    assert not (run.path / "compressed").exists()


def test_a_run_without_a_proven_merge(run, tool):
    said = json.loads(run.proof_file.read_text())
    run.proof_file.write_text(json.dumps(said | {"ok": False}))
    with pytest.raises(UserError, match="holds no merged/ whose proof passed") as caught:
        write_compressed(run, ["fp8"])
    assert f"llama-ft export {run.path}" in caught.value.problems[0].hint


def test_a_reward_model(run):
    recipe = run.recipe
    training = recipe.training.model_copy(update={"objective": "reward"})
    run.__dict__["recipe"] = recipe.model_copy(update={"training": training})
    for refused in (lambda: check_compressed(run, check_types(["fp8"])), lambda: write_compressed(run, ["fp8"])):
        with pytest.raises(UserError, match="a reward model has no compressed form"):
            refused()


def test_rows_that_no_group_divides(tmp_path, tool):
    run, _, _ = make_run(tmp_path / "run", make_base(tmp_path / "base", intermediate_size=144))
    with pytest.raises(UserError, match="awq, gptq: no group of 128, 64, 32 weights divides rows of 144") as caught:
        check_compressed(run, check_types(["fp8", "awq", "gptq"]))
    assert "w8a8 or fp8" in caught.value.problems[0].hint
    export_run(run)
    with pytest.raises(UserError, match="divides rows of 144"):
        write_compressed(run, ["awq"])
    assert write_compressed(run, ["fp8"])["compressed/fp8"]["ok"]


def test_too_small_a_disk(run, tool, monkeypatch):
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 2**20))
    with pytest.raises(MachineFault, match=r"needs 0\.06 GiB on the disk and 0\.05 are free"):
        write_compressed(run, ["fp8"])
    assert not (run.path / "compressed").exists()


def test_too_little_memory(run, tool, monkeypatch):
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2**10))
    with pytest.raises(MachineFault, match=r"GiB of memory and 0\.00 are free"):
        write_compressed(run, ["fp8"], low_memory=True)
    assert not (run.path / "compressed").exists()


def test_a_tool_that_dies_leaves_what_stands(run, tool):
    first = write_compressed(run, ["fp8"])
    template = run.path / "compressed" / "fp8" / "chat_template.jinja"
    template.unlink()

    def killed(script, task, *args, **kwargs):
        raise MachineFault("compressing to fp8 failed: it was killed (SIGKILL)")

    tool(killed)
    with pytest.raises(MachineFault, match="SIGKILL"):
        write_compressed(run, ["fp8"])
    assert formats_of(run) == first and not list(run.path.glob(".*"))


def command(run: Run, *types: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    wanted = [argument for kind in types for argument in ("--compressed", kind)]
    line = [sys.executable, "-m", "llama_ft.cli", "export", str(run.path), *wanted]
    return subprocess.run(line, capture_output=True, text=True, env=os.environ | environment)


def test_the_command_names_the_nearest_type_before_anything_is_merged(run):
    shutil.rmtree(run.merged)
    done = command(run, "gtpq")
    assert done.returncode == 2
    assert "no such compressed type 'gtpq' — did you mean 'gptq'?" in done.stderr
    assert not run.merged.exists()


def test_the_command_says_before_anything_is_merged_that_the_tool_is_missing(run, tmp_path):
    shutil.rmtree(run.merged)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "LLAMA_FT_CACHE": str(tmp_path / "cache")}
    done = command(run, "fp8", **offline)
    assert done.returncode == 1, done.stderr
    assert "could not install llmcompressor==" in done.stderr and "Traceback" not in done.stderr
    assert not run.merged.exists()
