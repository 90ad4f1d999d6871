"""Packs of a run and of a stream: every document, in a set order, and shares of tokens that are kept to."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_ft import load_recipe
from llama_ft.data.batches import PackCollator, PackedCollator
from llama_ft.data.chunks import ChunkMaker
from llama_ft.data.mixture import ByShare, Mixture
from llama_ft.data.prepare import inspect_data, prepare_data
from llama_ft.data.pretraining import WINDOW, Packs, PackStream, packs_of_run
from llama_ft.data.stream import DocumentStream
from llama_ft.errors import UserError
from llama_ft.plan.data import facts_of
from llama_ft.plan.steps import Cut, plan_steps, run_packs
from tests.conftest import ROOT

LENGTHS = np.random.default_rng(0).integers(1, 257, 3000).astype(np.int32)
MIXTURE = Mixture((2000, 1000), (2000, 500), seed=3)


def packs(**settings: Any) -> list[np.ndarray]:
    return packs_of_run(MIXTURE, LENGTHS, 256, **settings)


def test_a_run_reads_every_document_of_every_epoch_and_half_of_half_an_epoch():
    read = np.concatenate(packs(epochs=2.5))
    expected = [MIXTURE.order(0), MIXTURE.order(1), MIXTURE.order(2)[:1250]]
    assert Counter(read.tolist()) == Counter(np.concatenate(expected).tolist())
    assert all(LENGTHS[pack].sum() <= 256 for pack in packs(epochs=1))


def test_packs_stay_near_the_place_of_their_documents_and_are_not_sorted_by_length():
    found = packs(epochs=1)
    order = MIXTURE.order(0)
    first = set(order[:WINDOW].tolist())
    window = found[: next(i for i, pack in enumerate(found) if not set(pack.tolist()) <= first)]
    assert set(np.concatenate(window).tolist()) == first and len(window) > 100
    longest = [int(LENGTHS[pack].max()) for pack in window]
    assert longest != sorted(longest, reverse=True)
    halves = np.mean(longest[: len(longest) // 2]), np.mean(longest[len(longest) // 2 :])
    assert abs(halves[0] - halves[1]) < 25  # first fit alone: the long ones first, 90 apart


def test_as_many_packs_as_are_needed_whatever_the_epochs():
    one = len(packs(epochs=1))
    found = packs(epochs=1, needed=2 * one + 5)
    assert len(found) == 2 * one + 5
    assert all(np.array_equal(a, b) for a, b in zip(found, packs(epochs=3), strict=False))
    assert packs(epochs=1, needed=3)[2].tolist() == found[2].tolist()


def test_nothing_gives_no_packs():
    assert packs_of_run(Mixture((0,), (0,), 1), LENGTHS[:0], 256, epochs=3.0, needed=10) == []


def test_packs_as_a_data_set_hold_their_documents_and_a_silent_one_behind_the_last():
    documents = [{"input_ids": np.full(n, n), "labels": np.full(n, n)} for n in (3, 4, 5)]
    data = Packs(documents, [np.array([2, 0]), np.array([1])], silent=1).dataset()
    assert [[len(one["input_ids"]) for one in data[i]["documents"]] for i in range(len(data))] == [[5, 3], [4], [4]]
    batch = PackCollator()([data[0], data[1]])
    assert batch["cu_seqlens"].tolist() == [0, 5, 8, 12]
    assert all((batch[key] == PackedCollator()([documents[i] for i in (2, 0, 1)])[key]).all() for key in batch)


def test_shares_hold_at_every_moment_to_within_one_item():
    streams = [iter(lambda size=size: size, None) for size in (7, 300, 41)]
    shares, given = (0.5, 0.3, 0.2), [0, 0, 0]
    for item in islice(ByShare(streams, shares, int), 5000):
        given[(7, 300, 41).index(item)] += item
        for part, share in zip(given, shares, strict=True):
            assert abs(part - share * sum(given)) <= 348


def test_a_stream_that_ends_ends_the_whole():
    assert list(ByShare([iter([1, 1]), iter([1] * 9)], (0.5, 0.5), int)) == [1, 1, 1, 1]


@pytest.fixture
def three_sources(real_data: Path, smollm2: Path) -> list[str]:
    sources = [("wikitext2_valid.txt", 0.55), ("tinyshakespeare.txt", 0.15), ("wiki_demo.txt", 0.3)]
    data = [{"path": str(real_data / "text" / name), "layout": "text", "unit": "line", "share": share}
            for name, share in sources]  # fmt: skip
    return [
        f"model.base={smollm2}",
        f"data={data}",
        "eval_data=null",
        "template=plain",
        "training.objective=pretrain",
        "training.global_batch=65536",
        "training.max_steps=16",
        "sequence.max_length=512",
        "sequence.overlong=split",
        "mixture.streaming=true",
        "mixture.shuffle_buffer=2000",
    ]


def test_shares_of_a_million_tokens_are_the_recipes(three_sources):
    prepared = prepare_data(load_recipe("quickstart", three_sources))
    assert prepared.stream is not None
    stream = PackStream(prepared.stream, 512, 42)
    tokens: Counter[int] = Counter()
    rows: Counter[tuple[int, int, int]] = Counter()
    for pack in stream:
        for document in pack["documents"]:
            tokens[document["source"]] += len(document["input_ids"])
            rows[document["source"], document["row"], document["part"]] += 1
        if tokens.total() >= 1_000_000:
            break
    shares = [tokens[source] / tokens.total() for source in range(3)]
    assert shares == pytest.approx([0.55, 0.15, 0.3], abs=0.005)
    # The smallest source has been read more than once by now, none of its rows twice as often as another.
    own = [count for (source, _, _), count in rows.items() if source == 2]
    assert max(own) >= 2 and max(own) - min(own) <= 1
    again = pickle.loads(pickle.dumps(stream))
    assert first_ids(again) == first_ids(stream)


def first_ids(stream: PackStream) -> list[list[list[int]]]:
    return [[one["input_ids"].tolist() for one in pack["documents"]] for pack in islice(iter(stream), 20)]


def test_the_plan_counts_the_packs_of_a_prepared_run_exactly(three_sources):
    settings = [one for one in three_sources if not one.startswith(("mixture.", "training.max_steps", "data="))]
    path = next(one for one in three_sources if one.startswith("data=")).split("'")[3]
    settings += [f'data=[{{"path": "{path}", "layout": "text", "unit": "line"}}]', "training.epochs=1.5"]
    recipe = load_recipe("quickstart", settings)
    prepared = prepare_data(recipe)
    found = run_packs(recipe, prepared.mixture, prepared.lengths)
    steps = plan_steps(recipe, facts_of(prepared), Cut(2, 64, 1))
    assert steps.total == -(-len(found) // 128)
    assert steps.seen is not None and steps.seen.tokens == prepared.lengths[np.concatenate(found)].sum()
    fill = prepared.report.efficiency["fill of packs"]
    assert 0.97 < fill < 1 and steps.seen.tokens / (512 * len(found)) == pytest.approx(fill, abs=0.005)


@pytest.fixture
def small_stream(three_sources) -> DocumentStream:
    """Three texts of every checkout, short enough to begin anew a few times, in blocks of some 30 rows."""
    names = {"docs/training.md": 0.5, "docs/data.md": 0.3, "README.md": 0.2}
    data = [{"path": str(ROOT / name), "layout": "text", "unit": "line", "share": share}
            for name, share in names.items()]  # fmt: skip
    settings = [one for one in three_sources if not one.startswith("data=")]
    recipe = load_recipe("quickstart", [*settings, f"data={data}", "mixture.shuffle_buffer=100"])
    stream = prepare_data(recipe).stream
    assert stream is not None
    return stream


def test_a_stream_goes_on_from_any_mark(small_stream):
    """Marks are what a checkpoint keeps: as JSON, and never behind the packs that were asked about."""
    whole = PackStream(small_stream, 512, 42)
    first = [ids_of(pack) for pack in islice(iter(whole), 200)]
    places = [mark["packs"] for mark in whole.marks]
    assert len(places) > 4 and places[0] == 0
    assert min(place[0] for place in whole.marks[-1]["stream"]["sources"]) >= 1, "every source has begun anew"
    for packs in (0, 1, places[1] - 1, places[1], 99, 180):
        again = PackStream(small_stream, 512, 42)
        for _ in islice(iter(again), packs + 3):  # a loader reads ahead
            pass
        mark = json.loads(json.dumps(again.mark(packs)))
        assert max(place for place in places if place <= packs) == mark["packs"] <= packs
        resumed = PackStream(small_stream, 512, 42, mark)
        found = [ids_of(pack) for pack in islice(iter(resumed), 200)]
        assert found[: mark["packs"]] == [[[0, 0]]] * mark["packs"]
        assert found[mark["packs"] :] == first[mark["packs"] :]


def test_rows_before_a_mark_are_read_over_and_not_rendered(small_stream, monkeypatch):
    stream = PackStream(small_stream, 512, 42)
    for _ in islice(iter(stream), 200):
        pass
    mark = stream.mark(200)
    rendered: list[int] = []
    make = ChunkMaker.make

    def counted(self: ChunkMaker, source: Any, number: int, rows: Any) -> Any:
        rendered.append(len(rows))
        return make(self, source, number, rows)

    monkeypatch.setattr(ChunkMaker, "make", counted)
    next(islice(iter(PackStream(small_stream, 512, 42, mark)), mark["packs"], None))
    late = sum(rendered)
    rendered.clear()
    for _ in islice(iter(PackStream(small_stream, 512, 42)), mark["packs"]):
        pass
    assert 0 < late < sum(rendered) / 2


def ids_of(pack: dict[str, Any]) -> list[list[int]]:
    return [one["input_ids"].tolist() for one in pack["documents"]]


def test_a_source_that_gives_nothing_is_told(three_sources, tmp_path):
    rows = "".join(json.dumps({"text": "word " * 2000}) + "\n" for _ in range(3))
    (tmp_path / "long.jsonl").write_text(rows)
    data = f'[{{"path": "{tmp_path / "long.jsonl"}", "layout": "text", "share": 1.0}}]'
    settings = [one for one in three_sources if not one.startswith(("data=", "sequence.overlong"))]
    prepared = inspect_data(load_recipe("quickstart", [*settings, f"data={data}", "sequence.overlong=drop"]))
    with pytest.raises(UserError, match="the stream holds no documents"):
        next(iter(PackStream(prepared.stream, 512, 42)))
