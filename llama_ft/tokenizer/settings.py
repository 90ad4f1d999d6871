"""What a Hugging Face folder says about a tokenizer beside its vocabulary: names, added tokens, template, length.

Fine-tuned LLaMA 1 and 2 checkpoints are often published as a SentencePiece file with these small JSON files around it
and no tokenizer.json. Without any of them the vocabulary speaks for itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from llama_ft.errors import Problem, UserError

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
# transformers 4 and 5 have different words for it.
EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class Settings:
    """`names` of the special tokens by role; `added` tokens by id; `extra` special tokens, whose ids follow if new."""

    names: dict[str, str] = field(default_factory=dict)
    added: dict[int, AddedToken] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    add_bos: bool = True
    add_eos: bool = False
    chat_template: Any = None
    max_length: int | None = None

    def extend(self, tokenizer: Tokenizer, source: Path) -> None:
        """Adds what the vocabulary lacks, each token under the id it has here.

        Raises :class:`UserError` with every token whose id is taken or would leave a gap.
        """
        problems = []
        for token_id, token in sorted(self.added.items()):
            before = tokenizer.get_vocab_size()
            held = tokenizer.id_to_token(token_id)
            if (held is None and token_id != before) or (held is not None and held != token.content):
                why = f"the vocabulary has {held!r} there" if held else f"the vocabulary ends at {before - 1}"
                problems.append(Problem(f"{source} gives {token.content!r} the id {token_id}, but {why}"))
            else:
                tokenizer.add_tokens([token])
        if problems:
            raise UserError(problems)
        for name in [*self.names.values(), *self.extra]:
            tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True)])


def read_settings(folder: Path) -> Settings:
    """Reads tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.jinja, where present.

    `legacy` is not read: a converted tokenizer is never a legacy one. Raises :class:`UserError` with every damaged
    file.
    """
    problems: list[Problem] = []
    files = ("special_tokens_map.json", "tokenizer_config.json", "added_tokens.json")
    special, config, added = (_object(folder / name, problems) for name in files)
    if problems:
        raise UserError(problems)
    both = {**special, **config}
    names = {name: text for name in NAMES if (text := _text(both.get(name)))}
    listed = [text for key in EXTRA for one in both.get(key) or [] if (text := _text(one))]
    tokens = {int(token_id): _token(text, {}) for text, token_id in added.items() if isinstance(token_id, int)}
    for token_id, said in (config.get("added_tokens_decoder") or {}).items():
        if str(token_id).isdigit() and (text := _text(said)):
            tokens[int(token_id)] = _token(text, said if isinstance(said, dict) else {})
    length = config.get("model_max_length")
    return Settings(
        names,
        tokens,
        listed,
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
        chat_template=_template(folder) or config.get("chat_template"),
        max_length=int(length) if isinstance(length, (int, float)) and not isinstance(length, bool) else None,
    )


def _object(path: Path, problems: list[Problem]) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(Problem(f"it cannot be read: {error}", where=str(path), hint="fetch it again"))
        return {}
    if not isinstance(value, dict):
        problems.append(Problem("it is not a JSON object", where=str(path), hint="fetch it again"))
        return {}
    return value


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _text(said: Any) -> str | None:
    """A token's text: transformers writes a string, or an object with `content`."""
    text = said.get("content") if isinstance(said, dict) else said
    return text if isinstance(text, str) and text else None


def _token(text: str, said: Mapping[str, Any]) -> AddedToken:
    flags = {"normalized": False, "special": True} | {name: bool(said[name]) for name in _FLAGS if name in said}
    return AddedToken(text, **flags)
