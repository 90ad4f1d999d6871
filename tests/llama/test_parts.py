"""The parts one by one: loss head, norms, SwiGLU, rotation, loading, the choice of a compute type."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llama_ft.errors import UserError
from llama_ft.llama import head
from llama_ft.llama.head import (
    linear_cross_entropy,
    linear_cross_entropy_plain,
    linear_log_probs,
    linear_log_probs_plain,
    shift_labels,
)
from llama_ft.llama.load import choose_compute_dtype, load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.ops import ELEMENTWISE, rms_norm, swiglu
from llama_ft.llama.rope import RotaryEmbedding, rotate, rotate_
from tests.llama.conftest import LLAMA_31_ROPE, SHAPES


@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("frozen", [True, False])
def test_loss_head_equals_its_plain_twin(rows, frozen, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 307 * 5})  # five rows a chunk: borders inside the batch
    torch.manual_seed(0)
    hidden = torch.randn(rows, 48)
    weight = torch.randn(307, 48)
    targets = torch.randint(0, 307, (rows,))
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_plain):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        loss = function(h, w, targets) * 0.37
        loss.backward()
        results.append((loss.detach(), h.grad, w.grad))
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    if frozen:
        assert results[0][2] is None
    else:
        assert torch.allclose(results[0][2], results[1][2], atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [0, 1, 7, 64])
@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_log_probs_equal_their_plain_twin(rows, trained, temperature, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 4 * 307 * 5})
    torch.manual_seed(0)
    hidden, weight = torch.randn(rows, 48), torch.randn(307, 48)
    targets, scale = torch.randint(0, 307, (rows,)), torch.randn(rows)
    results = []
    for function in (linear_log_probs, linear_log_probs_plain):
        h, w = hidden.clone().requires_grad_(trained != "weight"), weight.clone().requires_grad_(trained != "hidden")
        log_probs = function(h, w, targets, temperature)
        (log_probs * scale).sum().backward()
        results.append((log_probs.detach(), *(t.grad for t in (h, w) if t.requires_grad)))
    assert results[0][0].dtype == torch.float32
    assert all(torch.allclose(a, b, atol=2e-5, rtol=1e-6) for a, b in zip(*results, strict=True))


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("trained", "forward", "backward"), [("nothing", 1, 0), ("hidden", 2, 0), ("weight", 1, 2), ("both", 1, 3)]
)
def test_products_that_log_probs_cost(trained, forward, backward):
    """A frozen head makes its gradient with the logits, once; a trained one makes the logits again."""
    hidden = torch.randn(9, 16, requires_grad=trained in ("hidden", "both"))
    weight = torch.randn(307, 16, requires_grad=trained in ("weight", "both"))
    with Products() as products:
        log_probs = linear_log_probs(hidden, weight, torch.arange(9))
        assert products.count == forward
        if log_probs.requires_grad:
            log_probs.sum().backward()
        assert products.count == forward + backward
    with Products() as products, torch.no_grad():
        assert torch.allclose(linear_log_probs(hidden, weight, torch.arange(9)), log_probs)
    assert products.count == 1


def test_loss_head_makes_no_gradient_in_an_evaluation():
    """One product, that of the logits, though the weight is trained; with gradients there are three."""
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(307, 16, requires_grad=True)
    with Products() as products:
        with torch.no_grad():
            loss = linear_cross_entropy(hidden, weight, torch.arange(9))
        assert products.count == 1
        linear_cross_entropy(hidden, weight, torch.arange(9))
        assert products.count == 1 + 3
    assert torch.allclose(loss, linear_cross_entropy_plain(hidden, weight, torch.arange(9)))


@pytest.mark.parametrize("trained", [False, True])
def test_log_probs_survive_a_second_backward(trained):
    h, w = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=trained)
    log_probs = linear_log_probs(h, w, torch.arange(5))
    (first,) = torch.autograd.grad(log_probs.sum(), h, retain_graph=True)
    (second,) = torch.autograd.grad(2 * log_probs.sum(), h)
    assert torch.allclose(second, 2 * first)


def test_loss_head_survives_a_second_backward():
    h = torch.randn(5, 8, requires_grad=True)
    loss = linear_cross_entropy(h, torch.randn(11, 8), torch.arange(5))
    (first,) = torch.autograd.grad(loss, h, retain_graph=True)
    (second,) = torch.autograd.grad(2 * loss, h)
    assert torch.allclose(second, 2 * first)


def test_labels_shift_within_documents():
    labels = torch.tensor([1, 2, 3, 4, 5, 6])
    assert shift_labels(labels, [0, 2, 3, 6]).tolist() == [2, -100, -100, 5, 6, -100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype):
    torch.manual_seed(0)
    x = torch.randn(9, 64).to(dtype).requires_grad_()
    weight = torch.rand(64).to(dtype).requires_grad_()
    y = rms_norm(x, weight, 1e-5)
    x2, weight2 = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    wide = x2.float()
    expected = weight2 * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(dtype)
    assert torch.allclose(y, expected, atol=1e-6 if dtype == torch.float32 else 2e-2)
    seed = torch.randn_like(y)
    y.backward(seed)
    expected.backward(seed)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(x.grad, x2.grad, atol=tolerance)
    assert torch.allclose(weight.grad, weight2.grad, atol=4 * tolerance, rtol=2e-2)


def test_swiglu_gradient():
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, (x,))
    gate, up = x.chunk(2, -1)
    assert torch.equal(swiglu(x), F.silu(gate) * up)


def test_rotation_in_place_and_back():
    heads = torch.randn(10, 3, 16)
    rotary = RotaryEmbedding(LlamaConfig(hidden_size=48, num_attention_heads=3))
    cos, sin = rotary(torch.arange(10) * 100, torch.float32)
    turned = rotate_(heads.clone(), cos, sin)
    assert torch.allclose(turned, rotate(heads, cos, sin))
    assert torch.allclose(rotate_(turned.clone(), cos, -sin), heads, atol=1e-5)
    assert torch.allclose(turned.norm(dim=-1), heads.norm(dim=-1), atol=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        LLAMA_31_ROPE,
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_frequencies_are_transformers_own(scaling):
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=scaling, max_position_embeddings=256)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, None)
    rotary = RotaryEmbedding(config)
    assert torch.equal(rotary.inv_freq, expected)
    assert rotary.attention_scaling == factor


def test_frequencies_stay_float32_in_a_bfloat16_model():
    model = LlamaForCausalLM(SHAPES["llama-1"]).to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    expected = RotaryEmbedding(SHAPES["llama-1"]).inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, expected)


def test_loaded_frequencies_are_real(tmp_path):
    """from_pretrained builds on the meta device; a buffer that no file holds must not come out of it as noise."""
    LlamaForCausalLM(SHAPES["llama-3.1"]).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.bfloat16)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, RotaryEmbedding(SHAPES["llama-3.1"]).inv_freq)


def test_rounded_weights_in_a_wider_type(tmp_path):
    LlamaForCausalLM(SHAPES["llama-1"]).save_pretrained(tmp_path)
    narrow = load_model(tmp_path, torch.bfloat16)
    wide = load_model(tmp_path, torch.bfloat16, compute_dtype=torch.float32)
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.float32
        assert torch.equal(a.float(), b)


def test_float16_never_computes_on_a_cpu():
    cpu = torch.device("cpu")
    assert choose_compute_dtype(torch.float16, cpu) == torch.float32
    assert choose_compute_dtype(torch.float32, cpu) == torch.float32
    assert choose_compute_dtype(torch.bfloat16, cpu) in (torch.float32, torch.bfloat16)
    assert choose_compute_dtype(torch.float16, torch.device("cuda")) == torch.float16


def test_missing_and_misshapen_tensors_are_refused(tmp_path):
    LlamaForCausalLM(SHAPES["llama-1"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_model(tmp_path, torch.float32)
    save_file({**tensors, name: whole[:5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=name):
        load_model(tmp_path, torch.float32)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="gpt2"):
        load_model(tmp_path, torch.float32)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_norm_and_swiglu_equal_their_twins_and_compile_once():
    """Any number of tokens after the first: no second compilation, in training as in evaluation."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for tokens in (7, 64, 129, 33):
        results = []
        for name in ("compiled", "plain"):
            norm, swiglu_ = ELEMENTWISE[name]
            torch.manual_seed(tokens)
            x, weight = torch.randn(tokens, 32, requires_grad=True), torch.rand(32, requires_grad=True)
            y = swiglu_(norm(x, weight, 1e-5))
            y.square().sum().backward()
            results.append((y.detach(), x.grad, weight.grad))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
