"""Prompts that are computed once for all their ends: log-probabilities and gradients beside Hugging Face's LLaMA on
whole documents, over every kernel, with and without adapters; and the layout's own mistakes.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM as Reference

from llama_ft.adapters.lora import attach_lora
from llama_ft.llama.fast import PLAIN, Fast
from llama_ft.llama.model import LlamaForCausalLM, TokenOutput
from llama_ft.llama.packing import Packing
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

# (length of the prompt, lengths of its ends); a prompt of 0 is a document that shares nothing.
GROUPS: list[tuple[int, list[int]]] = [(9, [5, 1, 12]), (1, [4, 2]), (0, [11]), (20, [3, 7, 1, 2]), (6, [8])]
SHAPE = "llama-2-70b-like"


@dataclass
class Layout:
    """Documents [(ids, first labelled index)], and how the model is asked about all their labelled tokens."""

    documents: list[tuple[Tensor, int]]
    inputs: dict[str, Tensor]
    rows_of: list[slice]


def lay_out(
    groups: list[tuple[int, list[int]]] = GROUPS, *, shared: bool = True, leave_out: int | None = None
) -> Layout:
    """The groups' documents with their prompts once (`shared`) or copied; leave_out: the number of one without end."""
    generator = torch.Generator().manual_seed(5)

    def draw(length: int) -> Tensor:
        return torch.randint(3, 307, (length,), generator=generator)

    documents, segments, prompts, rows, targets, rows_of = [], [], [], [], [], []
    place = 0
    for prompt_length, ends in groups:
        prompt, began, number = draw(prompt_length), place, len(segments)
        drawn = [draw(length) for length in ends]
        if shared and prompt_length:
            segments.append(prompt)
            prompts.append(-1)
            place += prompt_length
        for end in drawn:
            first = prompt_length or 4  # the labels of a whole document begin somewhere inside
            whole = torch.cat([prompt, end])
            if len(documents) != leave_out:
                alone = not (shared and prompt_length)
                before = place + first - 1 if alone else began + prompt_length - 1
                rest = torch.arange(len(whole) - first - 1) + (place + first if alone else place)
                rows_of.append(slice(len(targets), len(targets) + len(whole) - first))
                rows += [before, *rest.tolist()]
                targets += whole[first:].tolist()
                segments.append(whole if alone else end)
                prompts.append(-1 if alone else number)
                place += len(segments[-1])
            documents.append((whole, first))
    lengths = torch.tensor([0, *map(len, segments)])
    inputs = {
        "input_ids": torch.cat(segments)[None],
        "cu_seqlens": lengths.cumsum(0).int(),
        "shared": torch.tensor(prompts, dtype=torch.int32),
        "rows": torch.tensor(rows),
        "targets": torch.tensor(targets),
    }
    return Layout(documents, inputs, rows_of)


def weights(count: int) -> Tensor:
    """What each token's log-probability is multiplied with in a loss: both signs, unlike each other."""
    return torch.randn(count, generator=torch.Generator().manual_seed(9))


def reference(model, layout: Layout, temperature: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(log-probabilities, gradients of their weighted sum): each document whole and alone."""
    model.zero_grad()
    found = []
    for ids, first in layout.documents:
        logits = model(ids[None]).logits[0, first - 1 : -1] / temperature
        found.append(torch.log_softmax(logits, -1).gather(-1, ids[first:, None]).squeeze(-1))
    log_probs = torch.cat(found)
    (log_probs * weights(len(log_probs))).sum().backward()
    return log_probs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(model, layout: Layout, **asked) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = model(**layout.inputs, **asked)
    assert isinstance(out, TokenOutput)
    assert out.log_probs.dtype == torch.float32
    (out.log_probs * weights(len(out.log_probs))).sum().backward()
    return out.log_probs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found, expected, tolerance: float = 1e-5) -> None:
    assert (found[0] - expected[0]).abs().max() <= tolerance
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.any(), name
        assert (found[1][name] - gradient).abs().max() <= tolerance * max(1.0, gradient.abs().max().item()), name


def make(shape: str = SHAPE, *, lora: bool = False, trained_head: bool = True, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = LlamaForCausalLM(SHAPES[shape]).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "mlp" not in name:
                parameter.mul_(6)  # attention that looks at some more than at others, probabilities that differ
    model.lm_head.weight.requires_grad_(trained_head)
    if not lora:
        return model
    model = attach_lora(model, Adapter(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def llama(model) -> LlamaForCausalLM:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.fixture(scope="module")
def expected():
    """Hugging Face's on the same weights, by shape and temperature."""
    kept = {}

    def of(shape: str, temperature: float):
        if (shape, temperature) not in kept:
            model = Reference(SHAPES[shape])
            model.load_state_dict(make(shape).state_dict())
            kept[shape, temperature] = reference(model, lay_out(), temperature)
        return kept[shape, temperature]

    return of


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copies"])
@pytest.mark.parametrize("fast", [Fast(), Fast(attention="plain"), Fast(labelled_rows=False), PLAIN], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, "llama-3.2-tied"])
def test_equal_to_whole_documents_in_transformers(shape, fast, shared, temperature, expected):
    model = make(shape)
    model.model.set_fast(fast)
    same(ours(model, lay_out(shared=shared), temperature=temperature), expected(shape, temperature))


def test_a_frozen_head(expected):
    log_probs, gradients = expected(SHAPE, 1.0)
    rest = {name: gradient for name, gradient in gradients.items() if name != "lm_head.weight"}
    same(ours(make(trained_head=False), lay_out()), (log_probs, rest))


