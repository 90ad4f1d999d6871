"""Quantised bases: what they hold, what they compute, that an evaluation leaves them alone, and the merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers import LlamaForCausalLM as HFLlama

from llama_ft.adapters.base import load_base
from llama_ft.adapters.fused import can_fuse
from llama_ft.adapters.lora import attach_lora
from llama_ft.adapters.lora_file import read_lora
from llama_ft.adapters.merge import merge_adapter
from llama_ft.adapters.quantised import (
    dequantise,
    digest,
    is_quantised,
    load_quantised,
    requantised,
    unpacked,
    without_quantisation,
)
from llama_ft.errors import UserError
from llama_ft.llama.projections import project_each
from llama_ft.recipe.schema import Adapter
from tests.tiny_run import make_base

CPU = torch.device("cpu")
KINDS = {
    "NF4": {"bits": 4},
    "NF4, plain scales": {"bits": 4, "double_quant": False},
    "LLM.int8()": {"bits": 8},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), intermediate_size=192)


def quantised(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.bfloat16):
    return load_quantised(folder, adapter, dtype, compute=torch.float32, device=CPU)


def with_adapter(folder: Path, **settings):
    adapter = Adapter(method="qlora", r=8, alpha=16, **settings)
    torch.manual_seed(0)
    model = attach_lora(quantised(folder, adapter), adapter)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    return model.train()


def gradients(model, ids: Tensor) -> Tensor:
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
def test_holds_what_transformers_and_bitsandbytes_make_of_the_same_files(base, kind):
    """Byte for byte, so that the adapter means the same in plain transformers."""
    settings = KINDS[kind]
    if settings["bits"] == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=settings.get("double_quant", True),
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = HFLlama.from_pretrained(base, quantization_config=config, dtype=torch.float32, device_map="cpu")
    ours = quantised(base, Adapter(method="qlora", **settings), torch.float32)
    there = dict(theirs.named_modules())
    for module in there.values():
        module.support_avx512bf16_for_cpu = False  # its evaluation would repack the weights for a bfloat16 kernel
    seen = 0
    for name, linear in ours.named_modules():
        if is_quantised(linear):
            seen += 1
            assert torch.equal(linear.weight.data.flatten(), there[name].weight.data.flatten()), name
            assert torch.equal(dequantise(linear), dequantise(there[name])), name
    assert seen == 14
    assert not is_quantised(ours.lm_head)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, theirs.eval()(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_what_the_model_holds(base, kind):
    adapter = Adapter(method="qlora", **KINDS[kind])
    plain = load_base_in(base, torch.bfloat16)
    linear = quantised(base, adapter).model.layers[1].mlp.down_proj
    weight = plain.model.layers[1].mlp.down_proj.weight.data
    back = requantised(adapter, CPU, torch.float32)(weight)
    assert torch.equal(back, dequantise(linear))
    error = (back.float() - weight.float()).norm() / weight.float().norm()
    assert error < (0.12 if adapter.bits == 4 else 0.015)
    assert error > 1e-4


def load_base_in(folder: Path, dtype: torch.dtype):
    return HFLlama.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_knows_every_weight(base, kind):
    adapter = Adapter(method="qlora", **KINDS[kind])
    one, other = quantised(base, adapter), quantised(base, adapter)
    assert digest(one) == digest(other)
    weight = other.model.layers[1].self_attn.o_proj.weight
    weight.data.view(-1)[-1] ^= 1
    assert digest(one) != digest(other)


def test_the_fused_product_is_pefts(base):
    """Forward and every gradient, in float32, against PEFT's own forward on the same NF4 layers."""
    model = with_adapter(base)
    layers = [module for module in model.modules() if type(module).__qualname__ == "Linear4bit"]
    assert sum(map(can_fuse, layers)) == 14
    ids = torch.randint(0, 350, (3, 21), generator=torch.Generator().manual_seed(0))
    fused = model(input_ids=ids, labels=ids).loss.item(), gradients(model, ids)
    model.get_base_model().model.set_project(project_each)
    plain = model(input_ids=ids, labels=ids).loss.item(), gradients(model, ids)
    assert fused[0] == pytest.approx(plain[0], abs=1e-6)
    torch.testing.assert_close(fused[1], plain[1], rtol=1e-4, atol=1e-7)


def test_the_fused_product_gives_way_to_dora_and_dropout(base):
    for settings in ({"dora": True}, {"dropout": 0.1}):
        model = with_adapter(base, **settings)
        layers = [module for module in model.modules() if type(module).__qualname__ == "Linear4bit"]
        assert layers
        assert not any(map(can_fuse, [layer for layer in layers if hasattr(layer, "lora_A")]))
        assert gradients(model, torch.arange(3, 30)[None]).isfinite().all()


