"""The suite `heldout`: the run's own held-out documents, files, cards, and what a stopped call leaves."""

from __future__ import annotations

import json
import math

import pytest

from llama_ft.errors import UserError
from llama_ft.evaluate.heldout import BITS, HITS, NLL, PERPLEXITY, SUITE
from llama_ft.evaluate.material import drawn, held_out, labelled_bytes
from llama_ft.evaluate.opening import open_model, open_subjects
from llama_ft.evaluate.result import SuiteResult
from llama_ft.evaluate.suites import Context
from llama_ft.export.run import export_run
from tests.tiny_run import make_run


def test_it_measures_the_runs_own_documents_as_training_did(subjects, context):
    result = SUITE.run(subjects["tuned"], context)
    prepared = context.prepared
    assert len(result.rows) == len(prepared.eval) == 8
    for row, document in zip(result.rows, prepared.eval, strict=True):
        assert row["tokens"] == document["labelled"]
        [(nats, _)] = subjects["tuned"].nll([(document["input_ids"], document["labels"])])
        assert row["nats"] == pytest.approx(nats, rel=1e-4)
    assert [row["id"] for row in result.rows] == [f"held.jsonl:{row}" for row in range(8)]
    assert result.rows[0]["asked"] == "What does llama number 16 eat on hill 2?"


def test_its_scores_are_ratios_of_sums(subjects, context):
    result = SUITE.run(subjects["tuned"], context)
    nats, tokens = (sum(row[name] for row in result.rows) for name in ("nats", "tokens"))
    said = [turns[-1]["content"] for turns in context.prepared.eval_conversations]
    assert result.score(NLL).value == pytest.approx(nats / tokens)
    assert result.score(PERPLEXITY).value == pytest.approx(math.exp(nats / tokens))
    # chatml closes an answer with a control token, which has no bytes, and nothing else
    assert result.score(BITS).value == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in said))
    low, value, high = (getattr(result.score(NLL), name) for name in ("low", "value", "high"))
    assert low < value < high
    assert 0 <= result.score(HITS).value <= 1


def test_a_trained_run_beats_its_base_and_its_export_is_equal(subjects, context):
    found = {name: SUITE.run(one, context) for name, one in subjects.items()}
    assert found["tuned"].score(NLL).high < found["base"].score(NLL).low
    assert found["merged"].score(NLL).value == pytest.approx(found["tuned"].score(NLL).value, rel=1e-4)


@pytest.mark.parametrize("changes", [{"adapter__method": "full"}, {"adapter__dora": "true"}], ids=["full", "dora"])
def test_other_methods_are_read_back_too(tiny_base, tmp_path, changes):
    run = make_run(tmp_path / "run", tiny_base, **changes)[0]
    if run.adapter.is_dir():
        export_run(run)
    context = Context(tmp_path / "eval", run)
    found = {
        one.name: SUITE.run(one, context) for one in open_subjects(run, ("base", "tuned", "merged"), context.prepared)
    }
    assert found["tuned"].score(NLL).high < found["base"].score(NLL).low
    assert found["merged"].score(NLL).value == pytest.approx(found["tuned"].score(NLL).value, rel=1e-4)


def test_a_stopped_call_goes_on_where_it_was(subjects, context, monkeypatch):
    class Stopped(Exception):
        pass

    subject = subjects["tuned"]
    whole = SUITE.run(subject, context)
    part = context.path("heldout", "tuned").with_suffix(".part.jsonl")
    # killed while it wrote its second line: 5 documents are kept, half of a line is not
    first, line = part.read_text().splitlines()
    kept = json.loads(line)
    cut = {"rows": kept["rows"][:5], "seconds": 10.0}
    part.write_text(f"{first}\n{json.dumps(cut)}\n{line[:50]}")
    asked = []
    costs = subject.costs
    monkeypatch.setattr(
        subject, "costs", lambda documents, tick: asked.append(len(documents)) or costs(documents, tick)
    )
    again = SUITE.run(subject, context)
    assert asked == [3]
    assert [row["id"] for row in again.rows] == [row["id"] for row in whole.rows]
    assert again.score(NLL).value == pytest.approx(whole.score(NLL).value, rel=1e-5)
    assert again.seconds > 10
    # the whole file is read again, the cut line passed over
    SUITE.run(subject, context)
    assert asked == [3]
    # … but not for another limit
    SUITE.run(subject, Context(context.folder, context.run, limit=2))
    assert asked == [3, 2]


