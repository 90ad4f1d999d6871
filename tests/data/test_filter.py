"""`llama-ft data filter`: what is kept, counted and written, by several processes as by one; the same in recipes."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from llama_ft.cli import app
from llama_ft.data import workers
from llama_ft.data.clean import report_path
from llama_ft.data.filter import EQUAL, NEAR, filter_files
from llama_ft.data.filter_report import FilterReport, print_filter_report
from llama_ft.data.prepare import prepare_data
from llama_ft.data.quality.steps import CODE, PROSE
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Data, Recipe
from tests.data.conftest import write_jsonl
from tests.data.test_quality import GERMAN

Make = Callable[..., Recipe]
MENU = "Home | About | Contact"


ENGLISH = """the of and that with have people house water river mountain garden summer winter bread morning evening
yellow green wooden little great many before after under between walked carried opened found brought looked because
while where every another stone letter window kitchen table village market horse field forest island captain sister
father children teacher music story question answer weather journey bridge corner silver paper people's long short"""


def page(number: int) -> str:
    """English words, each once, in an order of their own for each number: prose enough for every step."""
    words = random.Random(number).sample(ENGLISH.split(), 66)
    return f"{' '.join(words[:22])}. {' '.join(words[22:44])}. {' '.join(words[44:])} on page {number} of it."


def run(folder: Path, rows: list[Any], **settings: Any) -> tuple[list[dict[str, Any]], FilterReport]:
    """(rows written, report) of a filtering by one process."""
    source = write_jsonl(folder / "in.jsonl", rows)
    output = folder / "out.jsonl"
    settings = {"overwrite": True, "processes": 1, **settings}
    report = filter_files([Data(path=str(source), layout="text")], output, **settings)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()], report


def counts(report: FilterReport) -> dict[str, int]:
    return {f"{one.effect} {one.step}: {one.rule}": one.rows for one in report.rules}


def test_each_step_counts_what_it_drops_and_the_next_sees_the_rest(tmp_path: Path) -> None:
    rows = [
        page(0),
        GERMAN * 9,
        "the house and the water of it " * 30,
        "There are only a few words of English here.",
        "",
        page(0),
        page(1),
        f"{page(1)} Once more.",
    ]
    kept, report = run(tmp_path, [{"text": text, "url": f"u{i}"} for i, text in enumerate(rows)])
    assert [row["url"] for row in kept] == ["u0", "u6"]
    assert kept[0] == {"text": page(0), "url": "u0"}
    assert report.seen == {
        **{"reading": 8, "language": 7, "gopher-repetition": 6},
        **{"gopher-quality": 5, "near-duplicates": 4},
    }
    assert counts(report) == {
        "dropped reading: empty text": 1,
        "dropped language: in another language (de)": 1,
        "dropped gopher-repetition: more than 20% of characters are in one 2-gram": 1,
        "dropped gopher-quality: fewer than 50 words": 1,
        f"dropped near-duplicates: {EQUAL}": 1,
        f"dropped near-duplicates: {NEAR}": 1,
    }
    assert (report.rows_in, report.rows_out) == (8, 2)
    assert report.characters_in == sum(map(len, rows)) and report.characters_out == len(page(0)) + len(page(1))
    copy = next(one for one in report.rules if one.rule == EQUAL)
    assert copy.first[0].endswith("in.jsonl, row 5") and f"in.jsonl, row 0: {page(0)[:60]}" in copy.example
    assert json.loads(report_path(tmp_path / "out.jsonl").read_text()) == report.as_dict()
    assert report.as_dict()["dropped"] == {
        **{"reading": 1, "language": 1, "gopher-repetition": 1},
        **{"gopher-quality": 1, "near-duplicates": 2},
    }


