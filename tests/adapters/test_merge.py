"""The merge against its formula and against PEFT's own; and everything that it must refuse."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama_ft.adapters import merge as merge_module
from llama_ft.adapters.lora_file import read_lora
from llama_ft.adapters.merge import merge_adapter
from llama_ft.adapters.rows import row_parts
from llama_ft.errors import MachineFault, UserError
from llama_ft.llama.checkpoints.shards import plan_shards, stored_tensors, write_model
from tests.tiny_run import make_base

F32 = {"base_dtype": torch.float32, "dtype": torch.float32}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def adapter(base: Path, folder: Path, **config) -> Path:
    """A PEFT adapter with random factors, saved by PEFT."""
    settings = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
        elif "magnitude" in name or "modules_to_save" in name:
            parameter.data.mul_(1 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def peft_merge(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).merge_and_unload()
    return dict(model.state_dict())


def edit(folder: Path, **changes) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(("rs", "scale"), [(False, 2.5), (True, 5.0)])
def test_equals_the_formula_and_pefts_merge(base, tmp_path, rs, scale):
    lora = read_lora(adapter(base, tmp_path / "a", use_rslora=rs))
    assert lora.scale == scale  # 10 / 4 and 10 / √4
    assert lora.tensors == 8
    result = merge_adapter(base, lora, tmp_path / "out", **F32)
    written, start = load_file(result.path / "model.safetensors"), load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    down, up = lora.factors[name]
    torch.testing.assert_close(written[name], start[name] + scale * (up @ down), rtol=0, atol=1e-6)
    expected = peft_merge(base, tmp_path / "a")
    for key, tensor in written.items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-6)
    untouched = set(start) - set(lora.factors)
    assert all(torch.equal(written[key], start[key]) for key in untouched)
    assert (result.tensors, result.adapted) == (len(start), 4)
    assert not list(tmp_path.glob(".*")), "nothing is left aside"


VARIANTS = {
    "DoRA": {"use_dora": True},
    "DoRA, rsLoRA, a regex": {"use_dora": True, "use_rslora": True, "target_modules": r"model\.layers\.1\..*_proj"},
    "norms and DoRA": {"modules_to_save": ["input_layernorm"], "use_dora": True},
}
# A tied head is trained as the embedding; trained apart, PEFT would untie it.
TIED = VARIANTS | {"embedding": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}}
UNTIED = VARIANTS | {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head and norm": {"modules_to_save": ["lm_head", "norm"]},
}


@pytest.mark.parametrize(
    ("tied", "config"),
    [
        pytest.param(tied, config, id=f"{name}-{'tied' if tied else 'untied'}")
        for tied, variants in ((True, TIED), (False, UNTIED))
        for name, config in variants.items()
    ],
)
def test_every_variant_equals_pefts_own_merge(tmp_path, tied, config):
    base = make_base(tmp_path / "base", tied=tied)
    lora = read_lora(adapter(base, tmp_path / "a", **config))
    expected = peft_merge(base, tmp_path / "a")
    written = load_file(merge_adapter(base, lora, tmp_path / "out", **F32).path / "model.safetensors")
    start = load_file(base / "model.safetensors")
    assert written.keys() == start.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6)
    changed = {name for name in start if not torch.equal(written[name], start[name])}
    assert changed >= lora.factors.keys() | lora.whole.keys() - {"lm_head.weight"}, "something trained was not merged"


def test_merges_into_the_base_as_it_was_trained_and_rounds_once(base, tmp_path):
    lora = read_lora(adapter(base, tmp_path / "a"))
    start = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    down, up = lora.factors[name]
    merge_adapter(base, lora, tmp_path / "f32", base_dtype=torch.bfloat16, dtype=torch.float32)
    written = load_file(tmp_path / "f32" / "model.safetensors")[name]
    rounded = start[name].bfloat16().float()
    torch.testing.assert_close(written, rounded + 2.5 * (up @ down), rtol=0, atol=1e-6)
    merge_adapter(base, lora, tmp_path / "bf16", base_dtype=torch.bfloat16, dtype=torch.bfloat16)
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")[name], written.bfloat16())


def test_tied_embeddings_stay_tied(base, tmp_path):
    tied = read_lora(adapter(base, tmp_path / "a"))
    merge_adapter(base, tied, tmp_path / "out", **F32)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    # … also where the base's file holds the head a second time
    doubled = tmp_path / "doubled"
    shutil.copytree(base, doubled)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, doubled / "model.safetensors")
    merge_adapter(doubled, tied, tmp_path / "out2", **F32)
    assert "lm_head.weight" not in load_file(tmp_path / "out2" / "model.safetensors")
    untied = make_base(tmp_path / "untied", tied=False)
    merge_adapter(untied, read_lora(adapter(untied, tmp_path / "b")), tmp_path / "out3", **F32)
    assert "lm_head.weight" in load_file(tmp_path / "out3" / "model.safetensors")


def test_sharded_in_and_out(base, tmp_path):
    lora = read_lora(adapter(base, tmp_path / "a"))
    whole = load_file(merge_adapter(base, lora, tmp_path / "whole", **F32).path / "model.safetensors")
    limit = 100_000
    out = merge_adapter(base, lora, tmp_path / "out", **F32, shard_bytes=limit).path
    files = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in whole.values())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(t.numel() * 4 for t in tensors.values()) <= limit
        assert all(index["weight_map"][name] == file.name for name in tensors)
        found |= tensors
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    shutil.copy(base / "config.json", out)
    model, report = LlamaForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(model.model.layers[1].self_attn.q_proj.weight, whole["model.layers.1.self_attn.q_proj.weight"])
    # a sharded folder is also a base; an adapter of None only rewrites it
    again = merge_adapter(out, None, tmp_path / "again", **F32).path
    assert all(torch.equal(t, whole[name]) for name, t in load_file(again / "model.safetensors").items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_is_what_safetensors_reads(tmp_path, dtype):
    tensors = {"b": torch.randn(3, 5), "a": torch.randn(7), "scalar": torch.tensor(2.5), "odd": torch.randn(1, 1)}
    write_model(tmp_path, {n: tuple(t.shape) for n, t in tensors.items()}, dtype, tensors.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor.to(dtype))
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_shards_are_cut_in_order():
    shapes = {"a": (10,), "b": (10,), "huge": (100,), "c": (10,)}
    assert plan_shards(shapes, torch.float32, 80) == [["a", "b"], ["huge"], ["c"]]
    assert plan_shards(shapes, torch.float32, 10**9) == [["a", "b", "huge", "c"]]


def test_a_writer_that_is_handed_the_wrong_tensor_says_so(tmp_path):
    with pytest.raises(ValueError, match="expected a"):
        write_model(tmp_path, {"a": (2,)}, torch.float32, [("a", torch.zeros(3))])


# What must be refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "has factors or a length, not both"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights is "pissa"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which the file does not hold"),
        ({"target_modules": ["q_proj"]}, "holds factors of model.layers.0.mlp.down_proj.weight, which target_modules"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern is"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"invented_by_a_later_peft": 1}, "invented_by_a_later_peft is 1"),
        ({"peft_type": "LOHA"}, "'LOHA' adapter"),
        ({"r": 0}, "r is 0"),
        ({"target_modules": ".*q_proj"}, "which target_modules"),
        ({"target_modules": {}}, "target_modules is {}"),
    ],
)
def test_other_variants_are_refused_by_name(base, tmp_path, changes, said):
    folder = adapter(base, tmp_path / "a")
    edit(folder, **changes)
    with pytest.raises(UserError, match=said.replace("[", r"\[").replace("*", r"\*")):
        read_lora(folder)


def test_dora_that_its_config_hides_is_refused(base, tmp_path):
    folder = adapter(base, tmp_path / "a", use_dora=True)
    edit(folder, use_dora=False)
    with pytest.raises(UserError, match="lora_magnitude_vector"):
        read_lora(folder)


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"


def test_a_zero_adapter_is_refused(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: [t.zero_() for name, t in tensors.items() if "lora_B" in name])
    with pytest.raises(UserError, match="the adapter is zero: nothing was trained"):
        read_lora(folder)


def test_one_zero_factor_is_named(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors[KEY.format("B")].zero_())
    with pytest.raises(UserError, match=r"lora_B of model\.layers\.1\.self_attn\.q_proj\.weight is zero"):
        read_lora(folder)


def test_a_lost_factor_is_named(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors.pop(KEY.format("B")))
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.q_proj\.weight has lora_A but not its partner"):
        read_lora(folder)


def test_a_lost_pair_is_named(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: [tensors.pop(KEY.format(side)) for side in "AB"])
    with pytest.raises(UserError, match=r"targets model\.layers\.1\.self_attn\.q_proj\.weight but holds no factors"):
        merge_adapter(base, read_lora(folder), tmp_path / "out", **F32)
    assert not (tmp_path / "out").exists()


def test_a_pair_without_a_weight_is_named(base, tmp_path):
    folder = adapter(base, tmp_path / "a")

    def move(tensors):
        for side in "AB":
            tensors[KEY.format(side).replace("layers.1", "layers.7")] = tensors.pop(KEY.format(side))

    change_tensors(folder, move)
    with pytest.raises(
        UserError, match=r"changes model\.layers\.7\.self_attn\.q_proj\.weight, which the base does not"
    ):
        merge_adapter(base, read_lora(folder), tmp_path / "out", **F32)


def test_another_base_is_refused(base, tmp_path):
    lora = read_lora(adapter(base, tmp_path / "a"))
    other = make_base(tmp_path / "other", head_dim=32)
    with pytest.raises(UserError, match=r"q_proj\.weight is \[128, 64\] in the base, \[64, 64\] in the adapter"):
        merge_adapter(other, lora, tmp_path / "out", **F32)


def test_the_rank_in_the_config_must_be_the_files(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    edit(folder, r=8)
    with pytest.raises(UserError, match="which is not rank 8"):
        read_lora(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(base, tmp_path, value):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors[KEY.format("B")].view(-1)[5:6].fill_(value))
    with pytest.raises(UserError, match=r"q_proj\.weight has values that are not finite"):
        merge_adapter(base, read_lora(folder), tmp_path / "out", **F32)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_overflow_of_float16_is_refused(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors[KEY.format("B")].mul_(1e6))
    with pytest.raises(UserError, match="not finite in float16"):
        merge_adapter(base, read_lora(folder), tmp_path / "out", base_dtype=torch.float32, dtype=torch.float16)


def test_a_damaged_adapter_file(base, tmp_path):
    folder = adapter(base, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        read_lora(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        read_lora(folder)


def test_a_damaged_base_file(base, tmp_path):
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        stored_tensors(copy)


# The disk


def test_too_little_room_is_said_before_anything_is_written(base, tmp_path, monkeypatch):
    lora = read_lora(adapter(base, tmp_path / "a"))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(MachineFault, match=r"the merged model needs 0\.03 GiB and 0\.00 GiB are free"):
        merge_adapter(base, lora, tmp_path / "out", **F32)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_while_writing_leaves_the_old_export_alone(base, tmp_path, monkeypatch, code):
    lora = read_lora(adapter(base, tmp_path / "a"))
    out = merge_adapter(base, lora, tmp_path / "out", **F32).path
    before = (out / "model.safetensors").read_bytes()

    def fail(*args):
        write_model(*args)
        raise OSError(code, "as the kernel says")

    monkeypatch.setattr(merge_module, "write_model", fail)
    with pytest.raises(MachineFault, match="disk is full" if code == errno.ENOSPC else "as the kernel says"):
        merge_adapter(base, lora, out, **F32)
    assert (out / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"a", "out"}


def test_an_interrupted_merge_leaves_nothing(base, tmp_path, monkeypatch):
    lora = read_lora(adapter(base, tmp_path / "a"))
    monkeypatch.setattr(merge_module, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base, lora, tmp_path / "out", **F32)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_disk_that_is_really_full(base, tmp_path):
    """A file size limit of the process stands in for a full disk: the kernel refuses the write itself."""
    import resource
    import signal

    lora = read_lora(adapter(base, tmp_path / "a"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(MachineFault, match=r"could not write out: .*File too large"):
            merge_adapter(base, lora, tmp_path / "out", **F32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_tensor_may_be_written_in_parts(tmp_path):
    weight = torch.randn(7, 3)
    parts = [("a", weight[:2]), ("a", weight[2:6]), ("a", weight[6:])]
    write_model(tmp_path, {"a": (7, 3)}, torch.float32, parts)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], weight)
    for wrong in (
        parts[:2],
        [*parts, ("a", weight[:1])],
        [parts[0], ("a", weight[2:6, :2])],
        [parts[0], ("b", weight)],
    ):
        with pytest.raises(ValueError, match=r"expected a|more tensors"):
            write_model(tmp_path, {"a": (7, 3)}, torch.float32, wrong)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"modules_to_save": ["input_layernorm"]}])
def test_a_merge_by_few_rows_is_the_same(base, tmp_path, monkeypatch, config):
    lora = read_lora(adapter(base, tmp_path / "a", **config))
    types = {"base_dtype": torch.bfloat16, "dtype": torch.float32}
    whole = load_file(merge_adapter(base, lora, tmp_path / "whole", **types).path / "model.safetensors")
    monkeypatch.setattr("llama_ft.adapters.rows.PART_BYTES", 3000)
    assert len(row_parts((64, 32))) == 3
    cut = load_file(merge_adapter(base, lora, tmp_path / "cut", **types).path / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(cut[name], tensor, rtol=0, atol=1e-6)
