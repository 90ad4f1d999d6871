"""Answers in micro-batches: the layout to the token, what each answer sees, and the way back to whole documents."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from llama_ft.data.ends import JudgedCollator, PairCollator, end_lengths, ends_of, lay_groups, lay_out, per_end
from llama_ft.data.render import MASKED
from llama_ft.data.shared import in_common

X = MASKED
# Prompt 11 12, chosen 13 14 and an unlabelled newline 19, rejected 15.
PAIR = {
    "input_ids": [11, 12, 13, 14, 19],
    "labels": [X, X, 13, 14, X],
    "rejected_ids": [11, 12, 15],
    "rejected_labels": [X, X, 15],
    "margin": 1.5,
    "source": 0,
    "row": 7,
    "part": 0,
}
# Both answers begin with 24, and the chosen one has a masked stretch inside (a tool's result).
SECOND = {
    "input_ids": [21, 22, 23, 24, 25, 26, 27],
    "labels": [X, X, X, 24, X, X, 27],
    "rejected_ids": [21, 22, 23, 24, 28],
    "rejected_labels": [X, X, X, 24, 28],
    "margin": None,
    "source": 0,
    "row": 9,
    "part": 0,
}
SILENT = {
    "input_ids": [0, 0],
    "labels": [X, X],
    "rejected_ids": [0, 0],
    "rejected_labels": [X, X],
    "margin": 0.0,
    "source": 0,
    "row": 0,
    "part": 0,
}
KINDS = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "cu_seqlens": torch.int32,
    "shared": torch.int32,
    "rows": torch.int64,
    "targets": torch.int64,
    "ends": torch.int32,
    "last": torch.int64,
    "documents": torch.int64,
}


def plain(batch: dict[str, Any]) -> dict[str, list[Any]]:
    """The layout as lists, [1, T] as [T]; its types are right."""
    assert {name: batch[name].dtype for name in KINDS} == KINDS
    assert batch["input_ids"].shape == batch["position_ids"].shape == (1, batch["cu_seqlens"][-1])
    return {name: batch[name].flatten().tolist() for name in KINDS}


def documents_of(pairs: list[dict[str, Any]]) -> list[tuple[int, list[int], list[int]]]:
    return [
        (number, pair[ids], pair[labels])
        for number, pair in enumerate(pairs)
        for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
    ]


def read_back(batch: dict[str, Any]) -> list[tuple[int, list[int], list[int]]]:
    return [(end.document, end.ids.tolist(), end.labels.tolist()) for end in ends_of(batch)]


def random_pairs(seed: int, count: int) -> list[dict[str, Any]]:
    """Pairs with prompts of 1 to 6 tokens, answers of 1 to 5 that may begin alike, and masked tokens in them."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = rng.integers(1, 60, rng.integers(1, 7)).tolist()
        pair = {}
        for ids, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
            answer = rng.integers(1, 4, rng.integers(1, 6)).tolist()
            kept = rng.random(len(answer)) < 0.7
            kept[rng.integers(len(answer))] = True
            pair[ids] = prompt + answer
            pair[labels] = [X] * len(prompt) + np.where(kept, answer, X).tolist()
        pairs.append(pair)
    return pairs


# --- the layout ------------------------------------------------------------------------------------------------------


def test_a_pair_laid_out_with_its_prompt_once() -> None:
    batch = PairCollator(share=True)([PAIR])
    assert plain(batch) == {
        "input_ids": [11, 12, 13, 14, 19, 15],
        "position_ids": [0, 1, 2, 3, 4, 2],
        "cu_seqlens": [0, 2, 5, 6],
        "shared": [-1, 0, 0],
        "rows": [1, 2, 1],
        "targets": [13, 14, 15],
        "ends": [0, 2, 3],
        "last": [4, 5],
        "documents": [0, 0],
    }
    assert batch["margin"].tolist() == [1.5] and batch["origins"] == [(0, 7, 0)]


def test_a_pair_laid_out_plain() -> None:
    assert plain(PairCollator(share=False)([PAIR])) == {
        "input_ids": [11, 12, 13, 14, 19, 11, 12, 15],
        "position_ids": [0, 1, 2, 3, 4, 0, 1, 2],
        "cu_seqlens": [0, 5, 8],
        "shared": [-1, -1],
        "rows": [1, 2, 6],
        "targets": [13, 14, 15],
        "ends": [0, 2, 3],
        "last": [4, 7],
        "documents": [0, 0],
    }


