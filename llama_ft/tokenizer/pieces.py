"""A SentencePiece-style BPE vocabulary, and the Hugging Face tokenizer that cuts text exactly as it does.

SentencePiece writes `▁` for a space, puts one `▁` before the text, cuts the text into characters (one that has no piece
into its UTF-8 bytes), and joins the adjacent pair whose joint piece has the highest score, the leftmost first, until
no pair has a piece. The tokenizers library does the same with merges in order of rank. Four things decide whether the
two agree, and `transformers`' own conversion misses the first two:

- The order of merges is that of the *scores*. In LLaMA's vocabulary the runs of spaces have early ids and the lowest
  score of all: ordered by id, `a  b` becomes `▁▁ b` where the model was trained on `▁ ▁b`.
- The `▁` before the text is put there even if the text begins with a space. The library's `Metaspace` puts its
  replacement before the first part unless that part begins with it: with a *space* as its replacement, over a text
  whose spaces are `▁` already, it always does. A second one turns that space into `▁`.
- Only ordinary pieces are joined: `<0x0A>` or `</s>` spelled out in a text stays letters.
- Pieces of equal score have no order among themselves but the leftmost place, which ranks cannot say
  (:meth:`Pieces.ties`).

After a control token no `▁` is put before the text (`legacy: false`): after `</s>`, `USER` and not `▁US ER`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

SPACE = "▁"
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]


class Kind(IntEnum):
    """What a piece is; the numbers are those of `ModelProto.SentencePiece.Type` in sentencepiece_model.proto."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Pieces:
    """Pieces in order of id, with `▁` for a space.

    `unknown`, `begin`, `end` and `pad` are ids, None where there is none. `dummy_prefix`: whether a `▁` goes before
    each text (LLaMA: yes).
    """

    texts: list[str]
    scores: list[float]
    kinds: list[Kind]
    unknown: int
    begin: int | None
    end: int | None
    pad: int | None = None
    dummy_prefix: bool = True

    def names(self) -> dict[str, str]:
        """`bos_token`, `eos_token`, `unk_token` and `pad_token` as far as the vocabulary has them."""
        ids = {"bos_token": self.begin, "eos_token": self.end, "unk_token": self.unknown, "pad_token": self.pad}
        return {name: self.texts[token] for name, token in ids.items() if token is not None}

    def ties(self) -> int:
        """How many longer pieces share their score with another one, runs of spaces aside.

        Where two such pieces overlap in a text, SentencePiece takes the leftmost and the converted tokenizer the one
        with the lower id. Runs of spaces grow from the left in both (a test holds it), so they do not count.
        """
        longer = Counter(
            score
            for text, score, kind in zip(self.texts, self.scores, self.kinds, strict=True)
            if kind is Kind.NORMAL and len(text) > 1 and text.strip(SPACE)
        )
        return sum(count for count in longer.values() if count > 1)

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of ordinary pieces whose joint text is an ordinary piece, highest score first."""
        ids = {text: i for i, text in enumerate(self.texts) if self.kinds[i] is Kind.NORMAL}
        ranked = []
        for text, token in ids.items():
            for cut in range(1, len(text)):
                left, right = text[:cut], text[cut:]
                if left in ids and right in ids:
                    ranked.append((-self.scores[token], ids[left], ids[right], left, right))
        return [(left, right) for *_, left, right in sorted(ranked)]

    def build(self) -> Tokenizer:
        """The tokenizer, without BOS or EOS around a text (transformers adds those by its own settings)."""
        vocabulary = {text: i for i, text in enumerate(self.texts)}
        tokenizer = Tokenizer(
            models.BPE(
                vocabulary,
                self.merges(),
                unk_token=self.texts[self.unknown],
                fuse_unk=True,
                byte_fallback=Kind.BYTE in self.kinds,
            )
        )
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        to_text = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        if self.dummy_prefix:
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                    pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False),
                ]
            )
            to_text.append(decoders.Strip(" ", left=1, right=0))
        tokenizer.decoder = decoders.Sequence(to_text)
        added = [
            AddedToken(text, normalized=kind is Kind.USER_DEFINED, special=kind is not Kind.USER_DEFINED)
            for text, kind in zip(self.texts, self.kinds, strict=True)
            if kind in (Kind.UNKNOWN, Kind.CONTROL, Kind.USER_DEFINED)
        ]
        tokenizer.add_tokens(added)
        return tokenizer
