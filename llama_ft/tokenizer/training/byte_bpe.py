"""Byte-level BPE, trained by the tokenizers library.

A text is cut into words, a word into its UTF-8 bytes, and the most frequent pair of neighbours within words becomes a
piece, again and again (Sennrich et al., arXiv 1508.07909; on bytes: GPT-2's report, section 2.2). All 256 bytes are
pieces, so no text is unknown, and nothing is normalised, so every text comes back as it was.

Words are cut as Llama 3 cuts them, but for digits, which stand alone as in Llama 1 and 2 (arXiv 2302.13971, section
2.1: "we split all numbers into individual digits"). That is how Qwen 2 cuts them too, which llama.cpp knows: a model
with such a tokenizer needs no new code there (llama_ft/export/gguf/entries.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from llama_ft.tokenizer.from_tiktoken import PATTERN as LLAMA_3
from llama_ft.tokenizer.training.special import check_size, check_special, too_little

PATTERN = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
"""Words: 's and its like; letters with one sign before them; one digit; signs with a space before and line ends behind;
line ends with space before them; space but for the last one before a word; other space."""
ROLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
"""Llama 3's names, and a padding token, which it has not. They have the first ids."""
MIN_FREQUENCY = 2
"""A pair that occurs once is no piece: it would be the text learnt by heart."""


def train_byte_bpe(
    texts: Iterable[str], vocab_size: int, special: Sequence[str] = (), *, show_progress: bool = False
) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` pieces: control tokens, 256 bytes, learnt pieces, in this order of ids.

    `special`: further control tokens, behind those of ROLES. `show_progress`: the library's bars, on stderr. The
    tokenizer puts BOS before a text. The same texts give the same tokenizer, in whatever order they come.

    Raises :class:`UserError` for a bad name, a vocabulary that is too small, and a text that has fewer pieces in it.
    """
    control = [*ROLES.values(), *special]
    check_special(special, list(ROLES.values()))
    check_size(vocab_size, len(control))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[AddedToken(name, normalized=False, special=True) for name in control],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise too_little(tokenizer.get_vocab_size(), vocab_size, len(control))
    begin = ROLES["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin} $B:1", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    return tokenizer
