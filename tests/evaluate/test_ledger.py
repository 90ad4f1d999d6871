"""The ledger: no figure without its source, no recipe without its row, and a page in step with its files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from llama_ft.errors import UserError
from llama_ft.evaluate import ledger
from llama_ft.evaluate.ledger import Entry, page, read_ledger
from llama_ft.evaluate.ledger_page import cell
from llama_ft.plan.commands import plan_recipe
from llama_ft.recipe import load_recipe
from llama_ft.recipe.extends import shipped_recipes
from tests.conftest import ROOT

FOLDER = ROOT / "reproductions"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the ledger is not shipped with the package")
MEASURED = """measured:
  - what: held-out loss
    value: 2.0 → 1.0
    command: llama-ft train alpaca/llama-7b-full
    seed: 42
    hardware: 4 × H100
    date: 2026-11-22
    commit: "3292cca"
    evidence: proof.md
"""


def test_a_figure_stands_once(tmp_path):
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (tmp_path / "proof.md").touch()
    (folder / "one.yaml").write_text(MEASURED)
    assert read_ledger(folder)
    (folder / "one.yaml").write_text(MEASURED + MEASURED.removeprefix("measured:\n"))
    with pytest.raises(UserError, match=r"one.yaml.*'held-out loss' stands here 2 times"):
        read_ledger(folder)


@pytest.fixture(scope="module")
def entries() -> dict[str, Entry]:
    return read_ledger(FOLDER)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ledger that a test may damage, in a checkout of its own."""
    shutil.copytree(FOLDER, tmp_path / "reproductions")
    for name in ("docs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setattr(ledger, "shipped_root", lambda: tmp_path)
    return tmp_path / "reproductions"


def test_the_page_is_in_step() -> None:
    """If this fails: python -m llama_ft.evaluate.ledger"""
    assert (ROOT / "docs" / "reproductions.md").read_text(encoding="utf-8") == page()


def test_every_recipe_that_reproduces_something_has_a_row(copied: Path) -> None:
    names = [name for name, path in shipped_recipes().items() if load_recipe(path, look_up=False).reproduces]
    assert len(names) >= 40
    text = page()
    assert all(f"| [`{name}`](#" in text for name in names)
    (copied / "vicuna" / "llama-7b-v1.3.yaml").unlink()
    (copied / "vicuna" / "llama-7b-v1.4.yaml").write_text("needs: {hardware: 1xH100-80GB, hours: 1}\n")
    with pytest.raises(UserError) as caught:
        page()
    assert "vicuna/llama-7b-v1.3 says what it reproduces and has no entry" in str(caught.value)
    assert "vicuna/llama-7b-v1.4.yaml: there is no such recipe" in str(caught.value)


@pytest.mark.parametrize("part", ["command", "date", "commit", "seed", "hardware", "evidence"])
def test_no_figure_without_what_it_takes_to_get_it_again(tmp_path: Path, part: str) -> None:
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (tmp_path / "proof.md").write_text("1.0")
    (folder / "a.yaml").write_text(MEASURED)
    assert read_ledger(folder)["a"].measured[0].value == "2.0 → 1.0"
    (folder / "a.yaml").write_text(re.sub(rf"    {part}: .*\n", "", MEASURED))
    with pytest.raises(UserError, match=f"measured.0.{part}: field required"):
        read_ledger(folder)


def test_every_mistake_of_every_file_is_told_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "reproductions"
    folder.mkdir()
    (folder / "a.yaml").write_text(MEASURED + "measurd: []\n")
    (folder / "b.yaml").write_text("note: nothing\n")
    (folder / "c.yaml").write_text("published: [{what: score, value: '1', source: a friend}]\nneeds: {hardware: x}\n")
    (folder / "d.yaml").write_text("[unclosed\n")
    (folder / "e.yaml").write_text(MEASURED)
    (folder / "f.yaml").write_text(MEASURED + "measured: []\n")
    (folder / "g.yaml").write_bytes(b"note: \xff\n")
    (folder / "h.yaml").write_text(MEASURED.replace("2026-11-22", "2026-13-45"))
    with pytest.raises(UserError) as caught:
        read_ledger(folder)
    told = [(Path(str(problem.where)).name.partition(":")[0], problem.key) for problem in caught.value.problems]
    assert told == [
        ("a.yaml", "measurd"),
        ("b.yaml", "needs"),
        ("c.yaml", "published.0.source"),
        ("c.yaml", "needs.hours"),
        ("d.yaml", None),
        ("e.yaml", "evidence"),
        ("f.yaml", "measured"),
        ("f.yaml", "evidence"),
        ("g.yaml", None),
        ("h.yaml", "measured.0.date"),
    ]
    assert "measured is given twice" in str(caught.value), "else the first figures would be gone without a word"


def test_a_figure_of_ours_stands_in_its_evidence(entries: dict[str, Entry]) -> None:
    figures = [(name, one) for name, entry in entries.items() for one in entry.measured]
    assert len(figures) >= 10
    for name, one in figures:
        evidence = (ROOT / one.evidence).read_text(encoding="utf-8")
        for number in re.findall(r"\d+(?:\.\d+)?", one.value):
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", evidence), (
                f"{name}: {number} is not in {one.evidence}"
            )


