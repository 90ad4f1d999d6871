"""The parts of compressed checkpoints' making: types, weights without what was folded, entries, the tool's folder."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ft.errors import MachineFault, UserError
from llama_ft.export.compressed import tools, weights
from llama_ft.export.compressed.entries import entry_faults, settle
from llama_ft.export.compressed.types import GROUPS, TYPES, check_types, compressed_bytes, group_size
from llama_ft.export.compressed.write import stage
from llama_ft.export.gguf import child
from llama_ft.export.gguf.weights import worse
from tests.export.compressed_runs import compress, edit, say

FP8 = TYPES["fp8"]

# Types


def test_groups_divide_every_row():
    every = list(TYPES.values())
    assert group_size([4096, 11008], every) == 128
    assert group_size([576, 1536], every) == 64  # SmolLM2-135M
    assert group_size([64, 160], every) == 32
    with pytest.raises(UserError, match=r"awq, gptq: no group of 128, 64, 32 weights divides rows of 144"):
        group_size([64, 144], every)
    assert group_size([64, 144], check_types(["w8a8", "fp8"])) in GROUPS, "they need none"


def test_what_is_asked_of_llm_compressor():
    assert TYPES["gptq"].scheme(64) == {
        "weights": {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": True, "dynamic": False}
        | {"group_size": 64}
    }
    assert TYPES["awq"].scheme(128)["weights"]["symmetric"] is False
    for name in ("w8a8", "fp8"):
        scheme = TYPES[name].scheme(64)
        assert scheme["weights"]["strategy"] == "channel" and "group_size" not in scheme["weights"]
        assert scheme["input_activations"]["strategy"] == "token" and scheme["input_activations"]["dynamic"] is True
    assert [kind.name for kind in TYPES.values() if not kind.calibrated] == ["fp8"]


def test_the_more_exact_a_type_the_narrower_its_limits():
    for exact, rough in pairwise(TYPES.values()):
        assert exact.tolerance.mean_kl <= rough.tolerance.mean_kl
        assert exact.runtime.mean_kl <= rough.runtime.mean_kl
        assert exact.tolerance.mean_kl <= exact.runtime.mean_kl
    for kind in TYPES.values():
        assert kind.error < 1, "a tensor of zeros"
        assert kind.scale <= 0.05, "a tensor a tenth too large"


def test_sizes():
    shapes = {"model.embed_tokens.weight": (100, 64), "model.layers.0.mlp.up_proj.weight": (256, 64)}
    embedding, projection = 2 * 100 * 64, 256 * 64
    assert compressed_bytes(shapes, FP8, 64) == embedding + projection + 2 * 256 + 2**20
    assert compressed_bytes(shapes, TYPES["gptq"], 64) - 2**20 - embedding == projection / 2 + 256 * 2.5


# Weights


@pytest.fixture(params=[4, 2], ids=["a head of its own for each", "heads that share"])
def folders(request, tmp_path) -> tuple[Path, Path]:
    """A random LLaMA as merged, and another folder of the same."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": request.param}
    config = LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **heads)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    model.save_pretrained(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "plain")
    return tmp_path / "merged", tmp_path / "plain"


