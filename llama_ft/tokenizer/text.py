"""Text to tokens with exact character offsets, and control strings in a user's text that stay text.

Two things a plain tokenizer call does not give:

- Offsets of whole tokens. Byte-level post-processors trim the space off a token's offsets, which hides that a token
  straddles the start of an answer; here the post-processor is gone (it would otherwise only add BOS).
- Control strings as text. `</s>` typed by a user must not become the id of `</s>`, while the template's own `</s>`
  must. The *sealed* tokenizer is the same one with its control tokens under names nobody can type, so one ordinary
  call does both, and a plain piece is cut exactly as it would be anywhere else.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tokenizers import Encoding, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TextEncoder:
    """Encodes rendered text, ordinary or sealed, through one tokenizer.

    `control` are the strings that mean more than their letters (`<s>`, `<|im_end|>` …); each is a token of the
    tokenizer. `seal(name)` is the text that stands for a true control token in a sealed text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, control: Sequence[str]):
        self._plain: Tokenizer = copy.deepcopy(tokenizer.backend_tokenizer)
        self._plain.post_processor = None
        self._plain.no_truncation()
        self._plain.no_padding()
        # Drawn per encoder, so that no data file can hold it.
        nonce = secrets.token_hex(8)
        self._names = {name: f"\U0010fff0{nonce}.{index}\U0010fff1" for index, name in enumerate(sorted(set(control)))}

    def seal(self, name: str) -> str:
        """What to write in a sealed text where the template itself put control token `name`."""
        return self._names[name]

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        """Ids and offsets of whole texts, no special token added; control strings become control tokens."""
        return self._plain.encode_batch(list(texts), add_special_tokens=False)

    def encode_sealed(self, texts: Sequence[str]) -> list[Encoding]:
        """The same for texts whose true control tokens are sealed: any other control string is ordinary text."""
        return self._sealed.encode_batch(list(texts), add_special_tokens=False)

    @cached_property
    def _sealed(self) -> Tokenizer:
        state: dict[str, Any] = json.loads(self._plain.to_str())
        ids = {name: self._plain.token_to_id(name) for name in self._names}
        for token in state["added_tokens"]:
            token["content"] = self._names.get(token["content"], token["content"])
        _rename(state["model"], self._names)
        sealed = Tokenizer.from_str(json.dumps(state))
        for name, token_id in ids.items():
            if sealed.token_to_id(self._names[name]) != token_id:
                raise RuntimeError(f"control token {name!r} moved from id {token_id} in the sealed tokenizer")
        return sealed


def _rename(model: dict[str, Any], names: dict[str, str]) -> None:
    """Renames pieces of a serialised tokenizers model (BPE, WordPiece, WordLevel: a dict; Unigram: pairs) in place."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        # A converted SentencePiece vocabulary can hold merges that build `</s>` from letters: text must not.
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]


def _touches(merge: str | list[str], names: dict[str, str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names