def test_commands_name_recipes_and_programs_that_are_there(entries: dict[str, Entry]) -> None:
    for name, entry in entries.items():
        for one in entry.measured:
            words = one.command.split()
            if words[:2] == ["llama-ft", "train"]:
                assert words[2] == name
            elif words[:2] == ["python", "-m"]:
                assert (ROOT / f"{words[2].replace('.', '/')}.py").is_file()
            else:
                assert words[0] == "make" and f"\n{words[1]}:" in (ROOT / "Makefile").read_text()


def test_hours_are_those_of_the_plan(entries: dict[str, Entry], capsys: pytest.CaptureFixture[str]) -> None:
    """A calculation from the recipe and its cards alone; two digits stand in the file."""
    planned = {
        name: entry.needs for name, entry in entries.items() if entry.needs and entry.needs.hardware[0].isdigit()
    }
    planned = {name: needs for name, needs in planned.items() if "H100" in needs.hardware}
    assert len(planned) >= 20
    off = {}
    for name, needs in planned.items():
        plan_recipe(name, [], hardware=needs.hardware, as_json_text=True)
        found = json.loads(capsys.readouterr().out)["seconds"]["total"] / 3600
        if not 0.8 < found / needs.hours < 1.25:
            off[name] = (needs.hours, round(found, 2))
    assert not off, "the plan says otherwise: mend needs.hours, then python -m llama_ft.evaluate.ledger"


def test_the_page_hides_nothing(entries: dict[str, Entry]) -> None:
    text = page()
    for name, entry in entries.items():
        recipe = load_recipe(shipped_recipes()[name], look_up=False)
        _, _, part = text.partition(f"\n### {name}\n")
        part = part.partition("\n### ")[0]
        for one in entry.published:
            assert one.value in part and one.source in part
        for figure in entry.measured:
            for said in (figure.value, figure.commit, str(figure.date), *figure.deviations):
                assert said in part
            assert all(line in part for line in figure.command.splitlines())
        assert ("ot yet run" in part) == (entry.needs is not None)
        assert recipe.reproduces is not None
        assert all(deviation in part for deviation in recipe.reproduces.deviations)


def test_it_is_not_in_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "shipped_root", lambda: tmp_path)
    with pytest.raises(UserError, match="in a checkout"):
        page()


def test_files_are_written_as_people_write_them() -> None:
    for path in FOLDER.rglob("*.yaml"):
        assert yaml.safe_load(path.read_text()) and "\t" not in path.read_text()


def test_the_check_tells_a_page_that_is_out_of_step(
    copied: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page_file = copied.parent / "docs" / "reproductions.md"
    (copied.parent / "docs").unlink()
    page_file.parent.mkdir()
    for name in {one.evidence for entry in read_ledger(FOLDER).values() for one in entry.measured}:
        if name.startswith("docs/"):
            (copied.parent / name).write_text("")
    monkeypatch.setattr("sys.argv", ["ledger"])
    ledger.main()
    assert page_file.read_text(encoding="utf-8") == page()
    monkeypatch.setattr("sys.argv", ["ledger", "--check"])
    ledger.main()
    page_file.write_text(page_file.read_text() + "more")
    with pytest.raises(SystemExit) as left:
        ledger.main()
    assert left.value.code == 1 and "is out of step" in capsys.readouterr().err
    assert page_file.read_text().endswith("more"), "it is told and not mended"


def test_a_figure_in_two_lines_stays_in_its_cell() -> None:
    assert cell("a |\n b") == "a \\| b"
