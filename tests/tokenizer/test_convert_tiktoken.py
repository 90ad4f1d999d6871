"""Llama 3's tiktoken ranks converted: the ids are tiktoken's own, on real text and on odd text."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_ft.errors import UserError
from llama_ft.tokenizer.convert import write_tokenizer
from llama_ft.tokenizer.from_tiktoken import SPECIAL
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.text import TextEncoder
from tests.tokenizer.corpus import corpus
from tests.tokenizer.test_convert_sentencepiece import ODD

# As Meta's reference writes it (meta-llama/llama-models, models/llama3/tokenizer.py).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def model(real_data: Path) -> Path:
    return real_data / "tokenizers" / "llama3_tokenizer.model"


@pytest.fixture(scope="module")
def library(model: Path) -> tiktoken.Encoding:
    ranks = {}
    for line in model.read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    special = {name: 128_000 + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding("llama3", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("converted")
    assert write_tokenizer(model, made, vocab_size=128_256) == model
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    return TextEncoder(tokenizer, SPECIAL)


def equal(library: tiktoken.Encoding, encoder: TextEncoder, texts: list[str]) -> int:
    """Asserts equal ids, control strings being text; returns the number of tokens."""
    expected = [library.encode_ordinary(text) for text in texts]
    ours = [encoding.ids for encoding in encoder.encode_sealed(texts)]
    assert [text for text, a, b in zip(texts, expected, ours, strict=True) if a != b] == []
    return sum(map(len, ours))


def test_files_and_settings(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    # No tokenizer.model: llama.cpp's converter takes any file of that name for SentencePiece.
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert tokenizer.is_fast and tokenizer.pad_token is None and tokenizer.unk_token is None
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|begin_of_text|>", 128_000)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|end_of_text|>", 128_001)
    assert tokenizer.model_max_length == 131_072
    assert tokenizer("Hello world").input_ids == [128_000, 9906, 1917]
    loaded = load_tokenizer(folder)
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|finetune_right_pad_id|>", 128_004)


def test_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(SPECIAL) == len(set(SPECIAL)) == 256
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(128_000, 128_256))
    assert all(tokenizer.added_tokens_decoder[128_000 + i].special for i in range(256))
    named = {
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
        "<|image|>": 128_011,
        "<|reserved_special_token_2|>": 128_012,
        "<|reserved_special_token_245|>": 128_255,
    }
    assert {name: tokenizer.convert_tokens_to_ids(name) for name in named} == named


def test_every_id_is_the_librarys_token(tokenizer: PreTrainedTokenizerFast, library: tiktoken.Encoding) -> None:
    assert len(tokenizer) == library.n_vocab == 128_256
    assert len(set(tokenizer.get_vocab().values())) == 128_256
    # A token is bytes; the tokenizers library spells each byte as one printable character.
    ids = range(0, 128_000)
    as_bytes = [library.decode_single_token_bytes(i) for i in ids]
    alphabet = {tokenizer.convert_ids_to_tokens(i): token for i, token in enumerate(as_bytes) if len(token) == 1}
    assert len(alphabet) == 256
    spelled = tokenizer.convert_ids_to_tokens(list(ids))
    assert [b"".join(alphabet[char] for char in token) for token in spelled] == as_bytes


def test_ids_on_the_corpus(library: tiktoken.Encoding, encoder: TextEncoder, real_data: Path) -> None:
    """Each 17th text; test_ids_on_the_whole_corpus has them all."""
    sample = corpus(real_data)[::17]
    assert len(sample) > 9_000 and sum(map(len, sample)) > 1_000_000
    assert equal(library, encoder, sample) > 250_000


@pytest.mark.slow
def test_ids_on_the_whole_corpus(library: tiktoken.Encoding, encoder: TextEncoder, real_data: Path) -> None:
    texts = corpus(real_data)
    tokens = 0
    for start in range(0, len(texts), 20_000):
        tokens += equal(library, encoder, texts[start : start + 20_000])
    print(f"{len(texts):,} texts, {tokens:,} tokens, no mismatch")
    assert len(texts) > 160_000 and tokens > 6_000_000


def test_control_strings(tokenizer: PreTrainedTokenizerFast, library: tiktoken.Encoding, encoder: TextEncoder) -> None:
    """An ordinary call takes them for control tokens, as tiktoken does when told so; sealed text does not."""
    text = "<|start_header_id|>user<|end_header_id|>\n\nSay <|eot_id|>!<|eot_id|><|reserved_special_token_7|>"
    ids = library.encode(text, allowed_special="all")
    assert tokenizer(text, add_special_tokens=False).input_ids == encoder.encode([text])[0].ids == ids
    assert ids.count(128_009) == 2
    assert max(encoder.encode_sealed([text])[0].ids) < 128_000
    assert equal(library, encoder, [text])
    sealed = encoder.encode_sealed([f"<|eot_id|>{encoder.seal('<|eot_id|>')}"])[0].ids
    assert sealed == [*library.encode_ordinary("<|eot_id|>"), 128_009]


def test_odd_text(library: tiktoken.Encoding, encoder: TextEncoder) -> None:
    contractions = ["it's IT'S don'T we'Ll I'd", "'ſ a'ſb", "’s", "1234567 1 234", "a\n\n  b \n \n", "\x85x\x1c y"]
    texts = ODD + contractions + [" " * i + end for i in range(130) for end in ("", "x", "\n")]
    assert equal(library, encoder, texts)


def test_code_points(library: tiktoken.Encoding, encoder: TextEncoder) -> None:
    """Each 29th of all 1,112,064: the two regular expression engines know the same letters, digits and spaces."""
    chars = [chr(code) for code in range(0, 0x110000, 29) if not 0xD800 <= code < 0xE000]
    assert equal(library, encoder, [f"a{c}b {c}{c} 1{c}2 .{c}\n {c}" for c in chars])


def test_repetitive_text(library: tiktoken.Encoding, encoder: TextEncoder) -> None:
    dice = random.Random(4)
    alphabets = ["ab", "aA", "=-", "01", "_-", "/*", "hahe", "aeioust", "这是的不", "éèé", "банан", "().,;"]
    texts = ["".join(dice.choices(letters, k=dice.randint(1, 60))) for letters in alphabets for _ in range(700)]
    assert equal(library, encoder, texts)


def test_decoding_gives_the_text_back(
    tokenizer: PreTrainedTokenizerFast, encoder: TextEncoder, real_data: Path
) -> None:
    texts = [*corpus(real_data)[::97], *ODD]
    ids = [encoding.ids for encoding in encoder.encode_sealed(texts)]
    assert tokenizer.backend_tokenizer.decode_batch(ids, skip_special_tokens=False) == texts


def test_offsets_cover_the_text(encoder: TextEncoder) -> None:
    for text in ["Hello wörld 🦙\n\n x", "  two spaces", "日本語 and\ttabs \r\n"]:
        at = 0
        for start, end in encoder.encode([text])[0].offsets:
            assert start <= at <= end
            at = max(at, end)
        assert at == len(text)


def test_round_trip_through_save_and_the_door(
    tokenizer: PreTrainedTokenizerFast, model: Path, tmp_path: Path, real_data: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "meta" / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 8192}')
    texts = [*corpus(real_data)[::501], *ODD, "<|eot_id|>"]
    expected = tokenizer(texts).input_ids
    again, bare = AutoTokenizer.from_pretrained(tmp_path / "saved"), load_tokenizer(tmp_path / "meta")
    assert again(texts).input_ids == bare(texts).input_ids == expected
    assert again.get_vocab() == bare.get_vocab() == tokenizer.get_vocab()
    assert bare.bos_token == "<|begin_of_text|>" and bare.model_max_length == 8192


def with_line(data: bytes, number: int, line: bytes) -> bytes:
    lines = data.splitlines()
    lines[number - 1] = line
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[: data.index(b" 70000\n") - 3], "line 70001 is not `base64 rank`"),
        (lambda data: data[: data.index(b" 70000\n") + 3], "line 70001 should hold a new token and rank 70000"),
        (lambda data: data[: data.index(b" 70000\n") + 7], "holds 70,001 tiktoken ranks; Llama 3's file holds 128,000"),
        (lambda data: data + b"AAAAAA== 128000\n", "holds 128,001 tiktoken ranks"),
        (lambda data: with_line(data, 500, b"a*b= 499"), "line 500 is not `base64 rank`"),
        (lambda data: with_line(data, 500, b""), "line 500 is not `base64 rank`"),
        (lambda data: with_line(data, 500, b"IQ== 499"), "line 500 should hold a new token"),
        (lambda data: with_line(data, 500, b"AAAAAA== 7"), "line 500 should hold a new token and rank 499"),
        (lambda data: with_line(data, 1, b"AAAAAA== 0"), "a byte has no rank"),
    ],
    ids=["half-line", "half-rank", "cut", "long", "base64", "empty-line", "twice", "rank", "no-byte"],
)
def test_damaged_files(change: Any, said: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(change(model.read_bytes()))
    with pytest.raises(UserError) as caught:
        write_tokenizer(tmp_path, tmp_path / "out")
    assert str(file) in caught.value.problems[0].what and said in caught.value.problems[0].what
    assert "fetch it again" in str(caught.value.problems[0].hint)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