def test_flex_without_gradients(expected):
    model = make()
    for rows in (True, False):
        model.model.set_fast(Fast(attention="flex", labelled_rows=rows))
        with torch.no_grad():
            log_probs = model(**lay_out().inputs).log_probs
        assert not log_probs.requires_grad
        assert (log_probs - expected(SHAPE, 1.0)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_on_a_frozen_base(checkpointing):
    """Beside the same adapters on whole documents, their logits by autograd alone."""
    model, layout = make(lora=True), lay_out()
    llama(model).model.set_fast(PLAIN)
    expected = reference(model, layout)
    assert all("lora_" in name for name in expected[1])
    llama(model).model.set_fast(Fast())
    if checkpointing:
        model.train()
        llama(model).gradient_checkpointing_enable({"use_reentrant": False})
    same(ours(model, layout), expected)


def test_gradient_checkpointing_of_all_weights(expected):
    model = make().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    same(ours(model, lay_out()), expected(SHAPE, 1.0))


def test_ends_that_do_not_see_their_prompt_would_differ(expected):
    """The comparison can fail: by a prompt that is not seen, by one that is another's, by positions that start anew."""
    model, inputs = make().eval(), lay_out().inputs
    blind = inputs | {"shared": torch.full_like(inputs["shared"], -1)}
    positions = torch.cat([torch.arange(n) for n in inputs["cu_seqlens"].diff().tolist()])[None]
    others = inputs | {"shared": torch.where(inputs["shared"] == 0, 4, inputs["shared"])}
    with torch.no_grad():
        for wrong in (blind, others, inputs | {"position_ids": positions}):
            assert (model(**wrong).log_probs - expected(SHAPE, 1.0)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("number", [0, 1, 4, 8])
def test_an_end_does_not_know_of_its_neighbours(number):
    """Without one end the log-probabilities of all others are what they were."""
    model = make()
    whole, without = lay_out(), lay_out(leave_out=number)
    with torch.no_grad():
        before, after = (model(**layout.inputs).log_probs for layout in (whole, without))
    kept = [i for i in range(len(whole.documents)) if i != number]
    for i, part in zip(kept, without.rows_of, strict=True):
        assert (before[whole.rows_of[i]] - after[part]).abs().max() <= 1e-6, i


def test_rows_in_any_order_and_more_than_once(expected):
    model, layout = make(), lay_out()
    order = torch.randperm(len(layout.inputs["rows"]), generator=torch.Generator().manual_seed(0)).repeat(2)
    inputs = layout.inputs | {name: layout.inputs[name][order] for name in ("rows", "targets")}
    log_probs = model(**inputs).log_probs
    assert (log_probs - expected(SHAPE, 1.0)[0][order]).abs().max() <= 1e-5
    loss = (log_probs * weights(len(order) // 2)[order]).sum() / 2
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    same((expected(SHAPE, 1.0)[0], gradients), expected(SHAPE, 1.0))


def test_bfloat16_is_as_near_as_copied_prompts():
    """16-bit weights and products: merging two softmaxes loses no more than one over all keys."""
    exact = make().to(torch.bfloat16).float()
    expected = reference(exact, lay_out(shared=False))
    gaps = []
    for shared in (True, False):
        found = ours(make(dtype=torch.bfloat16), lay_out(shared=shared))
        gap = (found[0] - expected[0]).norm() / expected[0].norm()
        off = [(found[1][name].float() - g).norm() / g.norm() for name, g in expected[1].items()]
        gaps.append(torch.stack([gap, torch.stack(off).mean()]))
    assert (gaps[0] <= 1.1 * gaps[1] + 1e-3).all(), gaps
    assert gaps[1].max() < 0.3


def test_nothing_is_asked():
    model = make(lora=True)
    empty = torch.zeros(0, dtype=torch.long)
    out = model(**lay_out().inputs | {"rows": empty, "targets": empty})
    assert out.log_probs.shape == (0,)
    out.log_probs.sum().backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
def test_hidden_states_of_a_padded_batch():
    """Rows count tokens of the batch as it was given, with its padding; a row of padding is refused."""
    model = make().model
    x = torch.randint(3, 307, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    whole = model(x, attention_mask=mask).last_hidden_state.flatten(0, 1)
    rows = torch.tensor([10, 6, 2, 10])
    assert (model.hidden_of(x, rows, attention_mask=mask) - whole[rows]).abs().max() <= 1e-5
    for row in (0, 11, 13):
        with pytest.raises(ValueError, match="padding"):
            model.hidden_of(x, torch.tensor([3, row]), attention_mask=mask)


def test_positions_go_on_where_the_prompt_stops():
    packing = Packing.of(1, 5, None, None, [0, 2, 4, 5], torch.device("cpu"), [-1, 0, 0])
    assert packing.positions.tolist() == [0, 1, 2, 3, 2]
    assert packing.shared == [-1, 0, 0]
    assert Packing.of(1, 5, None, None, [0, 2, 5], torch.device("cpu"), [-1, -1]).shared is None


@pytest.mark.parametrize("shared", [[-1, 0], [-1, 0, 3], [-1, -2, 0], [-1, 0, 1], [-1, 0, 2]])
def test_a_wrong_layout_is_refused(shared):
    x = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="shared"):
        make().model(x, cu_seqlens=[0, 2, 4, 5], shared=shared)


def test_what_does_not_go_together_is_refused():
    model, inputs = make(), lay_out().inputs
    with pytest.raises(ValueError, match="rows"):
        model(**inputs | {"rows": None})
    with pytest.raises(ValueError, match="labels"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="shared"):
        asked = inputs | {"targets": None, "rows": None}
        model(**asked, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(**inputs | {"cu_seqlens": None})
    dynamic = SHAPES["llama-1"].__class__(
        **SHAPES["llama-1"].to_dict() | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    )
    with pytest.raises(ValueError, match="dynamic"):
        LlamaForCausalLM(dynamic)(**inputs)