def test_steps_are_those_named_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": f"{page(0)}\n{MENU}"}, {"text": "{"}, {"text": page(0)}]
    kept, report = run(tmp_path, rows, steps=["c4", "gopher-quality"])
    assert kept == [{"text": page(0).strip()}, {"text": page(0)}]
    assert counts(report) == {
        "changed c4: lines without an end mark": 1,
        "dropped c4: holds a curly bracket": 1,
    }
    kept, report = run(tmp_path, rows, steps=["duplicates", "c4"])  # copies last, of what c4 left
    assert len(kept) == 1 and list(report.seen) == ["reading", "c4", "duplicates"]


def test_dropped_rows_with_their_reasons(tmp_path: Path) -> None:
    gone = tmp_path / "gone.jsonl"
    kept, _ = run(tmp_path, [{"text": page(0)}, {"text": "short", "id": 7}, {"text": ""}], dropped=gone)
    assert len(kept) == 1
    assert [json.loads(line) for line in gone.read_text().splitlines()] == [
        {"text": "short", "id": 7, "dropped": "gopher-quality: fewer than 50 words"},
        {"text": "", "dropped": "reading: empty text"},
    ]


def test_renamed_columns_come_out_as_text(tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(
        "name: card\ntitle: T\nlayout: text\ncolumns: {text: content}\nsource: {files: {train: in.jsonl}}\n"
    )
    write_jsonl(tmp_path / "in.jsonl", [{"content": page(0), "licence": "mit"}])
    filter_files([Data(use=str(tmp_path / "card.yaml"))], tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == {"text": page(0), "licence": "mit"}


def test_code_has_steps_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1\n")  # far from prose
    (tmp_path / "code" / "b.js").write_text("x" * 1001 + "\n")
    (tmp_path / "prose.txt").write_text(page(0))
    entries = [Data(path=str(tmp_path / "code")), Data(path=str(tmp_path / "prose.txt"))]
    report = filter_files(entries, tmp_path / "out.jsonl")
    assert list(report.steps.values()) == [[*CODE, "near-duplicates"], [*PROSE, "near-duplicates"]]
    assert report.rows_out == 2 and counts(report) == {"dropped code: a line of more than 1,000 characters": 1}
    assert (report.seen["code"], report.seen["language"]) == (2, 1)
    report = filter_files([Data(use="python-files", limit=3)], tmp_path / "own.jsonl")
    assert list(report.steps.values()) == [[*CODE, "near-duplicates"]]


def test_several_processes_write_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "CHUNK", 40)
    monkeypatch.setattr(workers, "ALONE", 1)
    rows = [page(i % 90) if i % 7 else GERMAN for i in range(200)]
    written, reports = [], []
    for processes in (1, 2):
        kept, report = run(tmp_path, [{"text": row} for row in rows], processes=processes)
        written.append(kept)
        reports.append(report)
    assert written[0] == written[1] and reports[0] == reports[1] and len(written[0]) == 90


def test_malformed_rows_are_counted_and_most_of_them_are_an_error(tmp_path: Path) -> None:
    kept, report = run(tmp_path, [{"text": page(0)}, {"text": 5}, {"text": page(1)}])
    assert len(kept) == 2 and counts(report) == {"dropped reading: malformed row": 1}
    assert "in.jsonl, row 1: text: found a number (5)" in report.rules[0].first[0]
    with pytest.raises(UserError, match="row 0: text: found a number"):
        run(tmp_path, [{"text": 5}, {"text": 6}, {"text": page(1)}])


def test_nothing_left_is_an_error_and_leaves_what_was_there(tmp_path: Path) -> None:
    run(tmp_path, [{"text": page(0)}])
    before = (tmp_path / "out.jsonl").read_text()
    with pytest.raises(UserError) as caught:
        run(tmp_path, [{"text": GERMAN}, {"text": "x"}])
    assert (
        "nothing is left of 2 rows: 1 language: in another language (de), 1 gopher-quality: fewer than 50 words"
        in str(caught.value)
    )
    assert (tmp_path / "out.jsonl").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.report.json"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": ["gopher"]}, "steps: no such step 'gopher' — did you mean 'gopher-quality'?"),
        ({"steps": []}, "steps: no step is named — name some of language"),
        ({"steps": ["c4", "c4"]}, "steps: a step is named twice — name each once"),
        ({"steps": ["duplicates", "near-duplicates"]}, "steps: near-duplicates looks for equal rows, too"),
        ({"languages": ["english"]}, "language: no such language 'english'"),
        ({"similarity": 0}, "similarity: 0 is no similarity"),
        ({"dropped": Path("out.txt")}, "output: the output is a .jsonl, found out.txt"),
    ],
    ids=["typo", "none", "twice", "copies-twice", "language", "similarity", "ending"],
)
def test_mistakes(tmp_path: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, [{"text": page(0)}], **settings)
    assert said in str(caught.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_conversations_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(UserError, match="its rows have the messages layout; text is filtered — llama-ft data clean"):
        filter_files([Data(path=str(path))], tmp_path / "out.jsonl")


def test_the_command(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": page(0)}, {"text": "short"}])
    arguments = [
        "data",
        "filter",
        str(path),
        "-o",
        str(tmp_path / "out.jsonl"),
        "--steps",
        "gopher-quality, duplicates",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "2 rows",
        f"  {path}: gopher-quality, duplicates",
        "gopher-quality: 1 of 2 dropped",
        f"        1 dropped: fewer than 50 words ({path}, row 1: short)",
        "duplicates: 0 of 1 dropped",
        f"1 rows kept (50.0%), with {len(page(0)) / (len(page(0)) + 5):.1%} of the characters, in out.jsonl",
    ]
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2 and "out.jsonl exists — another name, or --overwrite" in again.output


def test_a_report_without_a_rule_is_short(tmp_path: Path) -> None:
    _, report = run(tmp_path, [{"text": page(0)}], steps=["duplicates"])
    out = io.StringIO()
    print_filter_report(report, out)
    assert out.getvalue().splitlines()[2:] == [
        "duplicates: 0 of 1 dropped",
        "1 rows kept (100.0%), with 100.0% of the characters, in out.jsonl",
    ]


def recipe_of(make: Make, path: Path, **source: Any) -> Recipe:
    entry = {"path": str(path), "layout": "text", **source}
    return make(data=[entry], sequence={"max_length": 4096}, training={"objective": "pretrain", "max_steps": 5})


def test_a_recipes_source_is_judged_in_preparation(tmp_path: Path, make_recipe: Make) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": f"{page(0)}\n{MENU}"}, {"text": GERMAN}, {"text": page(1)}])
    prepared = prepare_data(recipe_of(make_recipe, path, quality=["language", "c4"]))
    (counted,) = prepared.report.sources
    assert counted.dropped == {"language: in another language (de)": 1}
    assert counted.examples == {"language: in another language (de)": [1]}
    assert counted.notes == {"c4: lines without an end mark": 1}
    said = [prepared.tokenizer.decode(ids) for ids in prepared.train["input_ids"]]
    assert len(said) == 2 and not any(MENU in text for text in said)
    plain = prepare_data(recipe_of(make_recipe, path))
    assert len(plain.train) == 3 and plain.folder != prepared.folder
    german = prepare_data(recipe_of(make_recipe, path, quality=["language"], languages=["de", "en"]))
    assert len(german.train) == 3 and german.folder != plain.folder


def test_a_stream_is_judged_as_it_comes(tmp_path: Path, make_recipe: Make) -> None:
    """Also far behind the rows that are looked at before."""
    rows = [{"text": page(i)} for i in range(3)] * 360 + [{"text": GERMAN}, {"text": page(3)}]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    recipe = recipe_of(make_recipe, path, quality=["language"])
    recipe = recipe.model_copy(update={"mixture": recipe.mixture.model_copy(update={"streaming": True})})
    prepared = prepare_data(recipe)
    assert prepared.report.sources[0].dropped == {} and prepared.stream is not None
    assert sorted(one["row"] for one in prepared.stream.one_pass(0)) == [*range(1080), 1081]


def test_mistakes_of_a_recipe(tmp_path: Path, make_recipe: Make) -> None:
    path = write_jsonl(tmp_path / "in.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(UserError, match=r"data\.0\.quality: the steps judge text, not messages rows"):
        prepare_data(make_recipe(data=[{"path": str(path), "quality": ["c4"]}]))
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": page(0)}])
    with pytest.raises(UserError, match=r"data\.0\.languages: no such language 'en-GB'"):
        prepare_data(recipe_of(make_recipe, path, quality=["language"], languages=["en-GB"]))
