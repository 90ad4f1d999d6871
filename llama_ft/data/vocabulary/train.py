"""`llama-ft tokenizer train`: a tokenizer learnt from sources of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from llama_ft.data.show import rows_line
from llama_ft.data.vocabulary.texts import Counted, Texts, open_texts
from llama_ft.errors import UserError
from llama_ft.tokenizer.training.write import KINDS, Written, check_folder, train_tokenizer, versions


def train_on_sources(
    names: Sequence[str],
    folder: Path,
    *,
    vocab_size: int,
    kind: str = "byte-bpe",
    special: Sequence[str] = (),
    limit: int | None = None,
    overwrite: bool = False,
) -> tuple[Written, Texts]:
    """Trains on the texts of `names` (files, folders, patterns, cards) and writes `folder`.

    `limit`: rows of each source. Returns what was written and what was read. Raises :class:`UserError` for sources that
    are no text, a folder that is not free, a vocabulary that the text or the control tokens do not fit.
    """
    if kind not in KINDS:
        raise UserError(f"no such kind '{kind}'", key="kind", hint=" or ".join(KINDS))
    check_folder(folder, overwrite=overwrite)
    texts = open_texts(names, limit=limit)
    bars = kind == "byte-bpe" and sys.stderr.isatty()  # the library's own, which would share a line with ours

    def record() -> dict[str, object]:
        return {"limit": limit, "sources": texts.record(), "versions": versions()}

    with rows_line(shown=not bars) as progress:
        texts.progress = progress
        written = train_tokenizer(
            kind,
            texts,
            vocab_size,
            folder,
            special=special,
            samples=lambda: texts.samples,
            record=record,
            overwrite=overwrite,
            show_progress=bars,
        )
    return written, texts


def print_training(names: Sequence[str], folder: Path, **settings: object) -> None:
    """The same, telling on stdout what was read and what was made."""
    start = time.perf_counter()
    written, texts = train_on_sources(names, folder, **settings)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    for counted in texts.counted:
        print(f"{counted.source}: {_amount(counted)}")
    learnt = written.size - 256 - len(written.special)
    print(f"{written.size:,} pieces: {len(written.special)} control tokens, 256 bytes, {learnt:,} learnt")
    print(f"control tokens: {', '.join(f'{name} {number}' for name, number in written.special.items())}")
    print(f"longest pieces: {', '.join(map(_shown, written.longest))}")
    checked = (
        "1 text comes back as it was" if written.checked == 1 else f"{written.checked:,} texts come back as they were"
    )
    print(f"opened again: BOS before a text, {checked}")
    print(f"{written.folder} ({seconds:.1f} s)")


def _amount(counted: Counted) -> str:
    dropped = f", {counted.dropped:,} without text" if counted.dropped else ""
    rows = f"{counted.rows:,} {'row' if counted.rows == 1 else 'rows'}"
    return f"{rows}{dropped}, {counted.characters:,} characters, {counted.bytes / 1e6:,.2f} MB"


def _shown(piece: str) -> str:
    return repr(piece if len(piece) <= 24 else f"{piece[:24]}…")
