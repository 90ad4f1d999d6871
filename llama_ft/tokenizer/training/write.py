"""Writes a new tokenizer as a folder in Hugging Face's layout, and opens it again before it counts as written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llama_ft.errors import MachineFault, UserError
from llama_ft.files import publish, write_json
from llama_ft.tokenizer.convert import CLASS, write_tokenizer
from llama_ft.tokenizer.load import FALLBACK_LENGTH, begins_with_bos, load_tokenizer
from llama_ft.tokenizer.settings import NAMES
from llama_ft.tokenizer.training import byte_bpe, sentence_bpe

KINDS = ("byte-bpe", "sentencepiece")
RECORD = "training.json"
"""What a trained tokenizer was trained on; its presence marks a folder that may be replaced."""
SPACE = "▁"


@dataclass(frozen=True)
class Written:
    """A trained tokenizer on the disk. `special`: its control tokens by id; `checked`: texts that came back exactly."""

    folder: Path
    size: int
    special: dict[str, int]
    longest: list[str]
    checked: int


def train_tokenizer(
    kind: str,
    texts: Iterable[str],
    vocab_size: int,
    folder: Path,
    *,
    special: Sequence[str] = (),
    samples: Callable[[], Sequence[str]] = lambda: (),
    record: Callable[[], Mapping[str, Any]] = dict,
    overwrite: bool = False,
    show_progress: bool = False,
) -> Written:
    """Trains a tokenizer of `kind` (KINDS) on `texts` and writes `folder`, whole or not at all.

    The folder holds tokenizer.json, tokenizer_config.json, special_tokens_map.json, training.json and, of kind
    sentencepiece, tokenizer.model. `samples` and `record` are asked after the texts were read: texts on which the
    written tokenizer is tried, and what training.json says about the sources.

    Raises :class:`UserError` for an unknown kind, a folder that is not free, and what training raises.
    """
    check_folder(folder, overwrite=overwrite)
    if kind == "byte-bpe":
        made: Tokenizer | bytes = byte_bpe.train_byte_bpe(texts, vocab_size, special, show_progress=show_progress)
    elif kind == "sentencepiece":
        made = sentence_bpe.train_sentence_bpe(texts, vocab_size, special)
    else:
        raise UserError(f"no such kind '{kind}'", key="kind", hint=f"{' or '.join(KINDS)}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
            new = Path(aside, "tokenizer")
            new.mkdir()
            _write(made, list(special), new, aside)
            write_json(new / RECORD, {"kind": kind, "vocab_size": vocab_size, "special": list(special), **record()})
            written = check_written(new, vocab_size, samples(), exact_spaces=kind == "byte-bpe")
            check_folder(folder, overwrite=overwrite)  # training takes long: what is there by now?
            publish(new, folder)
    except OSError as error:
        raise MachineFault(f"could not write {folder}: {error.strerror or error}") from error
    return Written(folder, *written)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raises :class:`UserError` unless `folder` is free, or may be replaced: it holds a trained tokenizer."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file, a folder is needed", key="output", hint="name another")
    if not (folder / RECORD).is_file() or (folder / "config.json").exists():
        what = f"{folder} is not empty and holds no trained tokenizer: it will not be replaced"
        raise UserError(what, key="output", hint="name another folder")
    if not overwrite:
        raise UserError(f"{folder} exists", key="output", hint="another folder, or --overwrite")


def _write(made: Tokenizer | bytes, special: list[str], folder: Path, aside: str) -> None:
    """The tokenizer's own files, into an empty folder."""
    roles: dict[str, str]
    if isinstance(made, bytes):
        model = Path(aside, "tokenizer.model")
        model.write_bytes(made)
        write_tokenizer(model, folder)
        roles = {**sentence_bpe.ROLES, "pad_token": sentence_bpe.ROLES["unk_token"]}
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")) | roles
    else:
        made.save(str(folder / "tokenizer.json"))
        roles = byte_bpe.ROLES
        config = {
            "tokenizer_class": CLASS,
            "add_bos_token": True,
            "add_eos_token": False,
            **roles,
            "model_max_length": FALLBACK_LENGTH,
            "clean_up_tokenization_spaces": False,
        }
    # Others than the four roles are control tokens to llama.cpp's converter only if they are listed.
    extra = {"additional_special_tokens": special} if special else {}
    write_json(folder / "tokenizer_config.json", {**config, **extra})
    named = {name: roles[name] for name in NAMES if name in roles}
    write_json(folder / "special_tokens_map.json", {**named, **extra})


def check_written(
    folder: Path, vocab_size: int, samples: Sequence[str], *, exact_spaces: bool
) -> tuple[int, dict[str, int], list[str], int]:
    """Opens a folder as a run would: (pieces, control tokens, the longest pieces, samples that came back exactly).

    `exact_spaces`: whether `▁` in a text comes back as itself; SentencePiece's own sign for a space does not there.
    Raises RuntimeError where it is not what was trained: a defect of this project, not the user's.
    """
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != vocab_size or not begins_with_bos(tokenizer) or tokenizer.eos_token is None:
        raise RuntimeError(f"the written tokenizer has {len(tokenizer)} tokens, BOS {tokenizer.bos_token!r}")
    backend = tokenizer.backend_tokenizer
    for text in samples:
        ids = backend.encode(text, add_special_tokens=False).ids
        back = backend.decode(ids, skip_special_tokens=False)
        if back != (text if exact_spaces else text.replace(SPACE, " ")):
            raise RuntimeError(f"a text does not come back: {text[:200]!r} as {back[:200]!r}")
    control = {token.content: number for number, token in sorted(tokenizer.added_tokens_decoder.items())}
    ordinary = [number for number in range(vocab_size) if number not in control.values()]
    longest = sorted((backend.decode([number]) for number in ordinary), key=lambda piece: (-len(piece), piece))
    return len(tokenizer), control, longest[:5], len(samples)


def versions() -> dict[str, str]:
    """The versions of what made a tokenizer, for its record."""
    from importlib.metadata import version

    return {name: version(name) for name in ("llama-ft", "tokenizers", "sentencepiece", "transformers")}
