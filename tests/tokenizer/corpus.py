"""Every text in the folder of real data: prose, instructions, chat in English and Chinese, code, preferences."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDERS = ("text", "instruct", "chat", "code", "preference", "eval")


def corpus(real_data: Path) -> list[str]:
    """All strings of the JSON files, keys aside, and each plain text file whole and by line; in a fixed order."""
    texts: list[str] = []
    for folder in FOLDERS:
        for path in sorted((real_data / folder).iterdir()):
            data = path.read_bytes()
            text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
            if ".json" in path.name:
                rows = text.splitlines() if ".jsonl" in path.name else [text]
                texts += [one for row in rows if row.strip() for one in strings(json.loads(row))]
            else:
                texts += [text, *text.splitlines(keepends=True)]
    return texts


def strings(value: Any) -> Iterator[str]:
    """The strings in a JSON value that can be encoded (a lone surrogate cannot)."""
    if isinstance(value, str):
        if not any("\ud800" <= char <= "\udfff" for char in value):
            yield value
    elif isinstance(value, (list, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from strings(one)
