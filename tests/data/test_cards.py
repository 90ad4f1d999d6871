"""Cards: the shipped ones, and every mistake of a card at its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.data.cards import Files, Hub, Python, load_card
from llama_ft.errors import UserError
from llama_ft.paths import shipped_root

SHIPPED = sorted(path.stem for path in (shipped_root() / "datasets").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_cards(name: str) -> None:
    card = load_card(name)
    assert card.name == name and card.licence and card.description and card.layout
    if isinstance(card.source, Python):
        assert card.rows is None and card.splits == ["train", "heldout"]  # another Python, other rows
    elif card.rows is not None:
        assert set(card.rows) == set(card.splits)
    if isinstance(card.source, Files):
        assert all(card.file(split).is_file() for split in card.splits)


def test_alpaca() -> None:
    card = load_card("alpaca")
    assert card.layout == "alpaca" and card.splits == ["train"] and card.rows == {"train": 52002}
    assert isinstance(card.source, Hub) and card.source.hub == "tatsu-lab/alpaca"
    assert card.licence == "CC BY-NC 4.0" and card.homepage == "https://github.com/tatsu-lab/stanford_alpaca"


def test_datasets_folder_holds_no_python() -> None:
    assert not list((shipped_root() / "datasets").rglob("*.py"))


def test_files_are_beside_the_card(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ntitle: Mine\nlayout: alpaca\ncolumns: {input: context, output: response}\n"
        "source: {files: {train: rows/train.jsonl}}\n"
    )
    card = load_card(str(path))
    assert card.file("train") == (tmp_path / "rows" / "train.jsonl").resolve()
    assert card.columns == {"input": "context", "output": "response"}
    with pytest.raises(UserError) as caught:
        card.check_split("trian", key="data.0.split")
    assert str(caught.value) == "data.0.split: the card 'mine' has no split 'trian' — did you mean 'train'?"


def write_card(folder: Path, source: str) -> Path:
    path = folder / "card.yaml"
    path.write_text(f"name: card\ntitle: T\nsource: {source}\n")
    return path


def test_a_card_may_name_a_folder_a_pattern_and_no_layout(tmp_path: Path) -> None:
    card = load_card(str(write_card(tmp_path, "{files: {train: rows, all: 'rows/**/*.jsonl.gz'}}")))
    assert card.file("train") == tmp_path / "rows" and card.file("all") == tmp_path / "rows" / "**" / "*.jsonl.gz"
    assert card.layout is None


def test_the_installed_python_is_a_source(tmp_path: Path) -> None:
    card = load_card(str(write_card(tmp_path, "{python: files}")))
    assert isinstance(card.source, Python) and card.splits == ["train", "heldout"]
    with pytest.raises(UserError, match="the card 'card' has no split 'held_out' — did you mean 'heldout'"):
        card.check_split("held_out")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{python: function}", "3:10: source.python: has the wrong value — expected one of 'docstrings', 'files'"),
        ("{python: files, revision: x}", "3:25: source.revision: unknown key"),
        ("{pyhton: files}", "unknown key — did you mean 'python'?"),
    ],
)
def test_mistakes_in_a_source(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_card(str(write_card(tmp_path, source)))
    assert said in str(caught.value)


def test_unknown_card() -> None:
    with pytest.raises(UserError) as caught:
        load_card("alpcaa", key="data.0.use")
    assert str(caught.value) == "data.0.use: no such card 'alpcaa' — did you mean 'alpaca'?"


def test_all_mistakes_at_their_places(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "name: bad\n"
        "layuot: alpaca\n"
        "source:\n"
        "  files: {train: a.jsonl}\n"
        "  reversion: main\n"
        "columns: {input: 3}\n"
        "layout: alpacca\n"
    )
    with pytest.raises(UserError) as caught:
        load_card(str(path))
    said = [str(problem).replace(str(path), "CARD") for problem in caught.value.problems]
    assert said == [
        "CARD:1:1: title: is missing — every card needs it",
        "CARD:2:1: layuot: unknown key — did you mean 'layout'?",
        "CARD:5:3: source.reversion: unknown key — did you mean 'revision'?",
        "CARD:6:11: columns.input: has the wrong value — expected: Input should be a valid string",
        "CARD:7:1: layout: has the wrong value — expected one of 'alpaca', 'sharegpt', 'messages', 'preference', "
        "'rated', 'text' or 'prompt-completion'",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "the file holds a list"),
        ("name: x\nname: y\n", "name is given twice"),
        ("name: [\n", "CARD:"),
        ("name: x\n\ttitle: y\n", "tab"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_card(str(path))
    assert said in str(caught.value).replace(str(path), "CARD")
