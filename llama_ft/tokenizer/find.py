"""Which tokenizer belongs to a checkpoint: the one in its folder, or the one beside it whose size fits."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from llama_ft.errors import UserError
from llama_ft.tokenizer.native import open_native
from llama_ft.tokenizer.recognise import kind_of

# What a folder's tokenizer is called by convention, best first.
NAMED = ("tokenizer.json", "tokenizer.model")
# llama2.c names its own by size: tok512.bin, tok4096.model.
PATTERNS = ("tok*.model", "tok*.bin")


def find_tokenizer(source: Path, vocab_size: int | None = None) -> Path | None:
    """The tokenizer file of `source`: a tokenizer file, a checkpoint's folder, or a checkpoint file, looked beside.

    A folder's tokenizer.json comes before its tokenizer.model; Meta's layout may keep tokenizer.model one folder up.
    Beside a checkpoint file several tokenizers may lie: the one with exactly `vocab_size` tokens is meant. Two that
    hold the same vocabulary count as one.

    None when there is none. Raises :class:`UserError` with all candidates when none or several fit.
    """
    if source.is_file() and _is_tokenizer(source):
        return source
    folder = source if source.is_dir() else source.parent
    named = [folder / name for name in NAMED if (folder / name).is_file()]
    # Only llama2.c keeps several models and their tokenizers in one folder.
    if named and (source.suffix != ".bin" or (folder / "config.json").is_file()):
        return named[0]
    candidates = [*named, *(path for path in _others(folder) if path not in named and path != source)]
    if not candidates and _is_metas(folder) and (folder.parent / "tokenizer.model").is_file():
        candidates = [folder.parent / "tokenizer.model"]
    return _choose(candidates, source, vocab_size) if candidates else None


def read_json(file: Path) -> Tokenizer:
    """A tokenizer.json; :class:`UserError` when it is damaged."""
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust reader raises bare Exception for a damaged file
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise UserError(f"the tokenizer {file} cannot be read: {line}", hint="fetch it again") from error


def _is_tokenizer(path: Path) -> bool:
    """By content; a damaged file under a tokenizer's own name counts, so that the damage is told."""
    return path.name in NAMED or path.name == "tokenizer.bin" or kind_of(path) is not None


def _others(folder: Path) -> list[Path]:
    return [path for pattern in PATTERNS for path in sorted(folder.glob(pattern)) if path.is_file()]


def _is_metas(folder: Path) -> bool:
    return (folder / "params.json").is_file() or any(folder.glob("consolidated.*.pth"))


def _choose(candidates: list[Path], source: Path, vocab_size: int | None) -> Path:
    if len(candidates) == 1 and vocab_size is None:
        return candidates[0]
    sizes: dict[Path, str] = {}
    fitting: dict[Path, dict[str, int]] = {}
    for path in candidates:
        try:
            tokens = (read_json(path) if kind_of(path) == "huggingface" else open_native(path)).get_vocab()
        except UserError as error:
            sizes[path] = "damaged: " + "; ".join(problem.what for problem in error.problems)
            continue
        sizes[path] = f"{len(tokens):,} tokens"
        if vocab_size in (None, len(tokens)):
            fitting[path] = tokens
    first = next(iter(fitting), None)
    if first is not None and all(tokens == fitting[first] for tokens in fitting.values()):
        return first
    listed = "; ".join(f"{path.name}: {said}" for path, said in sizes.items())
    wanted = "is one" if vocab_size is None else f"has the model's {vocab_size:,} tokens"
    count = "more than one" if first is not None else "none"
    raise UserError(
        f"of the tokenizers beside {source}, {count} {wanted} ({listed})",
        hint="name the model's tokenizer, or leave it alone in that folder",
    )
