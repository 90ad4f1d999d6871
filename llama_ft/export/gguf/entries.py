"""What a file has to say besides its weights: template, end tokens, how a text begins; told to the converter, and
checked in what it wrote.

Entries: ggml's docs/gguf.md. `eos` is the token that ends an answer, because that is where every reader stops; where
the tokenizer has another end of its own, `eot` (end of turn) says the first again and `eom` says the other, so that
both stop llama.cpp, as both stand in merged/generation_config.json.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader
from transformers import PreTrainedTokenizerFast

from llama_ft.errors import UserError

# Llama 3's words, cut apart: https://github.com/meta-llama/llama-models, `Tokenizer.pat_str`.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same with single digits is Qwen 2's, and what `llama-ft tokenizer train` cuts by (llama.cpp, src/llama-vocab.cpp).
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
NO_BOS = "{%- set bos_token = '' -%}"
_CONTROL, _UNUSED = 3, 5
"""Of tokenizer.ggml.token_type."""
_SHOWN = 3
_SAID = {
    "tokenizer.chat_template": "the chat template",
    "tokenizer.ggml.scores": "the list of scores",
    "tokenizer.ggml.merges": "the list of merges",
}
"""What is too long to be shown."""


@dataclass(frozen=True)
class Entries:
    """`values`: entry → what it must be. `methods`: the same for the converter, as calls of the gguf package's writer.

    `tokens`: the text of each id. `pre`: the pre-tokenizer to state where the converter knows none like it, or None.
    """

    values: dict[str, Any]
    methods: list[tuple[str, Any]]
    tokens: dict[int, str]
    added: frozenset[int]
    pre: str | None


def entries_of(merged: Path, tokenizer: PreTrainedTokenizerFast, stop: list[int], name: str) -> Entries:
    """What a file made of `merged` must say.

    tokenizer: of merged/. stop: ids that end an answer, the template's first. name: of the model. UserError when the
    tokenizer has no end token.
    """
    if not stop:
        raise UserError(f"{merged} has no end token: nothing would ever stop", hint="give its tokenizer an eos_token")
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    description = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))
    begins = tokenizer.bos_token_id is not None
    ids = {"eos": stop[0], "padding": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id}
    if len(stop) > 1:
        ids |= {"eot": stop[0], "eom": stop[1]}
    named = {"padding": "pad"}
    methods: list[tuple[str, Any]] = []
    values: dict[str, Any] = {
        "general.name": name,
        "llama.context_length": config["max_position_embeddings"],
        "tokenizer.chat_template": template_of(tokenizer),
    }
    if values["tokenizer.chat_template"] != tokenizer.chat_template:
        methods.append(("add_chat_template", values["tokenizer.chat_template"]))
    for kind, token in ids.items():
        if token is not None:
            values[f"tokenizer.ggml.{kind}_token_id"] = token
            methods.append((f"add_{named.get(kind, kind)}_token_id", token))
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    flags = {"add_bos_token": begins, "add_eos_token": False}
    if _is_sentencepiece(description):
        flags["add_space_prefix"] = _space_behind_control(tokenizer)
        values["tokenizer.ggml.scores"] = scores = _scores(description, tokens)
        methods.append(("add_token_scores", scores))
    else:
        values["tokenizer.ggml.merges"] = [" ".join(_pair(merge)) for merge in description["model"]["merges"]]
    for flag, value in flags.items():
        values[f"tokenizer.ggml.{flag}"] = value
        methods.append((f"add_{flag}", value))
    added = frozenset(tokenizer.get_added_vocab().values())
    return Entries(values, methods, tokens, added, pre_tokenizer(description))


def template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """The chat template for the file: the run's, and where training began with no BOS a line that says there is none.

    llama.cpp takes some token for BOS where the tokenizer has none, and hands it to the template, which would write it.
    """
    template = str(tokenizer.chat_template)
    return NO_BOS + template if tokenizer.bos_token is None and "bos_token" in template else template


def _is_sentencepiece(description: dict[str, Any]) -> bool:
    """Whether llama.cpp will treat it as SentencePiece: pieces, with bytes to fall back on."""
    return bool(description["model"].get("byte_fallback"))


def _pair(merge: Any) -> list[str]:
    """Both forms that tokenizer.json has for a merge."""
    return merge.split(" ") if isinstance(merge, str) else list(merge)


def _scores(description: dict[str, Any], tokens: dict[int, str]) -> list[float]:
    """Of each id, what llama.cpp joins pieces by, the highest first: the order of tokenizer.json's merges.

    The converter reads scores from tokenizer.model alone, and without that file gives all pieces the same one: a text
    then falls into other pieces than in training.
    """
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(description["model"]["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    return [-float(ranks.get(tokens.get(index, ""), 0)) for index in range(max(tokens) + 1)]


def _space_behind_control(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether text behind a control token begins with SentencePiece's space piece, as in llama.cpp's default.

    The same setting rules the start of a text that has no such token; a chat always begins with one.
    """
    control = tokenizer.bos_token or tokenizer.eos_token or ""
    pieces = tokenizer.tokenize(f"{control}x", add_special_tokens=False)
    return bool(pieces) and pieces[-1].startswith("▁")


