"""Prepared documents on disk: Arrow files in a cache folder that is whole or absent, safe for many processes.

A folder is written aside and renamed under a lock, so a killed process leaves nothing that looks finished. Its
`manifest.json` holds the hash of every file in it: a folder that does not match is made again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from llama_ft.data.documents import Document
from llama_ft.errors import MachineFault

MANIFEST = "manifest.json"
_COLUMNS = [
    pa.field("input_ids", pa.list_(pa.int32())),
    pa.field("labels", pa.list_(pa.int32())),
    pa.field("row", pa.int64()),
    pa.field("source", pa.int32()),
    pa.field("length", pa.int32()),
    pa.field("labelled", pa.int32()),
]
SCHEMA = pa.schema(_COLUMNS)
# Before a holdout is drawn, its candidates keep their conversation and its keyed hash beside them.
DRAW_SCHEMA = pa.schema([*_COLUMNS, pa.field("messages", pa.string()), pa.field("draw", pa.binary(16))])
_BATCH = 1000


class DocumentWriter:
    """Writes documents to an Arrow stream file in batches; a context manager."""

    def __init__(self, path: Path, schema: pa.Schema = SCHEMA):
        self._schema = schema
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, schema)
        self._pending: list[tuple[Document, int, bytes]] = []

    def __enter__(self) -> DocumentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._stream.close()
        self._file.close()

    def add(self, document: Document, source: int, draw: bytes = b"") -> None:
        """Appends one kept document of source number `source`; `draw` only matters for the draw schema."""
        self._pending.append((document, source, draw))
        if len(self._pending) == _BATCH:
            self._flush()

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Appends rows that were read from another such file, their extra columns left out."""
        self._flush()
        if batch.num_rows:
            self._stream.write_batch(batch.select(self._schema.names))

    def _flush(self) -> None:
        if not self._pending:
            return
        documents = [document for document, *_ in self._pending]
        arrays = [
            _lists([document.ids for document in documents]),
            _lists([document.labels for document in documents]),
            pa.array([document.row for document in documents], pa.int64()),
            pa.array([source for _, source, _ in self._pending], pa.int32()),
            pa.array([len(document.ids) for document in documents], pa.int32()),
            pa.array([document.labelled for document in documents], pa.int32()),
        ]
        if len(self._schema) > len(arrays):
            arrays.append(pa.array([json.dumps(d.conversation) for d in documents], pa.string()))
            arrays.append(pa.array([draw for *_, draw in self._pending], pa.binary(16)))
        self._stream.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._pending = []


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of an Arrow stream file, one at a time."""
    with pa.memory_map(str(path)) as file:
        yield from pa.ipc.open_stream(file)


def open_folder(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole cache folder, or None when it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if all(_hash(folder / name) == digest for name, digest in files.items()):
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return None


def open_or_build(folder: Path, build: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The manifest of `folder`, made by `build(aside)` if need be; one process builds, the others wait for it.

    `build` writes its files into an empty folder aside and returns what the manifest is to say; it may raise, and then
    nothing is left. Raises :class:`MachineFault` when the folder cannot be written (disk full, no permission).
    """
    manifest = open_folder(folder)
    if manifest is not None:
        return manifest
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            manifest = open_folder(folder)  # another process may have built it while this one waited
            if manifest is not None:
                return manifest
            for stale in (folder, *folder.parent.glob(f".{folder.name}-*")):
                shutil.rmtree(stale, ignore_errors=True)  # damaged, or left by a killed process: the lock is ours
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
                made = Path(aside, "made")
                made.mkdir()
                manifest = build(made)
                manifest["files"] = {path.name: _hash(path) for path in sorted(made.iterdir())}
                (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
                made.rename(folder)
            return manifest
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        hint = "free some space, or set LLAMA_FT_CACHE to a folder elsewhere; then start again"
        raise MachineFault(f"data could not be prepared in {folder.parent}: {reason}", hint=hint) from error


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _lists(arrays: list[np.ndarray]) -> pa.ListArray:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int32)
    np.cumsum([len(array) for array in arrays], out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays), pa.int32()))
