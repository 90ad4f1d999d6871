"""A folder that is published replaces the old one at once, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.files import publish


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a").write_text(text)
    return path


def test_publish_replaces(tmp_path):
    old, new = folder(tmp_path / "final", "old"), folder(tmp_path / "new", "new")
    publish(new, old)
    assert (tmp_path / "final" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_what_fails_to_be_published_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = folder(tmp_path / "final", "old"), folder(tmp_path / "new", "new")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self == new:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Input/output"):
        publish(new, old)
    assert (tmp_path / "final" / "a").read_text() == "old"
    assert (tmp_path / "new" / "a").read_text() == "new"
