"""The loss of each source: sums that the head makes anyway, given to the source of each document."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM as Plain

from llama_ft.data.batches import PackedCollator, PaddedCollator
from llama_ft.llama.load import load_model
from llama_ft.recipe.schema import Data
from llama_ft.train.by_source import BySource, names_of
from llama_ft.train.trackers import numbers_of

ALONE = SimpleNamespace(reduce=lambda tensor, how: tensor)
CPU = torch.device("cpu")


def documents(count: int = 6) -> list[dict[str, Any]]:
    """Of 2 to 40 random tokens, some without a label here and there, one of them with none at all."""
    draw = np.random.default_rng(1)
    found = []
    for number in range(count):
        ids = draw.integers(3, 350, int(draw.integers(2, 40)))
        labels = np.where(draw.random(len(ids)) < 0.3, -100, ids)
        labels = np.full_like(ids, -100) if number == 3 else labels
        found.append({"input_ids": ids, "labels": labels, "source": number % 3, "row": number, "part": 0})
    return found


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator(0)], ids=["packed", "padded"])
@pytest.mark.parametrize("fast", [True, False])
def test_losses_of_sources_are_those_of_their_documents_alone(tiny_base, collator, fast):
    model = load_model(tiny_base, torch.float32)
    model.model.fast = replace(model.model.fast, head=fast)
    plain = Plain.from_pretrained(tiny_base, attn_implementation="eager", dtype=torch.float32)
    rows = documents()
    expected = {name: [0.0, 0, 0] for name in ("a", "b", "c")}
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor(row[key])[None] for key in ("input_ids", "labels"))
            logits = plain(ids).logits[0, :-1]
            nats = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
            counts = (float(nats), int((labels[0, 1:] != -100).sum()), ids.numel())
            name = "abc"[row["source"]]
            expected[name] = [old + new for old, new in zip(expected[name], counts, strict=True)]
    batch = collator(rows)
    apart = BySource(["a", "b", "c", "never drawn"], CPU)
    apart.begin([(batch, batch.pop("origins"))])
    output = model(**batch, num_items_in_batch=100, by_document=True)
    assert float(output.document_losses.sum()) == pytest.approx(100 * float(output.loss.detach()), rel=1e-5)
    apart.add(output.document_losses)
    found = apart.take(ALONE)
    wanted = {name: nats / labelled for name, (nats, labelled, _) in expected.items() if labelled}
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    assert found["tokens"] == {name: tokens for name, (_, _, tokens) in expected.items()} | {"never drawn": 0}
    again = apart.take(ALONE)  # counted from nothing after every line
    assert again == {"loss": {}, "tokens": dict.fromkeys(found["tokens"], 0)}


def test_what_does_not_know_its_source_is_not_counted():
    apart = BySource(["a", "b"], CPU)
    batch = PackedCollator()([{"input_ids": [1, 2], "labels": [1, 2]}])
    apart.begin([(batch, [])])
    apart.add(torch.ones(1))
    assert apart.take(ALONE) == {"loss": {}, "tokens": {"a": 0, "b": 0}}


def test_sources_have_short_names_no_two_alike():
    sources = [Data(use="alpaca"), Data(path="/x/rows.jsonl"), Data(path="/y/rows.jsonl")]
    assert names_of(sources) == ["alpaca", "rows.jsonl (1)", "rows.jsonl (2)"]
    assert BySource.of(sources[:1], CPU) is None


def test_trackers_get_the_losses_of_sources_as_numbers():
    line = {"loss": 1.5, "loss_by_source": {"wiki": 2.0}, "note": "none"}
    assert numbers_of(line) == {"loss": 1.5, "loss_by_source/wiki": 2.0}