def test_what_is_there_is_taken_over_or_refused(subjects, context, monkeypatch):
    subject = subjects["tuned"]
    first = SUITE.run(subject, context)
    first.write(context.folder)
    context.path("heldout", "tuned").with_suffix(".part.jsonl").unlink()

    def never(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(subject, "costs", never)
    again = SUITE.run(subject, context)
    assert again.scores == first.scores and again.seconds == first.seconds
    with pytest.raises(UserError, match=r"other settings \(documents, limit\)") as told:
        SUITE.run(subject, Context(context.folder, context.run, limit=3))
    assert "--overwrite" in str(told.value)


def test_files_and_cards_are_measured_apart_and_together(subjects, tiny_run, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "grass"}]})
            + "\n"
            for i in range(3)
        )
    )
    context = Context(tmp_path / "eval", tiny_run, data=[str(rows), "small-sums"], limit=3)
    assert SUITE.needs(context) == []
    result = SUITE.run(subjects["base"], context)
    result.write(context.folder)
    context.path("heldout", "base").with_suffix(".part.jsonl").unlink()
    assert SUITE.run(subjects["base"], context).rows == result.rows, "what is taken over is what was written"
    assert len(result.rows) == 6
    names = [score.name for score in result.scores]
    assert names[:2] == [NLL, PERPLEXITY]
    assert f"mine.jsonl: {NLL}" in names and sum(name.endswith(NLL) for name in names) == 3
    both = result.score(NLL).value
    apart = [score.value for score in result.scores if score.name.endswith(f": {NLL}")]
    assert min(apart) < both < max(apart)
    assert all(row["id"].split(":")[0] == row["source"] for row in result.rows)


def test_plain_text_is_measured_by_a_model_without_a_template(tiny_base, tmp_path):
    text = tmp_path / "some.txt"
    text.write_text("the llama eats grass and hay")
    context = Context(tmp_path / "eval", data=[str(text)])
    subject = open_model(str(tiny_base))
    assert "no chat template" in subject.notices[0]
    result = SUITE.run(subject, context)
    assert result.leaks == {}
    assert result.rows[0]["asked"].startswith("the llama eats grass")
    # 28 letters: the first token, `the`, is predicted by nothing, and the control token at the end has none
    assert result.rows[0]["values"][BITS][1] == 25
    rows = tmp_path / "mine.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    with pytest.raises(UserError, match="no chat template") as told:
        SUITE.run(subject, Context(tmp_path / "eval2", data=[str(rows)]))
    assert "--template" in str(told.value)


def test_what_is_missing_is_told_before_anything_runs(tiny_run, tmp_path):
    [problem] = SUITE.needs(Context(tmp_path))
    assert "has no held-out documents" in problem.what and "--data" in problem.hint
    problems = SUITE.needs(Context(tmp_path, data=["no-such-card", "gone.jsonl", "llama-qa:tset"]))
    assert [one.what for one in problems] == [
        "there is no file and no card 'no-such-card'",
        "there is no file and no card 'gone.jsonl'",
        "the card 'llama-qa' has no split 'tset'",
    ]
    assert all(one.key == "--data" for one in problems)


def test_a_draw_is_the_same_for_every_subject_and_of_another_seed_another(subjects, tiny_run, tmp_path):
    context = Context(tmp_path, tiny_run, limit=3, seed=1)
    first = [one.id for one in held_out(subjects["base"], context)]
    assert first == [one.id for one in held_out(subjects["merged"], context)] and len(first) == 3
    assert drawn(range(100), 5, 1) == sorted(drawn(range(100), 5, 1)) != drawn(range(100), 5, 2)


def test_bytes_are_those_of_the_scored_text(subjects):
    tokenizer = subjects["base"].tokenizer
    ids = tokenizer.encode("naïvely 🦙", add_special_tokens=False)
    assert labelled_bytes([5, *ids, 2], [-100, *ids, 2], tokenizer) == len("naïvely 🦙".encode())
    assert labelled_bytes(ids, [-100] * len(ids), tokenizer) == 0


def test_a_result_is_written_where_others_look_for_it(subjects, context):
    path = SUITE.run(subjects["base"], context).write(context.folder)
    assert path == context.folder / "heldout-base.json"
    assert SuiteResult.read(path).score(NLL).unit == "nats"


def test_files_of_other_suites_and_changed_files(subjects, context, tmp_path):
    """A file that another suite is given beside it changes nothing here; other rows under the same name do."""
    choices, rows = tmp_path / "choices.jsonl", tmp_path / "rows.jsonl"
    choices.write_text(json.dumps({"query": "?", "choices": ["a", "b"], "gold": 0}))
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    subject = subjects["base"]

    def settings(*names) -> dict:
        return Context(tmp_path, context.run, data=list(map(str, names))).settings("heldout", subject)

    assert settings(choices) == settings() != settings(rows)
    before = settings(rows)
    rows.write_text(json.dumps({"prompt": "a", "completion": "b, and more"}))
    assert settings(rows) != before
