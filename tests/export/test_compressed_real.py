"""llm-compressor itself, in its own environment: two real layers to every type. By hand: `pytest -m peers FILE`.

Installs 0.7 GB into the user's cache where that is missing. AWQ's search takes a minute or two on a CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llama_ft.errors import MachineFault
from llama_ft.export.compressed import tools
from llama_ft.export.compressed import write as write_module
from llama_ft.export.compressed.types import TYPES
from llama_ft.export.compressed.write import CompressedRefused, write_compressed
from llama_ft.export.gguf.child import run_script
from llama_ft.export.run import export_run
from llama_ft.recipe.run import Run
from tests.conftest import USERS_CACHE
from tests.export.compressed_runs import edit
from tests.tiny_run import make_base, make_run
from tests.train.conftest import cut_short

pytestmark = pytest.mark.peers


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory):
    """The folder in the user's cache, where it is made once."""
    with pytest.MonkeyPatch.context() as patch:
        if USERS_CACHE is None:
            patch.delenv("LLAMA_FT_CACHE")
        else:
            patch.setenv("LLAMA_FT_CACHE", USERS_CACHE)
        try:
            folder = tools.compressor_folder()
        except MachineFault as error:
            pytest.skip(f"llm-compressor cannot be fetched: {error}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tools, "compressor_folder", lambda: folder)
        yield folder


@pytest.fixture(scope="session")
def merged(smollm2, tmp_path_factory) -> Run:
    """Two layers of SmolLM2-135M with a LoRA of four steps."""
    base = cut_short(smollm2, tmp_path_factory.mktemp("base") / "base")
    run, _, _ = make_run(tmp_path_factory.mktemp("real") / "run", base)
    export_run(run)
    return run


@pytest.fixture(scope="session")
def compressed(merged) -> dict:
    return write_compressed(merged, list(TYPES))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_of_two_real_layers(merged, compressed, kind):
    found = compressed[f"compressed/{kind}"]
    assert found["ok"] and found["runtime"]["faults"] == []
    assert found["runtime"]["version"] == f"transformers {tools.pins()['transformers']}"
    assert found["made_by"]["llmcompressor"] == tools.version()
    config = json.loads((merged.path / found["file"] / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["weights"]["group_size"] == (64 if TYPES[kind].grouped else None), "SmolLM2's rows are 576 and 1536"
    assert found["bytes"] < 0.75 * (merged.merged / "model.safetensors").stat().st_size


def test_what_was_folded_is_known(compressed):
    """AWQ's weights differ from merged/ beyond any limit; with its scales taken out they differ as 4 bits do."""
    found = compressed["compressed/awq"]["weights"]
    assert found["compared_without"] == "all" and 0.05 < found["largest_error"] < 0.3


def test_activations_are_rounded_when_it_runs(compressed):
    for kind in ("w8a8", "fp8"):
        found = compressed[f"compressed/{kind}"]
        assert found["runtime"]["measured"]["mean_kl"] > found["measured"]["mean_kl"]
    for kind in ("awq", "gptq"):
        found = compressed[f"compressed/{kind}"]
        assert found["runtime"]["measured"]["mean_kl"] == pytest.approx(found["measured"]["mean_kl"], rel=0.2)


def test_the_same_weights_give_the_same_checkpoint(merged, compressed, tmp_path):
    """Bit for bit, with the same documents on the same machine."""
    copy = tmp_path / "run"
    shutil.copytree(merged.path, copy, ignore=shutil.ignore_patterns("compressed"))
    again = write_compressed(Run(copy), ["gptq", "fp8"])
    assert {name: found["sha256"] for name, found in again.items()} == {
        name: compressed[name]["sha256"] for name in again
    }


@pytest.mark.parametrize("kind", ["gptq", "w8a8", "fp8"])
def test_damage_to_a_real_checkpoint_is_found(merged, compressed, tmp_path, monkeypatch, kind):
    """Scales of one tensor a tenth too large, read by compressed-tensors' own code."""
    made = merged.path / compressed[f"compressed/{kind}"]["file"]
    copy = tmp_path / "run"
    shutil.copytree(merged.path, copy, ignore=shutil.ignore_patterns("compressed"))

    def damaged(script, task, *args, **kwargs):
        shutil.copytree(made, task["out"])
        name = "model.layers.1.mlp.up_proj.weight_scale"
        edit(Path(task["out"]), lambda tensors: tensors.update({name: tensors[name] * 1.1}))
        return {}

    monkeypatch.setattr(write_module, "run_script", damaged)
    with pytest.raises(CompressedRefused, match=r"model\.layers\.1\.mlp\.up_proj\.weight: \|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1\|"):
        write_compressed(Run(copy), [kind])
    assert (copy / "compressed" / f"{kind}.rejected").is_dir()


def test_a_checkpoint_that_its_reader_refuses(merged, compressed, tmp_path, monkeypatch):
    """A scale that is gone: compressed-tensors says so, and nothing of it reaches the user as a traceback."""
    made = merged.path / compressed["compressed/gptq"]["file"]
    copy = tmp_path / "run"
    shutil.copytree(merged.path, copy, ignore=shutil.ignore_patterns("compressed"))

    def damaged(script, task, *args, **kwargs):
        shutil.copytree(made, task["out"])
        edit(Path(task["out"]), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight_scale"))
        return {}

    monkeypatch.setattr(write_module, "run_script", damaged)
    with pytest.raises(CompressedRefused, match=r"compressed-tensors cannot read it: .*weight_scale"):
        write_compressed(Run(copy), ["gptq"])


def test_a_head_of_its_own_stays_as_it_is(tmp_path):
    """Untied, and heads that do not share: AWQ folds v into o."""
    base = make_base(tmp_path / "base", tied=False, num_key_value_heads=4)
    run, _, _ = make_run(tmp_path / "run", base)
    export_run(run)
    found = write_compressed(run, ["awq"])["compressed/awq"]
    tensors = load_file(run.path / found["file"] / "model.safetensors")
    assert str(tensors["lm_head.weight"].dtype) == "torch.bfloat16"
    assert found["made_by"]["scheme"]["weights"]["group_size"] == 32


def test_a_failure_is_told_in_its_own_words(merged, environment, tmp_path):
    """What llm-compressor ends with is a message, and not a traceback of ours."""
    tools.link_torch(tmp_path / "torch")
    task = {"model": str(tmp_path), "dtype": "bfloat16", "threads": 1, "rows": None}
    folders = {"scripts": write_module.SCRIPTS, "alone_with": [environment, tmp_path / "torch"]}
    with pytest.raises(MachineFault, match=r"compressing to fp8 failed: .*no file named model\.safetensors"):
        run_script("compress", task, tmp_path, what="compressing to fp8", **folders)