def test_a_second_pair_goes_on_behind_the_first() -> None:
    """The split stands before the first labelled token, though both answers begin alike."""
    batch = PairCollator(share=True)([PAIR, SECOND])
    assert plain(batch) == {
        "input_ids": [11, 12, 13, 14, 19, 15, 21, 22, 23, 24, 25, 26, 27, 24, 28],
        "position_ids": [0, 1, 2, 3, 4, 2, 0, 1, 2, 3, 4, 5, 6, 3, 4],
        "cu_seqlens": [0, 2, 5, 6, 9, 13, 15],
        "shared": [-1, 0, 0, -1, 3, 3],
        "rows": [1, 2, 1, 8, 11, 8, 13],
        "targets": [13, 14, 15, 24, 27, 24, 28],
        "ends": [0, 2, 3, 5, 7],
        "last": [4, 5, 12, 14],
        "documents": [0, 0, 1, 1],
    }
    assert batch["margin"].dtype == torch.float32
    assert batch["margin"][0] == 1.5 and batch["margin"][1].isnan()  # not rated
    assert batch["origins"] == [(0, 7, 0), (0, 9, 0)]
    assert "margin" not in PairCollator(share=True)([{**PAIR}, {k: v for k, v in SECOND.items() if k != "margin"}])


@pytest.mark.parametrize("share", [True, False])
def test_a_silent_pair_has_ends_without_rows(share: bool) -> None:
    batch = PairCollator(share=share)([PAIR, SILENT])
    alone = PairCollator(share=share)([PAIR])
    for name in ("rows", "targets"):
        assert torch.equal(batch[name], alone[name])
    assert end_lengths(batch["ends"]).tolist() == [2, 1, 0, 0]
    assert batch["cu_seqlens"].diff().min() > 0  # no segment is empty
    assert PairCollator(share=share)([SILENT])["rows"].tolist() == []


def test_ends_that_share_nothing_stand_whole() -> None:
    """With loss from the first token on, and with prompts that differ from the first token on."""
    everything = {"input_ids": [1, 2], "labels": [1, 2], "rejected_ids": [1, 3], "rejected_labels": [1, 3]}
    apart = {"input_ids": [1, 2], "labels": [X, 2], "rejected_ids": [4, 3], "rejected_labels": [X, 3]}
    batch = plain(PairCollator(share=True)([everything, apart]))
    assert batch["shared"] == [-1] * 4 and batch["cu_seqlens"] == [0, 2, 4, 6, 8]
    assert batch["targets"] == [2, 3, 2, 3]  # nothing predicts a document's first token
    assert batch["rows"] == [0, 2, 4, 6] and batch["position_ids"] == [0, 1] * 4


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        (([1, 2, 3, 4], [X, X, 3, 4], [1, 2, 3, 5], [X, X, 3, 5]), 2),
        (([1, 2, 3, 4], [X, X, X, 4], [1, 2, 5], [X, X, 5]), 2),  # a masked token of the answer differs
        (([1, 2, 3], [X, X, 3], [1, 2, 3, 4], [X, X, X, 4]), 2),  # one is the other's start
        (([1, 2], [X, X], [1, 2], [X, X]), 1),  # an end is never empty
        (([1], [X], [1], [X]), 0),
        (([], [], [], []), 0),  # dropped before it was tokenised
    ],
)
def test_what_two_documents_have_in_common(sides: tuple[list[int], ...], expected: int) -> None:
    better, worse = sides[:2], sides[2:]
    assert in_common(*map(np.array, (*better, *worse))) == in_common(*map(np.array, (*worse, *better))) == expected


def test_sampled_answers_of_several_prompts() -> None:
    groups = [([1, 2], [[5], [6, 7], [5]]), ([3], [[8, 9]])]
    assert plain(lay_out(groups, share=True)) == {
        "input_ids": [1, 2, 5, 6, 7, 5, 3, 8, 9],
        "position_ids": [0, 1, 2, 2, 3, 2, 0, 1, 2],
        "cu_seqlens": [0, 2, 3, 5, 6, 9],
        "shared": [-1, 0, 0, 0, -1],  # an answer alone needs no prompt apart
        "rows": [1, 1, 3, 1, 6, 7],
        "targets": [5, 6, 7, 5, 8, 9],
        "ends": [0, 1, 3, 4, 6],
        "last": [2, 4, 5, 8],
        "documents": [0, 0, 0, 1],
    }
    apart = plain(lay_out(groups, share=False))
    assert apart["input_ids"] == [1, 2, 5, 1, 2, 6, 7, 1, 2, 5, 3, 8, 9] and apart["shared"] == [-1] * 4
    assert (apart["targets"], apart["documents"]) == ([5, 6, 7, 5, 8, 9], [0, 0, 0, 1])


def test_what_cannot_be_laid_out() -> None:
    for call in (PairCollator(share=True), JudgedCollator(), lambda none: lay_out(none, share=True)):
        with pytest.raises(ValueError, match="at least one document"):
            call([])
    with pytest.raises(ValueError, match="prompt 1 has no ends"):
        lay_out([([1], [[2]]), ([1], [])], share=True)
    with pytest.raises(ValueError, match="an end of prompt 0 has 0 ids and 0 labels"):
        lay_out([([1], [[2], []])], share=True)
    with pytest.raises(ValueError, match="an end of prompt 0 has 1 ids and 2 labels"):
        lay_groups([([1], [([2], [2, 3])])], share=False)
    with pytest.raises(ValueError, match="a document has 5 ids and 4 labels"):
        PairCollator(share=True)([{**PAIR, "labels": [X] * 4}])


