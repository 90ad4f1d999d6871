"""BPE as LLaMA 1 and 2 have it, trained by the sentencepiece library.

The settings are those that stand in Llama 2's own tokenizer.model (its `trainer_spec` and `normalizer_spec`), but for
what depends on the text and the machine: identity normalisation, a space before each text, byte fallback, single
digits, pieces of up to 16 characters, 0.99995 of all characters covered. Two things differ. Its file was trained on
200 million lines drawn at random; here every line counts. And lines beyond 4,192 bytes, which the library would skip,
are cut.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence

from llama_ft.errors import UserError
from llama_ft.tokenizer.training.special import check_size, check_special, too_little

ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
"""Ids 0, 1 and 2, as LLaMA's. `<unk>` stands for no text, since bytes do; it is the padding token."""
COVERAGE = 0.99995
"""Share of the text's characters that get pieces of their own; the rarest are written in bytes."""
LONGEST_LINE = 4192
"""Bytes; the library's default and Llama 2's setting."""
_CHARACTERS = LONGEST_LINE // 4
# The library's mark of a word's end, U+2585: it would drop any line that has one.
_CUTS = re.compile("[\n▅]")
_TOO_MANY = re.compile(r"set it to a value <= (\d+)")
_TOO_FEW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")


def train_sentence_bpe(texts: Iterable[str], vocab_size: int, special: Sequence[str] = ()) -> bytes:
    """A SentencePiece model file with exactly `vocab_size` pieces.

    Ids: `<unk>`, `<s>`, `</s>`, the control tokens `special`, 256 bytes, learnt pieces, single characters. The same
    texts in the same order give the same bytes.

    Raises :class:`UserError` for a bad name, a vocabulary without room for the text's characters, and a text that has
    fewer pieces in it.
    """
    from sentencepiece import SentencePieceTrainer

    check_special(special, list(ROLES.values()))
    check_size(vocab_size, len(ROLES) + len(special))
    lines, model = _Lines(texts), io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=COVERAGE,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=LONGEST_LINE,
            control_symbols=list(special),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size, len(ROLES) + len(special), lines) from error
    return model.getvalue()


class _Lines:
    """Lines of texts, none longer than the library takes. `failure`: what reading them raised."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self.failure: Exception | None = None
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                for line in _CUTS.split(text):
                    for piece in _short(line):
                        self.count += 1
                        yield piece
        except Exception as error:  # the library would tell it as one of its own, without what it says
            self.failure = error
            raise


def _short(line: str) -> Iterator[str]:
    """A line, or parts of it cut before a space; none is empty."""
    while len(line) > _CHARACTERS and len(line.encode()) > LONGEST_LINE:
        at = line.rfind(" ", 1, _CHARACTERS)
        at = _CHARACTERS if at < 1 else at
        yield line[:at]
        line = line[at:]
    if line:
        yield line


def _explained(error: RuntimeError, vocab_size: int, control: int, lines: _Lines) -> Exception:
    """The library's complaint in words; what reading the text raised, if it did."""
    if lines.failure is not None:
        return lines.failure
    said = " ".join(str(error).split())
    if few := _TOO_MANY.search(said):
        return too_little(int(few[1]), vocab_size, control)
    if many := _TOO_FEW.search(said):
        what = f"a vocabulary of {vocab_size:,} has no room for the text's characters: with bytes they are {many[1]}"
        return UserError(what, key="vocab-size", hint=f"more than {many[1]}; or --kind byte-bpe, which needs no others")
    if not lines.count:
        return UserError("there is no text to learn from", hint="the sources hold empty lines alone")
    return UserError(f"sentencepiece cannot learn from this text: {said}")