def fold(tensors: dict[str, torch.Tensor], *, shared: bool) -> None:
    """As AWQ does: columns times s, and what feeds them by it."""
    for layer in (f"model.layers.{number}." for number in range(2)):
        pairs = [("input_layernorm", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])]
        pairs += [("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]), ("mlp.up_proj", ["mlp.down_proj"])]
        pairs += [] if shared else [("self_attn.v_proj", ["self_attn.o_proj"])]
        for source, fed in pairs:
            weight = tensors[f"{layer}{source}.weight"]
            s = torch.empty(len(weight)).uniform_(0.1, 10)
            tensors[f"{layer}{source}.weight"] = weight / (s if weight.dim() == 1 else s[:, None])
            for name in fed:
                tensors[f"{layer}{name}.weight"] = tensors[f"{layer}{name}.weight"] * s


def logits(folder: Path) -> torch.Tensor:
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.inference_mode():
        return model(torch.arange(50)[None]).logits


def test_what_was_folded_is_taken_out(folders):
    merged, plain = folders
    shared = load_file(merged / "model.safetensors")["model.layers.0.self_attn.v_proj.weight"].shape[0] != 64
    edit(plain, lambda tensors: fold(tensors, shared=shared))
    assert torch.allclose(logits(merged), logits(plain), atol=1e-4), "no answer changes"
    found = weights.compare_weights(plain, merged, TYPES["awq"])
    assert found.rounded["error"][0] < 1e-6 and found.rounded["scale_error"][0] < 1e-6
    assert found.kept["error"][0] == 0
    assert weights.compare_weights(plain, merged, TYPES["gptq"]).rounded["error"][0] > 1, "it folds nothing"


@pytest.mark.parametrize("kind", ["awq", "gptq", "w8a8", "fp8"])
@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
def test_a_tensor_a_tenth_too_large_is_found_whatever_is_folded(folders, part, kind):
    merged, plain = folders
    name = f"model.layers.1.{'self_attn' if part[0] in 'qkvo' else 'mlp'}.{part}.weight"
    edit(plain, lambda tensors: tensors.update({name: 1.1 * tensors[name]}))
    faults = weights.weight_faults(weights.compare_weights(plain, merged, TYPES[kind]), TYPES[kind])
    assert faults and all(fault.startswith("model.layers.1.") for fault in faults)
    assert any("⟨W, W⟩ − 1| is 0.1" in fault for fault in faults)


@pytest.mark.parametrize("kind", ["awq", "gptq", "w8a8", "fp8"])
def test_two_tensors_swapped_are_found_whatever_is_folded(folders, kind):
    merged, plain = folders

    def swapped(tensors):
        one, other = (f"model.layers.{number}.mlp.up_proj.weight" for number in (0, 1))
        tensors[one], tensors[other] = tensors[other], tensors[one]

    edit(plain, swapped)
    faults = weights.weight_faults(weights.compare_weights(plain, merged, TYPES[kind]), TYPES[kind])
    assert any("‖Ŵ − W‖ / ‖W‖ is " in fault for fault in faults)


def test_a_row_of_zeros_keeps_its_scale():
    right = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert weights.row_scales(right, 3 * right).tolist() == [3.0, 1.0]


def test_what_is_no_number_stays_the_worst():
    worst = 0.0
    for value in (0.2, float("nan"), 0.1, float("inf")):
        worst = value if worse(value, worst) else worst
    assert math.isnan(worst)


# What a checkpoint says


@pytest.fixture
def checkpoint(trained, tmp_path) -> tuple[Path, Path]:
    """(merged/, an fp8 checkpoint of it)."""
    from llama_ft.export.run import export_run
    from tests.export.conftest import copy_of

    run = copy_of(trained()[0], tmp_path / "run")
    export_run(run)
    task = {"model": str(run.merged), "out": str(tmp_path / "fp8"), "dtype": "bfloat16", "ignore": ["lm_head"]}
    compress(task | {"scheme": FP8.scheme(32)})
    settle(tmp_path / "fp8", run.merged, "bfloat16")
    return run.merged, tmp_path / "fp8"


def test_nothing_is_wrong_with_what_was_settled(checkpoint):
    merged, folder = checkpoint
    assert entry_faults(folder, merged, FP8, 32, "bfloat16") == []
    assert not (folder / "recipe.yaml").exists()
    assert {file.stat().st_mode for file in folder.iterdir()} == {(merged / "config.json").stat().st_mode}


def group_of(config) -> dict:
    return config["quantization_config"]["config_groups"]["group_0"]


def forget(config) -> None:
    del config["quantization_config"]


SAID: dict[str, tuple[Callable[[dict], object], str]] = {
    "nothing": (forget, "has no quantization_config: its weights would be read as they are"),
    "other bits": (lambda config: group_of(config)["weights"].update(num_bits=4), "weights.num_bits is 4, not 8"),
    "other numbers": (lambda config: group_of(config)["weights"].update(type="int"), "weights.type is 'int'"),
    "activations as they are": (
        lambda config: group_of(config).update(input_activations=None),
        "input_activations is None, not {",
    ),
    "outputs rounded": (
        lambda config: group_of(config).update(output_activations={"num_bits": 8}),
        "output_activations is {'num_bits': 8}, not None",
    ),
    "the head rounded": (lambda config: config["quantization_config"].update(ignore=[]), "ignore is [], not ['lm_head"),
    "another format": (
        lambda config: config["quantization_config"].update(quant_method="gptq"),
        "quant_method is 'gptq', not 'compressed-tensors'",
    ),
    "not rounded yet": (
        lambda config: config["quantization_config"].update(quantization_status="frozen"),
        "quantization_status is 'frozen', not 'compressed'",
    ),
    "a cache of 8 bits": (
        lambda config: config["quantization_config"].update(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme is {'num_bits': 8}, not None",
    ),
    "two groups": (
        lambda config: config["quantization_config"]["config_groups"].update(group_1={}),
        "config_groups is not the one group",
    ),
    "other layers": (lambda config: group_of(config).update(targets=["re:.*up_proj"]), "targets is ['re:.*up_proj']"),
    "another end token": (lambda config: config.update(eos_token_id=0), "eos_token_id is 0, not"),
    "another base of the rotary angles": (
        lambda config: config["rope_parameters"].update(rope_theta=5e5),
        "rope_parameters is",
    ),
    "another type of what is kept": (lambda config: config.update(dtype="float32"), "dtype is 'float32', not 'bfloat"),
}


@pytest.mark.parametrize(("change", "said"), SAID.values(), ids=SAID)
def test_a_config_that_says_something_else(checkpoint, change, said):
    merged, folder = checkpoint
    say(folder, change)
    faults = entry_faults(folder, merged, FP8, 32, "bfloat16")
    assert len(faults) == 1 and said in faults[0], faults


def test_companions_are_those_of_merged(checkpoint):
    merged, folder = checkpoint
    (folder / "chat_template.jinja").write_text("another")
    (folder / "generation_config.json").unlink()
    assert entry_faults(folder, merged, FP8, 32, "bfloat16") == [
        "chat_template.jinja is another one than in merged/",
        "generation_config.json is missing",
    ]


def test_what_must_be_rounded_is_and_nothing_else(checkpoint):
    merged, folder = checkpoint

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].float()
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit(folder, change)
    assert sorted(entry_faults(folder, merged, FP8, 32, "bfloat16")) == [
        "model.layers.0.mlp.up_proj.weight is stored as F32, not F8_E4M3",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.norm.weight is stored as F8_E4M3, not in 16 bits",
    ]


# The tool's folder


def test_pins_are_exact_and_leave_torch_out():
    found = tools.pins()
    assert "torch" not in found and found["llmcompressor"] == tools.version()
    assert Version(found["transformers"]) <= Version("5.17"), "what llm-compressor 0.14 takes"
    assert all(Version(version) for version in found.values())
    assert tools.PINNED.read_text().count("==") == len(found)


def test_without_a_network_the_pip_line_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MachineFault, match=rf"could not install llmcompressor=={tools.version()}: ERROR: ") as caught:
        tools.compressor_folder()
    place = tmp_path / "cache" / "tools" / tools.folder_name()
    hint = caught.value.problems[0].hint
    assert f"--target {place} -r {tools.PINNED}" in hint and "--no-deps" in hint
    assert [path.name for path in place.parent.iterdir()] == [f"{place.name}.lock"]


def test_a_folder_that_does_not_start_is_no_folder(tmp_path):
    said = tools._unfit(tmp_path)
    assert said is not None and "No module named 'llmcompressor'" in said


def test_a_folder_that_stands_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    place = tmp_path / "tools" / tools.folder_name()
    place.mkdir(parents=True)
    path = tools.environment(tmp_path / "aside")
    assert path == [place, tmp_path / "aside" / "torch"]
    assert tools.environment(tmp_path / "aside") == path, "links that are there already serve"


def installed(folder: Path, name: str, requires: list[str], files: list[str]) -> None:
    """A package as pip leaves it."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {line}" for line in requires)]
    (info / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    recorded = [*files, f"{info.name}/METADATA", "../../../bin/tool"]
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in recorded))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()


def test_torch_and_what_it_brought_are_linked(tmp_path, monkeypatch):
    """CUDA's libraries come through extras of a package that is otherwise empty; numpy is pinned, and not ours."""
    site = tmp_path / "site"
    toolkit = ["cuda-toolkit[cublas]==13 ; platform_system == 'Linux'", "numpy", "made-for-windows ; os_name == 'nt'"]
    installed(site, "torch", [*toolkit, "not-there"], ["torch/__init__.py", "functorch.py", "__pycache__/x.pyc"])
    extras = ["nvidia-cublas ; extra == 'cublas'", "nvidia-cufft ; extra == 'cufft'"]
    installed(site, "cuda_toolkit", extras, ["cuda_toolkit/__init__.py"])
    installed(site, "nvidia_cublas", [], ["nvidia/cublas/lib/libcublas.so"])
    installed(site, "nvidia_cufft", [], ["cufft/lib/libcufft.so"])
    installed(site, "numpy", [], ["numpy/__init__.py"])
    installed(site, "made_for_windows", [], ["windows/__init__.py"])
    monkeypatch.setattr(sys, "path", [str(site)])
    links = tmp_path / "links"
    tools.link_torch(links)
    assert {link.name for link in links.iterdir() if not link.name.endswith(".dist-info")} == {
        *("torch", "functorch.py", "cuda_toolkit", "nvidia")
    }
    assert (links / "torch-1.0.dist-info" / "METADATA").is_file(), "importlib.metadata tells its version"
    assert (links / "nvidia" / "cublas" / "lib" / "libcublas.so").is_file()


def test_a_process_of_its_own_environment_sees_our_torch_and_nothing_else(tmp_path):
    tools.link_torch(tmp_path / "torch")
    (tmp_path / "tool.py").write_text(
        "import importlib.util, json, sys\n"
        "task = json.load(open(sys.argv[1]))\n"
        "seen = {name: importlib.util.find_spec(name) is not None for name in task['names']}\n"
        "json.dump({'seen': seen, 'version': __import__('importlib.metadata').metadata.version('torch')}, "
        "open(task['answer'], 'w'))\n"
    )
    names = ["torch", "transformers", "peft", "llama_ft", "pytest", "numpy"]
    given = {"scripts": tmp_path, "alone_with": [tmp_path / "torch"]}
    said = child.run_script("tool", {"names": names}, tmp_path, what="looking", **given)
    assert said["seen"] == {name: name == "torch" for name in names}
    assert said["version"] == torch.__version__


def test_how_far_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "tool.py").write_text(
        "import json, sys, time\n"
        "sys.stderr.write('(3/31): Calibrating:  50%|#| 2/4\\r(4/31): Propagating:  75%|#| 3/4')\n"
        "sys.stderr.flush(); time.sleep(1)\n"
        "json.dump({}, open(json.load(open(sys.argv[1]))['answer'], 'w'))\n"
    )
    monkeypatch.setattr(child, "_EVERY", 0.3)
    child.run_script("tool", {}, tmp_path, what="compressing to awq", scripts=tmp_path, stage=stage)
    assert "compressing to awq: part 4 of 31, " in capsys.readouterr().err
    log = tmp_path / "empty.log"
    log.touch()
    assert stage(log) is None


def test_what_is_stored_is_what_the_stand_in_stores(checkpoint):
    """The tests' own rounding is in the format: the types and names that safetensors has for it."""
    _, folder = checkpoint
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].shape == (160, 1)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    save_file(tensors, folder / "model.safetensors")