def test_judged_answers_and_the_others() -> None:
    rows = [
        {"input_ids": [1, 2, 3], "labels": [X, X, 3], "other_ids": [6, 7], "other_labels": [6, X], "desirable": True},
        {"input_ids": [5, 6, 7], "labels": [X, 6, X], "other_ids": [3], "other_labels": [3], "desirable": False},
        {"input_ids": [0, 0], "labels": [X, X], "other_ids": [0], "other_labels": [X], "desirable": False},
    ]
    batch = JudgedCollator()([{**row, "index": 4 + i} for i, row in enumerate(rows)])
    others = batch.pop("others")
    assert read_back(batch) == [(i, row["input_ids"], row["labels"]) for i, row in enumerate(rows)]
    assert read_back(others) == [
        (0, [1, 2, 6, 7], [X, X, 6, X]),  # the first prompt with the second answer
        (1, [5, 3], [X, 3]),
        (2, [0, 0], [X, X]),
    ]
    assert end_lengths(batch["ends"]).tolist() == end_lengths(others["ends"]).tolist() == [1, 1, 0]
    for one in (batch, others):
        assert one["desirable"].tolist() == [True, False, False] and one["index"].tolist() == [4, 5, 6]
        assert plain(one)["shared"] == [-1, -1, -1]


# --- the way back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_whole_documents_come_back(share: bool) -> None:
    pairs = [PAIR, SILENT, SECOND, *random_pairs(0, 40)]
    assert read_back(PairCollator(share=share)(pairs)) == documents_of(pairs)
    groups = [([1, 2, 3], [[4, 5], [4], [6]]), ([], [[7, 8], [9]]), ([5], [[4]])]
    said = [
        (i, [*prompt, *answer], [X] * len(prompt) + answer)
        for i, (prompt, ends) in enumerate(groups)
        for answer in ends
    ]
    said[3:5] = [(1, [7, 8], [X, 8]), (1, [9], [X])]  # without a prompt the first token is predicted by nothing
    assert read_back(lay_out(groups, share=share)) == said


# --- what an end sees ------------------------------------------------------------------------------------------------


def seen(batch: dict[str, Any]) -> torch.Tensor:
    """Which token sees which, bool [T, T], as the head of llama_ft/data/ends.py says it."""
    bounds = batch["cu_seqlens"].tolist()
    mask = torch.zeros(bounds[-1], bounds[-1], dtype=torch.bool)
    for (start, stop), prompt in zip(pairwise(bounds), batch["shared"].tolist(), strict=True):
        mask[start:stop, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        if prompt >= 0:
            mask[start:stop, bounds[prompt] : bounds[prompt + 1]] = True
    return mask


def test_shared_prompts_say_what_whole_documents_say() -> None:
    """Log-probabilities of Hugging Face's LLaMA in fp32: both layouts against each document alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=2, attn_implementation="eager", **sizes)
    model = LlamaForCausalLM(config).eval()

    def said(ids: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor, **layout: Any) -> torch.Tensor:
        logits = model(input_ids=ids, **layout).logits[0]
        return logits[rows].log_softmax(-1).gather(1, targets[:, None])[:, 0]

    pairs = [PAIR, SECOND, *random_pairs(1, 10)]
    with torch.no_grad():
        expected = []
        for _, ids, labels in documents_of(pairs):
            wanted = torch.tensor(labels)
            rows = (wanted != MASKED).nonzero()[:, 0]
            expected.append(said(torch.tensor([ids]), rows - 1, wanted[rows]).sum())
        for share in (True, False):
            batch = PairCollator(share=share)(pairs)
            blocked = torch.zeros(seen(batch).shape).masked_fill(~seen(batch), -torch.inf)[None, None]
            layout = {"position_ids": batch["position_ids"], "attention_mask": blocked}
            found = per_end(said(batch["input_ids"], batch["rows"], batch["targets"], **layout), batch["ends"])
            assert torch.allclose(found, torch.stack(expected), atol=2e-5, rtol=0)


# --- sums by end -----------------------------------------------------------------------------------------------------


def test_sums_by_end_and_their_gradients() -> None:
    ends = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    sums = per_end(values, ends)
    assert sums.tolist() == [3, 0, 28] and sums.dtype == torch.float32
    assert end_lengths(ends).tolist() == [2, 0, 3] and end_lengths(ends).dtype == torch.int64
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 1, 100, 100, 100]
    other = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: per_end(x, ends).sin(), other)
    assert per_end(torch.empty(0), torch.zeros(3, dtype=torch.int32)).tolist() == [0, 0]


def test_long_sums_lose_nothing_but_the_last_rounding() -> None:
    torch.manual_seed(0)
    values = -20 * torch.rand(200_000)
    ends = torch.tensor([0, 70_000, 200_000], dtype=torch.int32)
    exact = torch.stack([values[:70_000].double().sum(), values[70_000:].double().sum()])
    assert torch.equal(per_end(values, ends), exact.float())
