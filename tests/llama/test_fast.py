"""Each fast path alone against its plain twin: loss, every gradient, and what the twin would not notice."""

from __future__ import annotations

import pytest
import torch

from llama_ft.adapters.fused import fused_project
from llama_ft.adapters.lora import attach_lora
from llama_ft.llama import head
from llama_ft.llama.fast import PLAIN, Fast
from llama_ft.llama.head import (
    LossHead,
    linear_cross_entropy,
    linear_cross_entropy_plain,
    linear_log_probs,
    linear_log_probs_plain,
)
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.projections import project_each
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

ONE_BY_ONE = {
    "attention": Fast(elementwise="plain", head=False, labelled_rows=False),
    "elementwise": Fast(attention="plain", head=False, labelled_rows=False),
    "head": Fast(attention="plain", elementwise="plain", labelled_rows=False),
    "labelled_rows": Fast(attention="plain", elementwise="plain", head=False),
    "labelled_rows_and_attention": Fast(elementwise="plain", head=False),
    "all": Fast(),
}
# Documents of one token, of two, a long one; the labels of each case as (first, last) per document, or none.
LENGTHS = [1, 7, 2, 40, 1, 13]
LABELS = {
    "every token": [(0, 99)] * 6,
    "answers at the end": [None, (4, 99), (1, 99), (30, 99), None, (6, 99)],
    "answers inside, first and last document silent": [None, (2, 4), None, (5, 9), None, None],
    "one token of all": [None, None, None, (20, 20), None, None],
    "none": [None] * 6,
}