def test_an_adapter_stays_in_float32(base):
    """TRL rounds the adapter of a model that calls itself quantised to bfloat16."""
    model = with_adapter(base)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert not getattr(model.get_base_model(), "is_loaded_in_4bit", False)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_evaluation_leaves_training_as_it_was(smollm2, bits):
    """On the real model: on AVX512-BF16 CPUs bitsandbytes repacks NF4 weights in an evaluation, and gradients turn."""
    model = with_adapter(smollm2, bits=bits)
    ids = torch.randint(0, 49_000, (2, 48), generator=torch.Generator().manual_seed(0))
    before, made_of = gradients(model, ids), digest(model)
    model.eval()
    with torch.no_grad():
        first = model(input_ids=ids, labels=ids).loss.item()
        model.generate(input_ids=ids[:1, :8], max_new_tokens=2, do_sample=False)
    model.train()
    assert torch.equal(gradients(model, ids), before)
    assert digest(model) == made_of
    model.eval()
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == first


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"dora": True}, {"rslora": True, "targets": ["q_proj"]}])
def test_the_merge_answers_as_the_adapter_does(base, tmp_path, settings):
    """Merged in float32 into what the base was in its 4 or 8 bits; into the files themselves it is another model."""
    model = with_adapter(base, **settings)
    model.save_pretrained(tmp_path / "adapter")
    adapter = Adapter(method="qlora", r=8, alpha=16, **settings)
    lora, types = read_lora(tmp_path / "adapter"), {"base_dtype": torch.bfloat16, "dtype": torch.float32}
    merge_adapter(base, lora, tmp_path / "merged", **types, requantise=requantised(adapter, CPU, torch.float32))
    merge_adapter(base, lora, tmp_path / "naive", **types)
    for folder in ("merged", "naive"):
        (tmp_path / folder / "config.json").write_bytes((base / "config.json").read_bytes())
    ids = torch.randint(0, 350, (2, 40), generator=torch.Generator().manual_seed(2))
    without_quantisation(model)
    with torch.no_grad():
        trained, merged, naive = (
            other.eval()(ids).logits
            for other in (model, *(load_base_in(tmp_path / name, torch.float32) for name in ("merged", "naive")))
        )
    assert (trained - merged).abs().max() < 1e-3
    assert (trained - naive).abs().max() > 1e-2


def test_a_base_that_does_not_fit_is_refused(base, tmp_path):
    other = make_base(tmp_path / "other", intermediate_size=192, attention_bias=True)
    with pytest.raises(UserError, match="biases on its projections"):
        quantised(other, Adapter(method="qlora"))
    (tmp_path / "other" / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(UserError, match="do not fit its config: unexpected"):
        quantised(other, Adapter(method="qlora"))


def test_without_bitsandbytes_it_is_said_what_to_install(base, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="needs bitsandbytes") as caught:
        quantised(base, Adapter(method="qlora"))
    assert "pip install 'llama-ft[qlora]'" in str(caught.value)


def test_nothing_but_projections_is_quantised(base):
    kinds = {
        name.rpartition(".")[2]
        for name, m in quantised(base, Adapter(method="qlora")).named_modules()
        if is_quantised(m)
    }
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_base_in_4_bits_comes_from_the_recipe(base):
    from llama_ft import load_recipe

    recipe = load_recipe("quickstart", [f"model.base={base}", "adapter.method=qlora", "model.dtype=bfloat16"])
    model = load_base(base, recipe, torch.float32, CPU, rows=400)
    assert is_quantised(model.model.layers[0].mlp.up_proj)
    assert isinstance(model.lm_head, nn.Linear)
    assert model.get_input_embeddings().weight.shape[0] == 400


@pytest.mark.parametrize("bits", [4, 8])
def test_generation_on_a_cpu_uses_plain_weights_and_puts_the_quantised_ones_back(base, bits):
    model = with_adapter(base, bits=bits)
    ids = torch.arange(3, 30)[None]
    before, made_of = gradients(model, ids), digest(model)
    with torch.no_grad(), unpacked(model, torch.float32):
        assert not [module for module in model.modules() if is_quantised(module) and isinstance(module, nn.Linear)]
        plain = model(input_ids=ids).logits
    with torch.no_grad():
        assert (model(input_ids=ids).logits - plain).abs().max() < (1e-4 if bits == 4 else 0.2)
    assert digest(model) == made_of
    assert torch.equal(gradients(model, ids), before)
    with pytest.raises(RuntimeError, match="torn"), unpacked(model, torch.float32):
        raise RuntimeError("torn")
    assert digest(model) == made_of
