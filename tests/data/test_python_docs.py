"""The documentation of the installed Python as text: modules in the order of their files, and the reference."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from llama_ft.data.problems import Problems
from llama_ft.data.python_code import library, open_python
from llama_ft.data.python_docs import LEAST_CHARACTERS, documentation, topics, topics_file
from llama_ft.data.sources import open_sources
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Data

MODULE = '''"""Measures boxes, and says what is in them."""

import sys

def area(width: float, height: float = 1.0) -> float:
    """Return the area of a rectangle of the given width and height.

    Both are in metres.
    """
    def inner():
        """Nobody reads this."""

def _private():
    """Nobody outside is told."""

def undocumented(a):
    return a

class Box(dict, metaclass=type):
    """What things are kept in."""

    def __len__(self):
        """How many things are in it, counted anew."""

    async def open(self, *names, **keys):
        """Open the box and hand out everything named that is in it."""

if sys.platform == "win32":
    def late():
        """Defined on some systems alone."""
'''
SAID = """boxes
=====

Measures boxes, and says what is in them.

area(width: float, height: float=1.0) -> float

Return the area of a rectangle of the given width and height.

Both are in metres.

class Box(dict)

What things are kept in.

Box.__len__(self)

How many things are in it, counted anew.

Box.open(self, *names, **keys)

Open the box and hand out everything named that is in it.

late()

Defined on some systems alone.
"""


def test_a_module_says_what_it_says_of_itself() -> None:
    assert documentation("boxes", ast.parse(MODULE)) == SAID
    assert documentation("boxes", ast.parse('"""Measures boxes."""\n')) is None
    assert documentation("boxes", ast.parse(f'"""{"x" * LEAST_CHARACTERS}"""')) is not None
    assert documentation("boxes", ast.parse("def f(): pass\n" * 50)) is None


def test_topics_are_read_without_running_them() -> None:
    assert topics("topics = {'a': 'one\\n', 'b': '\\ntwo'}") == {"a": "one", "b": "two"}
    assert topics("import os\nx = 1\n") == {}


@pytest.mark.parametrize("what", ["docs", "reference"])
def test_this_python_is_told_of_in_two_splits(what: str) -> None:
    rows = {
        split: {value["path"]: value["text"] for _, value in open_python(what, split).rows(Problems())}  # type: ignore[arg-type]
        for split in ("train", "heldout")
    }
    assert len(rows["train"]) > 50 and 2 <= len(rows["heldout"]) <= 0.2 * len(rows["train"])
    assert not rows["train"].keys() & rows["heldout"].keys()
    both = rows["train"] | rows["heldout"]
    assert all(len(text) >= LEAST_CHARACTERS and text.endswith("\n") for text in both.values())
    expected = {"docs": ("argparse", "class ArgumentParser("), "reference": ("assert", 'The "assert" statement')}[what]
    assert expected[1] in both[expected[0]]


def test_an_installation_of_another_state_is_another_source(tmp_path: Path) -> None:
    (tmp_path / "boxes.py").write_text(MODULE)
    source = open_python("docs", "train", root=tmp_path)
    assert [value for _, value in source.rows(Problems())] == [{"text": SAID, "path": "boxes"}]
    assert pickle.loads(pickle.dumps(source)) == source and source.unchanged()
    with pytest.raises(UserError, match=r"this Python holds no reference \(pydoc_data/topics.py\) — install"):
        open_python("reference", "train", root=tmp_path)
    topics_file(tmp_path).parent.mkdir()
    topics_file(tmp_path).write_text(f"topics = {{'crates': '{'x' * LEAST_CHARACTERS}', 'short': 'x'}}")
    source = open_python("reference", "train", root=tmp_path)
    assert [value["path"] for _, value in source.rows(Problems())] == ["crates"]
    topics_file(tmp_path).write_text("topics = {}")
    assert not source.unchanged()


def test_the_cards_open() -> None:
    docs, reference = open_sources([Data(use="python-docs", limit=2), Data(use="python-reference", split="heldout")])
    assert docs.layout == reference.layout == "text" and docs.guessed is reference.guessed is None
    assert len(list(docs.rows(Problems()))) == 2
    assert topics_file(library()).is_file() and reference.where(0).endswith("reference (heldout), row 0")
