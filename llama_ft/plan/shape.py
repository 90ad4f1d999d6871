"""The sizes of a recipe's base without its weights and without the hub: what is known before anything is fetched."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from llama_ft.errors import UserError
from llama_ft.llama.shapes import PRESETS, Shape
from llama_ft.llama.smollm2 import NAME as SMOLLM2
from llama_ft.paths import cache_dir
from llama_ft.recipe.schema_model import Model

PUBLISHED: tuple[tuple[str, str], ...] = (
    (r"(meta-llama|nousresearch)/llama-2-7b(-chat)?-hf|lmsys/vicuna-7b-v1\.5(-16k)?", "llama-2-7b"),
    (r"(meta-llama|nousresearch)/llama-2-13b(-chat)?-hf|lmsys/vicuna-13b-v1\.5(-16k)?", "llama-2-13b"),
    (r"(meta-llama|nousresearch)/llama-2-70b(-chat)?-hf", "llama-2-70b"),
    (r"huggyllama/llama-7b|lmsys/vicuna-7b-v1\.[13]", "llama-1-7b"),
    (r"huggyllama/llama-13b|lmsys/vicuna-13b-v1\.[13]", "llama-1-13b"),
    (r"huggyllama/llama-30b|lmsys/vicuna-33b-v1\.3", "llama-1-33b"),
    (r"huggyllama/llama-65b", "llama-1-65b"),
    (r"(codellama|meta-llama)/codellama-7b(-instruct)?-hf", "code-llama-7b"),
    (r"(codellama|meta-llama)/codellama-13b(-instruct)?-hf", "code-llama-13b"),
    (r"(codellama|meta-llama)/codellama-34b(-instruct)?-hf", "code-llama-34b"),
    (r"(meta-llama|nousresearch)/meta-llama-3-8b(-instruct)?", "llama-3-8b"),
    (r"(meta-llama|nousresearch)/meta-llama-3-70b(-instruct)?", "llama-3-70b"),
    (r"(meta-llama|nousresearch|unsloth)/(meta-)?llama-3\.1-8b(-instruct)?", "llama-3.1-8b"),
    (r"(meta-llama|nousresearch|unsloth)/(meta-)?llama-3\.[13]-70b(-instruct)?", "llama-3.1-70b"),
    (r"meta-llama/(meta-)?llama-3\.1-405b(-instruct)?", "llama-3.1-405b"),
    (r"(meta-llama|unsloth)/llama-3\.2-1b(-instruct)?", "llama-3.2-1b"),
    (r"(meta-llama|unsloth)/llama-3\.2-3b(-instruct)?", "llama-3.2-3b"),
    (r"tinyllama/tinyllama[-_]1\.1b.*", "tinyllama-1.1b"),
    (r"huggingfacetb/smollm2-135m(-instruct)?", "smollm2-135m"),
    (r"huggingfacetb/smollm2-360m(-instruct)?", "smollm2-360m"),
    (r"huggingfacetb/smollm2-1\.7b(-instruct)?", "smollm2-1.7b"),
)
"""Hub ids, as regexes over the id in lower case, and the preset that has their sizes (llama_ft/llama/shapes.py)."""
VOCABULARIES = {"allenai/llama-3.1-tulu-3-8b-sft": ("llama-3.1-8b", 128_264)}
"""Published models of a preset's sizes with more rows in their embedding (a padding token, rounded up to eight)."""


@dataclass(frozen=True)
class Known:
    """A base's sizes, where they were read, and the type its weights are stored in where that is known."""

    shape: Shape
    source: str
    stored: str | None = None


def known_shape(model: Model) -> Known:
    """The shape of `model.base`. UserError with what to do where neither a file nor a table says it."""
    base = model.base
    if base == SMOLLM2:
        return Known(PRESETS["smollm2-135m"], "the preset smollm2-135m", "float32")
    if base.startswith("preset:"):
        name = base.removeprefix("preset:")
        return Known(PRESETS[name], f"the preset {name}")
    path = Path(base).expanduser()
    if path.exists():
        return _of_path(path)
    cached = cached_file(base, "config.json", model.revision)
    if cached is not None:
        return _of_config(cached, f"config.json of {base} in the hub's cache", None)
    published = published_shape(base)
    if published is not None:
        return published
    hint = "fetch it once (llama-ft preview RECIPE does), or plan with its sizes: model.base=preset:llama-3.1-8b"
    raise UserError(f"the sizes of {base} are not known and it is not in the hub's cache", key="model.base", hint=hint)


def published_shape(hub_id: str) -> Known | None:
    """The shape of a well-known hub id, None for another."""
    name = hub_id.lower()
    if name in VOCABULARIES:
        preset, rows = VOCABULARIES[name]
        return Known(replace(PRESETS[preset], vocabulary=rows), f"the table's {preset} with {rows:,} tokens")
    for pattern, preset in PUBLISHED:
        if re.fullmatch(pattern, name):
            return Known(PRESETS[preset], f"the table's {preset}", "bfloat16")
    return None


def cached_file(hub_id: str, name: str, revision: str | None) -> Path | None:
    """A file of a hub repository that the hub's cache holds already."""
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError, OSError):
        found = try_to_load_from_cache(hub_id, name, revision=revision)
        return Path(found) if isinstance(found, str) else None
    return None


def _of_path(path: Path) -> Known:
    """A folder in HF layout by its config.json; other checkpoints by what their conversion says, without weights."""
    if path.is_dir() and (path / "config.json").is_file():
        return _of_config(path / "config.json", f"{path / 'config.json'}", stored_type(path))
    from llama_ft.llama.base import locate_base  # reads the header with torch's help where the format needs it

    folder = locate_base(str(path), weights=False)
    return _of_config(folder / "config.json", f"the header of {path}", "float32")


def _of_config(file: Path, source: str, stored: str | None) -> Known:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return Known(Shape.of_config(config), source, stored or config.get("dtype") or config.get("torch_dtype"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"config.json cannot be read: {type(error).__name__} {error}"
        raise UserError(what, where=str(file), key="model.base", hint="name a LLaMA's folder") from error


def stored_type(folder: Path) -> str | None:
    """The type of the first tensor of a folder's safetensors: its header is JSON behind eight bytes of length."""
    codes = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    for file in sorted(folder.glob("*.safetensors"))[:1]:
        with suppress(OSError, ValueError, KeyError), file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
            stored = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
            return codes.get(stored[0]) if stored else None
    return None


def vocabulary_of(tokenizer: str, revision: str | None = None) -> int | None:
    """Tokens of a tokenizer that lies on this machine, or of a published model; None where that cannot be known."""
    if tokenizer == SMOLLM2:
        return PRESETS["smollm2-135m"].vocabulary
    path = Path(tokenizer).expanduser()
    file: Path | None = path if path.is_file() else path / "tokenizer.json"
    if not path.exists():
        file = cached_file(tokenizer, "tokenizer.json", revision)
    if file is not None and file.name.endswith(".json") and file.is_file():
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_file(str(file)).get_vocab_size()
        except Exception as error:  # the Rust reader raises bare Exception for a damaged file
            raise UserError(f"the tokenizer cannot be read: {error}", where=str(file), key="model.tokenizer") from error
    published = published_shape(tokenizer)
    return published.shape.vocabulary if published is not None else None


def smollm2_is_here() -> bool:
    """Whether the shipped base was fetched already: a plan fetches nothing."""
    return any(cache_dir("models").glob(f"{SMOLLM2}-*/config.json"))
