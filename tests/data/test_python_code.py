"""The installed Python as rows: what is taken, both ways, divided by module, the same every time."""

from __future__ import annotations

import ast
import pickle
import platform
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data import python_code
from llama_ft.data.layouts import read_example
from llama_ft.data.problems import Problems
from llama_ft.data.python_code import library, modules, open_python
from llama_ft.data.python_functions import LONGEST, SHORTEST, Function, functions
from llama_ft.data.sources import open_sources
from llama_ft.errors import UserError
from llama_ft.recipe.schema import Data

MODULE = '''
import functools

def short(): "Says too little to be asked for, and on one line."

@functools.cache
def area(width: float, height: float = 1.0) -> float:
    """Return the area of a rectangle of the given width and height.

    Both are in metres, and must not be negative.
    """

    if width < 0 or height < 0:
        raise ValueError("""two
lines""")
    return width * height

class Box:
    """A class has a docstring too, but it is no function."""

    async def open(self, *names, **keys):
        """Open the box and hand out everything named that is in it, C:\\\\maybe."""
        return [name for name in names if name in keys]

    def todo(self):
        """This one has a long enough description but nothing to learn from."""
        raise NotImplementedError

    def quoted(self):
        """Say something that is not ASCII, as naïve writers of text often do."""
        return self.quoted

def undocumented(a, b):
    total = a + b
    return total
'''


def found(text: str) -> dict[str, Function]:
    return {one.name: one for one in functions(ast.parse(text), text)}


def test_documented_functions_and_methods_are_taken() -> None:
    assert list(found(MODULE)) == ["area", "Box.open"]


def test_a_function_and_its_parts() -> None:
    area = found(MODULE)["area"]
    assert area.kind == "function" and area.signature == "area(width: float, height: float=1.0) -> float"
    assert area.description == (
        "Return the area of a rectangle of the given width and height.\n\nBoth are in metres, and must not be negative."
    )
    head = "@functools.cache\ndef area(width: float, height: float = 1.0) -> float:\n"
    body = '    if width < 0 or height < 0:\n        raise ValueError("""two\nlines""")\n    return width * height'
    summary = '    """Return the area of a rectangle of the given width and height."""\n\n'
    assert area.code == head + summary + body and area.bare == head + body


def test_a_method_is_at_the_left_margin_and_an_unwritable_summary_is_left_out() -> None:
    method = found(MODULE)["Box.open"]
    assert method.kind == "coroutine method" and method.signature == "Box.open(self, *names, **keys)"
    assert method.code == method.bare  # its summary holds a backslash
    assert method.code.startswith("async def open(self, *names, **keys):\n    return [")


@pytest.mark.parametrize(
    "function",
    [
        'def f():\n    """>>> f()\n    1\n    2\n    3\n    4 and some more words to be long enough"""\n    return 1\n',
        'def f():\n    """=============================================\n    | 1 | 2 | 3 |"""\n    return 1\n',
        'def f():\n    """A description of a function that does nothing at all, yet."""\n    ...\n',
        'def f():\n    """A description of a function that does nothing at all, yet."""; return 1\n\n\n',
        'def f():\n    """A description of a function that is much too long."""\n' + "    x = 1\n" * 60,
        'class C:\n  def f(self):\n    """A description of one whose string would move."""\n    return """a\n  b"""\n',
    ],
)
def test_what_is_left_out(function: str) -> None:
    assert not found(function)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Any]]:
    """The rows of both splits of this machine's Python."""
    return {
        split: [value for _, value in open_python("docstrings", split).rows(Problems())] for split in python_code.SPLITS
    }


def test_rows_of_this_python_are_good_alpaca_rows(rows: dict[str, list[Any]]) -> None:
    problems = Problems()
    for row in rows["heldout"] + rows["train"][::20]:
        example = read_example(row, "alpaca", None, "row", problems)
        assert example is not None and example.dropped is None
    assert not problems
    assert len(rows["train"]) > 5000 and 0.005 < len(rows["heldout"]) / len(rows["train"]) < 0.15


def test_every_answer_in_code_parses_and_is_short(rows: dict[str, list[Any]]) -> None:
    for asked, documented in zip(rows["train"][::40], rows["train"][1::40], strict=False):
        assert asked["source"] == documented["source"]
        for code in (asked["output"], documented["input"]):
            (node,) = ast.parse(code).body
            assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            assert SHORTEST - 1 <= len(code.splitlines()) <= LONGEST
        assert asked["instruction"].endswith(documented["output"]) and not asked["input"]
        assert documented["output"] not in documented["input"]