def pre_tokenizer(description: dict[str, Any]) -> str | None:
    """llama.cpp's name for how tokenizer.json cuts a text before its merges; None if it is none of those known here.

    The converter knows published tokenizers by the ids they give to a certain text. One that was trained anew has
    other ids and may well cut like a published one.
    """
    stated = description.get("pre_tokenizer") or {}
    steps = stated.get("pretokenizers", []) if stated.get("type") == "Sequence" else [stated]
    kinds = [step.get("type") for step in steps]
    last = steps[-1] if steps else {}
    if description.get("normalizer") or last.get("add_prefix_space"):
        return None
    cuts = last.get("use_regex", True)
    if kinds == ["ByteLevel"] and cuts:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and cuts and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not cuts:
        return {_LLAMA_3: "llama-bpe", _QWEN_2: "qwen2"}.get(steps[0].get("pattern", {}).get("Regex"))
    return None


def entry_faults(reader: GGUFReader, wanted: Entries) -> list[str]:
    """Where a file says something else than it must; empty = nowhere."""
    faults = []
    for key, value in wanted.values.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found == value:
            continue
        said = _SAID.get(key, key)
        if found is None:
            faults.append(f"{said} is missing")
        else:
            faults.append(f"{said} is another one" if key in _SAID else f"{said} is {found!r}, not {value!r}")
    return faults + _token_faults(reader, wanted)


def _token_faults(reader: GGUFReader, wanted: Entries) -> list[str]:
    """Tokens that are other ones than training's. Added ones are stored as they are written, spaces and all."""
    if not {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type"} <= reader.fields.keys():
        return ["the vocabulary is missing"]
    found: Any = reader.fields["tokenizer.ggml.tokens"].contents()
    types: Any = reader.fields["tokenizer.ggml.token_type"].contents()
    embedding = next((tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"), None)
    faults = []
    if embedding is not None and len(found) != embedding.shape[1]:
        faults.append(f"the vocabulary has {len(found)} tokens, the embedding {embedding.shape[1]} rows")
    for index in range(len(found)):
        token = wanted.tokens.get(index)
        same = types[index] == _UNUSED if token is None else found[index] == token
        if token is not None and index in wanted.added:
            same = same or found[index] == token.replace("▁", " ")
        if not same:
            faults.append(f"token {index} is {found[index]!r}, not {token!r}")
    missing = [index for index in wanted.tokens if index >= len(found)]
    faults += [f"token {index} ({wanted.tokens[index]!r}) is missing" for index in missing]
    control = wanted.values["tokenizer.ggml.eos_token_id"]
    if control < len(types) and types[control] != _CONTROL:
        faults.append(f"the end token {wanted.tokens.get(control)!r} is stored as text")
    return faults[:_SHOWN]
