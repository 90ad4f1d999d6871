"""New weights: their statistics, their seed, the loss they give; rows for added tokens."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Reference

from llama_ft.llama import init
from llama_ft.llama.init import initial_weights, resize_embeddings, weight_shapes
from llama_ft.llama.load import build_random, load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.shapes import PRESETS

EXPECTED = [
    [0.005991125945001841, 0.004847555886954069, 0.005664147902280092],
    [-0.0008793941815383732, 0.005323310848325491, -0.011003748513758183],
]
"""The first values of two tensors of a `tiny` with seed 42."""


def config_of(*, tied: bool = False, **changes) -> LlamaConfig:
    """Wide enough for statistics: 128 features, 8 layers, 1,000 tokens."""
    shape = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    return LlamaConfig(**shape | heads | {"tie_word_embeddings": tied} | changes)


def test_statistics_of_each_tensor():
    config = config_of(attention_bias=True)
    for name, weight in initial_weights(config, seed=0):
        assert weight.dtype == torch.float32
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        else:
            std = 0.02 / math.sqrt(16) if "o_proj" in name or "down_proj" in name else 0.02
            error = 4 / math.sqrt(2 * weight.numel())  # four standard errors of a standard deviation
            assert float(weight.std()) == pytest.approx(std, rel=error), name
            assert abs(float(weight.mean())) < 4 * std / math.sqrt(weight.numel()), name
            kurtosis = float(((weight / std) ** 4).mean())
            assert kurtosis == pytest.approx(3, abs=4 * math.sqrt(96 / weight.numel())), name  # normal, not uniform


def test_the_configs_own_range_is_used():
    weights = dict(initial_weights(config_of(initializer_range=0.05), seed=0))
    assert float(weights["model.embed_tokens.weight"].std()) == pytest.approx(0.05, rel=0.02)
    assert float(weights["model.layers.3.mlp.down_proj.weight"].std()) == pytest.approx(0.05 / 4, rel=0.02)


def test_every_tensor_is_its_own():
    """No two matrices share their numbers, whatever pieces they were drawn in."""
    firsts = [float(w.flatten()[0]) for n, w in initial_weights(config_of(), 0) if "norm" not in n]
    assert len(set(firsts)) == len(firsts) == 2 + 8 * 7


@pytest.mark.parametrize("tied", [False, True])
def test_loss_of_a_new_model(tied):
    """ln(V) + hidden · σ² / 2: logits are normal with a variance of hidden · σ²."""
    config = config_of(tied=tied)
    model = build_random(config, seed=3)
    ids = torch.randint(0, 1000, (8, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss == pytest.approx(math.log(1000) + 128 * 0.02**2 / 2, abs=0.02)


def test_the_seed_decides_and_nothing_else(monkeypatch):
    config = config_of(tied=True)
    first, again, other = (build_random(config, seed) for seed in (5, 5, 6))
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert "norm" in name or not torch.equal(a, c)
    torch.manual_seed(99)
    assert torch.equal(build_random(config, 5).lm_head.weight, first.lm_head.weight)
    state = torch.get_rng_state()
    build_random(config, 5)
    assert torch.equal(torch.get_rng_state(), state), "the program's own random numbers are left alone"
    narrow = build_random(config, 5, torch.bfloat16)
    assert torch.equal(narrow.lm_head.weight, first.lm_head.weight.bfloat16())
    monkeypatch.setattr(init, "_CHUNK", 1024)
    chunked = build_random(config, 5)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), chunked.parameters(), strict=True))


def test_the_weights_are_these_on_every_machine():
    """Written down once: a change of torch's generator, or of the order of the tensors, would show here."""
    weights = dict(initial_weights(LlamaConfig(**PRESETS["tiny"].config_dict()), seed=42))
    names = ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight")
    found = [weights[name].flatten()[:3].tolist() for name in names]
    assert found == EXPECTED


def test_they_do_not_depend_on_the_width_of_the_cpus_kernels():
    code = (
        "import torch; from transformers import LlamaConfig\n"
        "from llama_ft.llama.init import initial_weights\nfrom llama_ft.llama.shapes import PRESETS\n"
        "total = 0\n"
        "for name, w in initial_weights(LlamaConfig(**PRESETS['tiny'].config_dict()), 1):\n"
        "    total = (total * 31 + int(w.view(torch.int32).long().sum())) % (2**61 - 1)\n"
        "print(torch.backends.cpu.get_cpu_capability(), total)"
    )
    seen = []
    for capability in ("default", "avx2"):
        environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        seen.append(done.stdout.split())
    assert seen[0][1] == seen[1][1], seen


@pytest.mark.parametrize("tied", [False, True])
def test_build_random_is_an_ordinary_model(tied, tmp_path):
    config = config_of(tied=tied)
    model = build_random(config, 0)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == weight_shapes(config)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    reopened = Reference.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(reopened(ids).logits, model(ids).logits, atol=1e-5)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_added_tokens_are_the_mean_of_the_others(tied, dtype, tmp_path):
    model = build_random(config_of(tied=tied, initializer_range=0.2), 0, dtype)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        before = model(ids).logits
        old = [weight.clone() for weight in (model.model.embed_tokens.weight, model.lm_head.weight)]
    resize_embeddings(model, 1003)
    for weight, rows in zip((model.model.embed_tokens.weight, model.lm_head.weight), old, strict=True):
        assert weight.shape == (1003, 128)
        assert weight.dtype == dtype
        assert torch.equal(weight[:1000], rows)
        mean = rows.double().mean(0)
        for row in weight[1000:]:
            assert torch.allclose(row.double(), mean, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == 1003
    with torch.no_grad():
        after = model(ids).logits
    assert torch.equal(after[..., :1000], before)
    # The logit of a mean row is the mean of the logits.
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    means = before.float().mean(-1, keepdim=True).expand(-1, -1, 3)
    assert torch.allclose(after[..., 1000:].float(), means, atol=tolerance)
    model.save_pretrained(tmp_path)
    ours, plain = load_model(tmp_path, dtype), Reference.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, after)
        if dtype == torch.float32:
            assert torch.allclose(plain(ids).logits, after, atol=1e-4)
    assert plain.config.vocab_size == 1003
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)


def test_added_tokens_train():
    model = build_random(config_of(), 0)
    resize_embeddings(model, 1001)
    ids = torch.tensor([[1000, 5, 1000, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[1000].any()
    assert model.lm_head.weight.grad[1000].any()


def test_resizing_to_the_same_size_and_to_a_smaller_one():
    model = build_random(config_of(), 0)
    before = model.lm_head.weight
    resize_embeddings(model, 1000)
    assert model.lm_head.weight is before
    with pytest.raises(ValueError, match="cannot shrink"):
        resize_embeddings(model, 999)


def test_a_freshly_constructed_model_has_norms_of_one():
    """transformers' own road, `LlamaForCausalLM(config)`, stays as it is: every matrix with the plain range."""
    model = LlamaForCausalLM(config_of())
    assert torch.equal(model.model.norm.weight, torch.ones(128))
    assert float(model.model.layers[0].mlp.down_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