def test_wordings_vary(rows: dict[str, list[Any]]) -> None:
    asked = {row["instruction"].partition("`")[0] for row in rows["heldout"] if not row["input"]}
    documented = {row["instruction"] for row in rows["heldout"] if row["input"]}
    assert len(asked) >= 4 and len(documented) >= 4


def test_splits_share_no_module() -> None:
    root = library()
    train, heldout = ({name for name, _ in modules(root, split)} for split in python_code.SPLITS)
    assert not train & heldout and 0.01 < len(heldout) / len(train | heldout) < 0.06
    first = {name.partition(".")[0] for name in train | heldout}
    assert {"json", "argparse", "asyncio"} <= first
    assert not first & {"site-packages", "test", "idlelib", "lib2to3", "encodings"}
    assert not [name for name in train | heldout if ".tests." in name or name.startswith("_sysconfigdata")]


def test_files_are_whole_modules() -> None:
    source = open_python("files", "heldout")
    first = [value for _, value in source.rows(Problems())]
    for row in first:
        assert row["text"] == (library() / row["path"]).read_text(encoding="utf-8")
    assert source.unchanged() and [value for _, value in source.rows(Problems())] == first


def test_long_files_are_those_of_many_characters() -> None:
    whole = {split: _texts("files", split) for split in python_code.SPLITS}
    long = {split: _texts("long-files", split) for split in python_code.SPLITS}
    for split in python_code.SPLITS:
        assert long[split] == {name: text for name, text in whole[split].items() if len(text) >= python_code.LONG}
        assert 0 < len(long[split]) < len(whole[split])


def test_functions_are_the_code_that_docstrings_ask_for(rows: dict[str, list[Any]]) -> None:
    for split in python_code.SPLITS:
        code = {(row["source"], row["output"] + "\n") for row in rows[split][::2]}
        source = open_python("functions", split)
        assert {(value["path"], value["text"]) for _, value in source.rows(Problems())} == code
    assert "return self.optional\n" in _texts("functions", "train")["__future__._Feature.getOptionalRelease"]


def _texts(what: python_code.What, split: str) -> dict[str, str]:
    return {value["path"]: value["text"] for _, value in open_python(what, split).rows(Problems())}


def test_the_fingerprint_names_the_python_and_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text(MODULE)
    source = open_python("docstrings", "train", root=tmp_path)
    assert source.revision == f"CPython {platform.python_version()}" and source.where(3).endswith("row 3")
    assert len(list(source.rows(Problems()))) == 4
    assert pickle.loads(pickle.dumps(source)) == source
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.0")
    assert open_python("docstrings", "train", root=tmp_path).fingerprint != source.fingerprint
    monkeypatch.undo()
    (tmp_path / "a.py").write_text(MODULE + "# more\n")
    assert not source.unchanged()


def test_copies_and_broken_modules_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(MODULE)
    (tmp_path / "b.py").write_text(MODULE)
    (tmp_path / "c.py").write_text("def f(:\n")
    (tmp_path / "d.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "e.py").write_text(MODULE.replace("area", "volume"))
    sources = {row["source"] for _, row in open_python("docstrings", "train", root=tmp_path).rows(Problems())}
    assert sources == {"a.area", "a.Box.open"}


def test_a_python_without_sources_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.0\.use: this Python's standard library holds no \.py files — install"):
        open_python("files", "train", root=tmp_path, key="data.0.use")


def test_the_cards_open() -> None:
    entries = [Data(use="python-docstrings", limit=4), Data(use="python-files", split="heldout", limit=2)]
    entries += [Data(use="python-long-files", limit=1), Data(use="python-functions", limit=1)]
    docstrings, files, *others = open_sources(entries)
    assert [source.layout for source in others] == ["text", "text"]
    assert (docstrings.layout, files.layout) == ("alpaca", "text") and docstrings.guessed is None
    assert len(list(docstrings.rows(Problems()))) == 4
    assert [set(value) for _, value in files.rows(Problems())] == [{"text", "path"}] * 2
    assert docstrings.label == f"CPython {platform.python_version()} docstrings (train)"
