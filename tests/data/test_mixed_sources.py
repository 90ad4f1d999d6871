"""Several sources as one set: shares, copies, leaks, and what the report says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data.order import document_order
from llama_ft.data.prepare import inspect_data, prepare_data
from llama_ft.data.preview import read_training
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Recipe
from tests.data.conftest import chat, chats, write_jsonl

Make = Callable[..., Recipe]
PROMPT = "Write a function that returns the number of llamas which are older than n years in a herd of animals."
LONG = "The llama is a domesticated animal of South America that eats grass and is kept for its wool and as a guard."


def entry(path: Path, **keys: Any) -> dict[str, Any]:
    return {"path": str(path), "layout": "messages", **keys}


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    first = write_jsonl(tmp_path / "a.jsonl", [chat(f"a{i}", "yes") for i in range(30)])
    return first, write_jsonl(tmp_path / "b.jsonl", [chat(f"b{i}", "no") for i in range(10)])


def test_equal_sources_are_joined_whole_in_the_order_of_old(two: tuple[Path, Path], make_recipe: Make) -> None:
    prepared = prepare_data(make_recipe(data=[entry(path) for path in two]))
    assert prepared.mixture.order(3).tolist() == document_order(40, 42, 3).tolist()
    assert [(one.drawn, one.share, one.repeats) for one in prepared.report.sources] == [
        (30, 0.75, 1.0),
        (10, 0.25, 1.0),
    ]


def test_shares_repeats_and_passes_are_told(two: tuple[Path, Path], make_recipe: Make) -> None:
    data = [entry(two[0]), entry(two[1], epochs=3)]
    prepared = prepare_data(make_recipe(data=data))
    assert [(one.drawn, one.repeats) for one in prepared.report.sources] == [(30, 1.0), (30, 3.0)]
    seen = [prepared.train[int(i)]["source"] for i in prepared.mixture.order(0)]
    assert seen.count(0) == seen.count(1) == 30
    even = prepare_data(make_recipe(data=[entry(path) for path in two], mixture={"temperature": 1e9}))
    assert [one.drawn for one in even.report.sources] == [20, 20]
    left_out = prepare_data(make_recipe(data=[entry(two[0]), entry(two[1], weight=0)]))
    assert [one.drawn for one in left_out.report.sources] == [30, 0] and len(left_out.mixture) == 30


def test_copies_are_counted_and_dropped_when_asked(tmp_path: Path, make_recipe: Make) -> None:
    near = LONG.replace("wool", "fur")
    first = write_jsonl(tmp_path / "a.jsonl", [chat("What is a llama?", LONG), *chats(2), *chats(2)])
    second = write_jsonl(tmp_path / "b.jsonl", [chat("What is  a llama?", LONG), chat("What is a llama?", near)])
    data = [entry(first), entry(second)]
    kept = prepare_data(make_recipe(data=data))
    assert [one.duplicates for one in kept.report.sources] == [2, 1] and len(kept.train) == 7
    exact = prepare_data(make_recipe(data=data, mixture={"dedupe": "exact"}))
    assert [one.dropped for one in exact.report.sources] == [{"copy of an earlier document": 2}] * 1 + [
        {"copy of an earlier document": 1}
    ]
    assert exact.train["row"][:] == [0, 1, 2, 1] and exact.train["source"][:] == [0, 0, 0, 1]
    near_too = prepare_data(make_recipe(data=data, mixture={"dedupe": "near", "similarity": 0.5}))
    assert near_too.report.sources[1].dropped == {
        "copy of an earlier document": 1,
        "near copy of an earlier document": 1,
    }
    # A preview says the same of each row.
    said = {(source.label, one.row): one.dropped for one, source in read_training(near_too)}
    assert said[str(second), 1] == "near copy of an earlier document" and said[str(first), 0] is None


def test_a_benchmarks_prompt_in_training_stops_the_run_or_is_taken_out(tmp_path: Path, make_recipe: Make) -> None:
    rows = [*chats(3), chat(f"Please: {PROMPT.upper()} Thanks.", "def f(): ...")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    bench = write_jsonl(tmp_path / "bench.jsonl", [{"task_id": 1, "prompt": PROMPT, "test": "assert True"}])
    mixture = {"benchmarks": [str(bench)]}
    with pytest.raises(UserError) as caught:
        prepare_data(make_recipe(path, mixture=mixture))
    (problem,) = caught.value.problems
    assert problem.where == f"{path}, row 3"
    assert f"holds a benchmark's prompt, {bench}, row 0" in problem.what
    allowed = prepare_data(make_recipe(path, mixture=mixture), allow=["benchmark-in-train"])
    assert allowed.report.allowed == ["benchmark-in-train"] and len(allowed.train) == 4
    without = prepare_data(make_recipe(path, mixture={**mixture, "decontaminate": True}))
    assert without.report.sources[0].dropped == {"holds a prompt of a benchmark": 1} and without.report.faults == []


def test_what_is_evaluated_is_taken_out_of_training(tmp_path: Path, make_recipe: Make) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [chat("What is a llama?", LONG), *chats(1)])
    longer = chat("Tell me: what is a llama? I ask for a friend.", f"{LONG} It spits.")
    path = write_jsonl(tmp_path / "rows.jsonl", [longer, *chats(4)])
    recipe = make_recipe(path, eval_data=[entry(held)], mixture={"decontaminate": True})
    prepared = prepare_data(recipe)
    assert prepared.report.sources[0].dropped == {"overlaps a held-out row": 2}
    assert prepared.train["row"][:] == [2, 3, 4]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_held_out_heading_takes_no_text_with_it(tmp_path: Path, make_recipe: Make, streaming: bool) -> None:
    said = ["= Reception =", "Its reception was cold, wrote the critics.", "Reception rooms were shut.", "= Legacy ="]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": one} for one in said])
    held = {"path": str(write_jsonl(tmp_path / "held.jsonl", [{"text": "= RECEPTION ="}])), "layout": "text"}
    mixture = {"decontaminate": True, "streaming": streaming}
    prepared = prepare_data(make_recipe(path, layout="text", eval_data=[held], template="plain", mixture=mixture))
    assert prepared.report.sources[0].dropped == {"overlaps a held-out row": 1}
    if not streaming:
        assert prepared.train["row"][:] == [1, 2, 3]


def test_padding_is_told_and_grouping_lowers_it(tmp_path: Path, make_recipe: Make) -> None:
    rows = [chat(f"q{i}", "word " * (1 + 7 * (i % 12))) for i in range(240)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = {"sequence": {"packing": False}, "training": {"global_batch": 24, "micro_batch": 4}}
    shares = prepare_data(make_recipe(path, **settings)).report.efficiency
    assert shares["padding"] < 0.5 * shares["padding without grouping by length"]
    assert prepare_data(make_recipe(path)).report.efficiency == {}


def test_infilling_is_drawn_by_the_seed_and_keeps_every_character(tmp_path: Path, make_recipe: Make) -> None:
    texts = [f"def llama_{i}(n):\n    return n + {i}\n" for i in range(40)]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in texts])
    settings: dict[str, Any] = {"layout": "text", "training": {"objective": "pretrain"}}
    for tokens in (["<|im_start|>", "<|im_end|>", "<|endoftext|>", "(("], None):
        with pytest.raises(UserError, match=r"infilling\.tokens"):
            prepare_data(make_recipe(path, **settings, infilling={"tokens": tokens}))


def test_infilling_needs_text(tmp_path: Path, make_recipe: Make) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    with pytest.raises(UserError, match="no source holds text that could be filled in"):
        prepare_data(make_recipe(path, infilling={"rate": 0.5}))


def test_a_system_prompt_that_all_rows_share_is_no_leak_and_no_copy(tmp_path: Path, make_recipe: Make) -> None:
    shared = " ".join(f"rule {i} of the house" for i in range(40))
    path = write_jsonl(tmp_path / "rows.jsonl", [chat(f"q{i}", f"a{i}", system=shared) for i in range(20)])
    held = write_jsonl(tmp_path / "held.jsonl", [chat("q99", "a99", system=shared)])
    mixture = {"dedupe": "near", "decontaminate": True}
    prepared = prepare_data(make_recipe(path, eval_data=[entry(held)], mixture=mixture))
    assert len(prepared.train) == 20 and prepared.report.sources[0].duplicates == 0


def test_a_row_that_holds_a_held_out_row_stops_the_run(tmp_path: Path, make_recipe: Make) -> None:
    held = write_jsonl(tmp_path / "held.jsonl", [chat("What is a llama?", LONG)])
    longer = chat("I ask for a friend: what is a llama?", f"{LONG} It spits.", "Thanks.", "You are welcome.")
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(2), longer])
    with pytest.raises(UserError, match=f"{path}, row 2: what {held}, row 0 says, which is held out"):
        prepare_data(make_recipe(path, eval_data=[entry(held)]))


def test_a_mixture_of_nothing_is_refused(tmp_path: Path, make_recipe: Make) -> None:
    empty = write_jsonl(tmp_path / "a.jsonl", [chat("no answer")])
    other = write_jsonl(tmp_path / "b.jsonl", chats(3))
    with pytest.raises(UserError, match="the sources that have any have weight 0"):
        prepare_data(make_recipe(data=[entry(empty), entry(other, weight=0)]))


def test_a_report_from_the_cache_speaks_of_todays_files(tmp_path: Path, make_recipe: Make) -> None:
    rows = [*chats(2), chat("a", "word " * 90)]
    cut = {"max_length": 64, "overlong": "truncate", "max_truncated": 0.1}
    first = inspect_data(make_recipe(data=[{"path": str(write_jsonl(tmp_path / "a.jsonl", rows))}], sequence=cut))
    assert first.report.sources[0].guessed and first.report.faults[0].where == str(tmp_path / "a.jsonl")
    again = inspect_data(make_recipe(write_jsonl(tmp_path / "b.jsonl", rows), sequence=cut))
    assert again.folder == first.folder
    assert again.report.sources[0].guessed is None and again.report.faults[0].where == str(tmp_path / "b.jsonl")
