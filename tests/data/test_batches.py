"""Micro-batches: positions, boundaries and first labels of packs; masks of padded batches."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from llama_ft.data.batches import PackedCollator, PaddedCollator, labelled_tokens

A = {"input_ids": [11, 12, 13], "labels": [-100, 12, 13], "row": 4, "length": 3}
B = {"input_ids": [21, 22], "labels": [21, 22], "row": 5, "length": 2}
C = {"input_ids": np.array([31], dtype=np.int32), "labels": np.array([31], dtype=np.int32)}


def test_packed() -> None:
    batch = PackedCollator()([A, B, C])
    assert batch["input_ids"].tolist() == [[11, 12, 13, 21, 22, 31]]
    assert batch["labels"].tolist() == [[-100, 12, 13, -100, 22, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5, 6]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids")} == {torch.int64}
    assert labelled_tokens(batch) == 3
    assert B["labels"] == [21, 22] and C["labels"].tolist() == [31]  # the documents themselves are untouched


def test_padded() -> None:
    batch = PaddedCollator(pad_id=7)([A, B])
    assert batch["input_ids"].tolist() == [[11, 12, 13], [21, 22, 7]]
    assert batch["labels"].tolist() == [[-100, 12, 13], [-100, 22, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labelled_tokens(batch) == 3


def test_both_layouts_teach_the_same_tokens() -> None:
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(20):
        ids = rng.integers(0, 1000, rng.integers(1, 40))
        labels = np.where(rng.random(len(ids)) < 0.5, ids, -100)
        documents.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    packed, padded = PackedCollator()(documents), PaddedCollator(pad_id=0)(documents)
    assert (
        labelled_tokens(packed)
        == labelled_tokens(padded)
        == sum(sum(label != -100 for label in document["labels"][1:]) for document in documents)
    )
    bounds = packed["cu_seqlens"].tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        assert torch.equal(packed["labels"][0, start:end], padded["labels"][i, : end - start])
        assert packed["position_ids"][0, start:end].tolist() == list(range(end - start))


def test_nothing_to_batch() -> None:
    for collator in (PackedCollator(), PaddedCollator(0)):
        with pytest.raises(ValueError, match="at least one document"):
            collator([])
        with pytest.raises(ValueError, match="a document has 0 ids and 0 labels"):
            collator([{"input_ids": [], "labels": []}])
        with pytest.raises(ValueError, match="a document has 2 ids and 1 labels"):
            collator([{"input_ids": [1, 2], "labels": [1]}])