def batch(labels: str) -> dict[str, torch.Tensor]:
    x = torch.randint(0, 307, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    y, bounds = torch.full_like(x, -100), [0]
    for length, span in zip(LENGTHS, LABELS[labels], strict=True):
        if span:
            part = slice(bounds[-1] + span[0], min(bounds[-1] + span[1] + 1, bounds[-1] + length))
            y[0, part] = x[0, part]
        bounds.append(bounds[-1] + length)
    return {"input_ids": x, "labels": y, "cu_seqlens": torch.tensor(bounds)}


def make(shape: str, *, lora: bool, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES[shape]).to(dtype)
    if not lora:
        return model
    model = attach_lora(model, Adapter(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide every path through B
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def loss_and_gradients(model, inputs, *, use: int = 1):
    model.zero_grad()
    loss = sum(model(**inputs, num_items_in_batch=7).loss for _ in range(use))
    if loss.requires_grad:
        loss.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), named


def llama(model):
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def same(found, expected, path: str, tolerance: float = 1e-4) -> None:
    loss, gradients = found
    loss_, gradients_ = expected
    assert abs(loss - loss_) <= 1e-5 * max(1, abs(loss_)), path
    for name in gradients.keys() | gradients_.keys():
        a = gradients.get(name, torch.zeros(1))
        b = gradients_.get(name, torch.zeros(1))
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item()), (path, name)
        if b.abs().max() > 1e-6:
            assert torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9999, (path, name)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("shape", ["llama-2-70b-like", "llama-3.2-tied"])
def test_each_path_equals_its_twin(shape, lora, labels):
    model, inputs = make(shape, lora=lora), batch(labels)
    llama(model).set_fast(PLAIN)
    llama(model).set_project(project_each)
    expected = loss_and_gradients(model, inputs)
    assert labels == "none" or expected[0] > 0
    for name, fast in ONE_BY_ONE.items():
        llama(model).set_fast(fast)
        same(loss_and_gradients(model, inputs), expected, name)
    llama(model).set_project(fused_project)
    same(loss_and_gradients(model, inputs), expected, "fused products")


def test_one_batch_used_twice_in_a_graph():
    """Backward through two uses of the same weights and inputs: nothing that was kept may have been overwritten."""
    model, inputs = make("llama-1", lora=True), batch("answers at the end")
    once, twice = loss_and_gradients(model, inputs), loss_and_gradients(model, inputs, use=2)
    assert abs(twice[0] - 2 * once[0]) <= 1e-5
    assert all(torch.allclose(twice[1][name], 2 * once[1][name], atol=1e-6) for name in once[1])


def test_no_gradient_below_the_lowest_adapter():
    """With the base frozen and adapters from layer 1 on, layer 0 is never walked backwards."""
    model, inputs = make("llama-1", lora=True), batch("answers at the end")
    layers = llama(model).layers
    for parameter in layers[0].parameters():
        parameter.requires_grad_(False)
    reached = []

    def watch(number: int):
        def hook(_module, _inputs, out):
            if out.requires_grad:
                out.register_hook(lambda _grad: reached.append(number))

        return hook

    for number, layer in enumerate(layers):
        layer.register_forward_hook(watch(number))
    model(**inputs).loss.backward()
    assert reached == [2, 1]
    assert layers[1].self_attn.q_proj.lora_A["default"].weight.grad.any()


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_fast_paths_under_autocast(lora):
    """Float32 weights, products in bfloat16: the residual stream stays float32, and nothing meets in two types.

    How precise it is, test_model.py asks of a real model; here a wrong type or scale would show as a factor.
    """
    model, inputs = make("llama-2-70b-like", lora=lora), batch("answers at the end")
    streams = []
    for layer in llama(model).layers:
        layer.register_forward_hook(lambda _module, _inputs, out: streams.append(out.dtype))
    exact = loss_and_gradients(model, inputs)
    gaps = []
    for fast, projection in ((PLAIN, project_each), (Fast(), fused_project)):
        streams.clear()
        llama(model).set_fast(fast)
        llama(model).set_project(projection)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = loss_and_gradients(model, inputs)
        assert streams == [torch.float32] * 3
        gaps.append(sum((gradients[name] - exact[1][name]).norm() for name in exact[1]).item() + abs(loss - exact[0]))
    assert 0 < gaps[1] <= 1.5 * gaps[0]


def test_last_layer_computes_labelled_rows_only():
    model, inputs = make("llama-1", lora=True), batch("answers inside, first and last document silent")
    wanted = int((inputs["labels"] != -100).sum())
    seen = []
    for layer in llama(model).layers:
        layer.mlp.register_forward_hook(lambda _module, args, _out: seen.append(len(args[0])))
    model(**inputs)
    assert seen == [64, 64, wanted]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("each", [False, True], ids=["loss", "log_probs"])
def test_loss_head_in_bfloat16_is_no_worse_than_its_twin(each, trainable, autocast):
    """Beside float64: the gradient of confident tokens, whose 1 − p bfloat16 cannot hold, must survive."""
    fast, plain = (
        (linear_log_probs, linear_log_probs_plain) if each else (linear_cross_entropy, linear_cross_entropy_plain)
    )
    torch.manual_seed(0)
    weight = torch.randn(307, 48, dtype=torch.float64) / 4
    targets = torch.randint(0, 307, (64,))
    hidden = weight[targets] * torch.linspace(0, 8, 64, dtype=torch.float64)[:, None]  # p from 1/307 to nearly 1
    found = {}
    for name, dtype, function in (
        ("exact", torch.float64, plain),
        ("twin", torch.bfloat16, plain),
        ("fast", torch.bfloat16, fast),
    ):
        kept = torch.float32 if autocast and name != "exact" else dtype
        h = hidden.bfloat16().to(kept).requires_grad_()
        w = weight.bfloat16().to(kept).requires_grad_(trainable)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast and name != "exact"):
            loss = function(h, w, targets)
        loss.sum().backward()
        assert h.grad.dtype == kept
        found[name] = (loss.detach().double(), h.grad.double(), w.grad.double() if trainable else torch.zeros(1))
    for which in range(3):
        exact, twin, fast = (found[name][which] for name in ("exact", "twin", "fast"))
        assert (fast - exact).norm() <= 1.1 * (twin - exact).norm() + 1e-3 * exact.norm()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_log_probs])
def test_loss_head_holds_no_logits(function, trained, monkeypatch):
    """3,000 labelled tokens of a 32,000-token vocabulary: 384 MB of logits that never exist."""
    monkeypatch.setattr(head, "CHUNK_BYTES", {"cpu": 8 * 2**20})
    hidden, weight = torch.randn(3000, 16, requires_grad=True), torch.randn(32_000, 16)
    targets = torch.randint(0, 32_000, (3000,))
    weight.requires_grad_(trained)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest.append(out.untyped_storage().nbytes())
            return out

    with Watch():
        function(hidden, weight, targets).sum().backward()
    assert max(largest) <= 8 * 2**20


def test_a_resized_head_still_answers_with_the_loss():
    model = make("llama-1", lora=False)
    model.resize_token_embeddings(320)
    assert isinstance(model.lm_head, LossHead)
    assert model(**batch("every token")).loss.item() > 0
