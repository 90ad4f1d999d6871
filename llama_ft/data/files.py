"""Rows out of a `.json` array or a `.jsonl` file, or a plain word about what the file is instead.

A `.jsonl` is read line by line. A `.json` is held as text once and decoded row by row, so a mistake in it has a row
number and the decoded rows never stand in memory together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llama_ft.data.problems import Problems, found
from llama_ft.errors import UserError, nearest

SUFFIXES = (".json", ".jsonl")
_SPACE = re.compile(r"[ \t\r\n]*")
_LFS = b"version https://git-lfs"
# In this order: the UTF-32 mark begins with the UTF-16 one.
_WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_CONFLICT = re.compile(r"\s*(<<<<<<< |=======\s|>>>>>>> )")


def shown(path: Path) -> str:
    """A path as messages and reports name it: relative if it lies in or just beside the working directory."""
    try:
        relative = os.path.relpath(path)
    except (ValueError, OSError):  # another drive, or a working directory that is gone
        return str(path)
    return str(path) if relative.startswith("../..") else relative


def check_file(path: Path, *, key: str | None = None) -> None:
    """Raises :class:`UserError` unless `path` is a readable, non-empty .json or .jsonl file that git really fetched."""

    def refuse(what: str, hint: str | None = None) -> None:
        raise UserError(what, where=shown(path), key=key, hint=hint)

    if path.is_dir():
        refuse("is a folder, a .json or .jsonl file is expected", f"files in it: {_listed(path)}")
    if not path.exists():
        refuse("no such file", _beside(path))
    if not path.is_file():
        refuse("is not an ordinary file", "name a .json or .jsonl file")
    if path.suffix.lower() not in SUFFIXES:
        name = f"'{path.suffix}' files" if path.suffix else "files without an ending"
        refuse(f"{name} are not read", "expected .json (an array of rows) or .jsonl (one row per line)")
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        refuse(f"cannot be read: {error.strerror or error}", "check the file and its permissions")
    if not head:
        refuse("the file is empty (0 bytes)", "expected rows: was it fetched completely?")
    if head.startswith(_LFS):
        refuse("is a Git LFS pointer, not the data itself", "fetch the data with `git lfs pull`")
    for mark, name in _WIDE_MARKS.items():
        if head.startswith(mark):
            refuse(f"is {name}, UTF-8 is expected", f"convert it: iconv -f {name} -t UTF-8")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_rows(path: Path, problems: Problems) -> Iterator[tuple[int, Any]]:
    """Yields (row, value): the 0-based position among the file's rows, and the decoded JSON value of any type.

    A byte order mark, CRLF and blank lines are tolerated. What is not JSON is noted in `problems`; reading goes on at
    the next line of a .jsonl and ends there in a .json.
    """
    before = problems.count
    reader = _lines if path.suffix.lower() == ".jsonl" else _array
    rows = 0
    for rows, (row, value) in enumerate(reader(path, problems), start=1):  # noqa: B007
        yield row, value
    if not rows and problems.count == before:
        problems.add("the file holds no rows", where=shown(path))


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, Any]]:
    row = -1
    with path.open("rb") as file:
        for number, raw in enumerate(file):
            try:
                line = raw.decode("utf-8-sig" if number == 0 else "utf-8")
            except UnicodeDecodeError as error:
                row += 1
                _not_utf8(path, row, raw[error.start], problems)
                continue
            if not line.strip():
                continue
            row += 1
            if row == 0 and line.lstrip().startswith("["):
                what = "a JSON array in a .jsonl file: found '[', expected one object per line"
                problems.add(what, where=f"{shown(path)}, row 0", hint=f"rename it to {path.stem}.json")
                return
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                _not_json(path, row, line, error, problems, last=not raw.endswith(b"\n"))
                if line.strip() == "{" or _CONFLICT.match(line):
                    return  # every further line would only repeat it
                continue
            yield row, value


def _array(path: Path, problems: Problems) -> Iterator[tuple[int, Any]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        good = raw[:start].decode("utf-8-sig")
        rows = sum(1 for _ in _elements(path, good, Problems()))
        _not_utf8(path, rows, raw[start], problems)
        return
    del raw
    yield from _elements(path, text, problems)


def _elements(path: Path, text: str, problems: Problems) -> Iterator[tuple[int, Any]]:
    """The elements of the one array that `text` must be."""
    decoder = json.JSONDecoder()
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        _no_array(path, text, at, problems)
        return
    at, row = _skip(text, at + 1), 0
    if text[at : at + 1] == "]":
        _tail(path, text, at + 1, problems)
        return
    while True:
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            _not_json(path, row, text, error, problems, last=True)
            return
        yield row, value
        at = _skip(text, at)
        row += 1
        mark = text[at : at + 1]
        if mark == "]":
            _tail(path, text, at + 1, problems)
            return
        if mark != ",":
            missing = json.JSONDecodeError("Expecting ',' or ']'", text, at)
            _not_json(path, row, text, missing, problems, last=True)
            return
        at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _tail(path: Path, text: str, at: int, problems: Problems) -> None:
    at = _skip(text, at)
    if at < len(text):
        line = text.count("\n", 0, at) + 1
        problems.add(
            f"text after the array's closing bracket (line {line}): found {found(text[at:])}", where=shown(path)
        )


def _no_array(path: Path, text: str, at: int, problems: Problems) -> None:
    """Says what a .json that does not begin with '[' is instead."""
    if at == len(text):
        problems.add("the file holds no rows, only blank space", where=shown(path))
        return
    rename = f"one row per line is .jsonl: rename it to {path.stem}.jsonl"
    try:
        value, end = json.JSONDecoder().raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        if _CONFLICT.match(text, at):
            _not_json(path, 0, text, error, problems, last=True)
            return
        opening = found(text[at : at + 30])
        if text[at] == "{":
            _not_json(path, 0, text, error, problems, last=True)
        else:
            problems.add(f"not JSON: begins with {opening}, expected '[' (an array of rows)", where=shown(path))
        return
    if _skip(text, end) < len(text):
        what = "lines of values where one array of rows is expected"
        problems.add(what, where=shown(path), hint=rename)
        return
    lists = [key for key, part in value.items() if isinstance(part, list)] if isinstance(value, dict) else []
    hint = f"the rows may be under '{lists[0]}': save that list alone" if lists else rename
    problems.add(f"found {found(value)}, expected an array of rows", where=shown(path), hint=hint)


def _not_json(path: Path, row: int, text: str, error: Exception, problems: Problems, *, last: bool) -> None:
    where = f"{shown(path)}, row {row}"
    if isinstance(error, RecursionError):
        problems.add("nested too deeply to be a row of data", where=where)
        return
    if not isinstance(error, json.JSONDecodeError):
        problems.add(f"not JSON that can be read: {error}", where=where)
        return
    line_start = text.rfind("\n", 0, error.pos) + 1
    if _CONFLICT.match(text, line_start) or _CONFLICT.match(text):
        problems.add("holds a git merge conflict", where=where, hint="resolve it, then save the file again")
        return
    # Python's reader says "unterminated" only where the text ends inside a string.
    ends = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    if last and ends:
        problems.add("the file ends in the middle of this row", where=where, hint="is it cut off? Fetch it again")
        return
    place = f"line {error.lineno}, column {error.colno}" if "\n" in text.rstrip() else f"column {error.colno}"
    at = found(text[error.pos : error.pos + 30])
    lines = path.suffix.lower() == ".jsonl"
    if lines and text.strip() == "{":
        problems.add("found '{' alone, expected a whole object on one line", where=where, hint="join each row's lines")
        return
    hint = "expected one JSON object per line" if lines else "expected a JSON array of objects"
    problems.add(f"not JSON ({error.msg}, {place}): found {at}", where=where, hint=hint)


def _not_utf8(path: Path, row: int, byte: int, problems: Problems) -> None:
    what = f"found byte 0x{byte:02x}, expected UTF-8 text"
    problems.add(
        what, where=f"{shown(path)}, row {row}", hint="save it as UTF-8 (for example iconv -f LATIN1 -t UTF-8)"
    )


def _listed(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES)
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "no .json or .jsonl"


def _beside(path: Path) -> str:
    """A hint for a missing file: the nearest name in its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"the folder {folder} does not exist either"
    match = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f"did you mean '{match}'?" if match else f"files there: {_listed(folder)}"
