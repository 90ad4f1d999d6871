"""llama2.c's tokenizer.bin converted: the ids are those of its own encoder, written out here in Python."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_ft.errors import UserError
from llama_ft.tokenizer.convert import write_tokenizer
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.text import TextEncoder
from tests.tokenizer.corpus import corpus
from tests.tokenizer.test_convert_sentencepiece import ODD

Piece = tuple[float, bytes]


def pieces_of(data: bytes) -> list[Piece]:
    at, pieces = 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((score, data[at + 8 : at + 8 + length]))
        at += 8 + length
    return pieces


def file_of(pieces: list[Piece]) -> bytes:
    records = [struct.pack("<fi", score, len(piece)) + piece for score, piece in pieces]
    return struct.pack("<i", max(len(piece) for _, piece in pieces)) + b"".join(records)


def c_encode(text: str, pieces: list[Piece]) -> list[int]:
    """`encode` of llama2.c's run.c without BOS and EOS: characters or bytes, then the best-scored join, until none."""
    lookup = {piece: i for i, (_, piece) in enumerate(pieces)}
    ids = [lookup[b" "]] if text else []
    for char in text:
        data = char.encode()
        ids += [lookup[data]] if data in lookup else [byte + 3 for byte in data]
    while True:
        best = None
        for i in range(len(ids) - 1):
            joined = lookup.get(pieces[ids[i]][1] + pieces[ids[i + 1]][1])
            if joined is not None and (best is None or pieces[joined][0] > best[0]):
                best = (pieces[joined][0], i, joined)
        if best is None:
            return ids
        _, i, joined = best
        ids[i : i + 2] = [joined]


@pytest.fixture(scope="module")
def source(real_data: Path) -> Path:
    return real_data / "checkpoints" / "tok512.bin"


@pytest.fixture(scope="module")
def pieces(source: Path) -> list[Piece]:
    return pieces_of(source.read_bytes())


@pytest.fixture(scope="module")
def tokenizer(source: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    made = tmp_path_factory.mktemp("converted")
    assert write_tokenizer(source, made, vocab_size=512) == source
    assert sorted(path.name for path in made.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    return AutoTokenizer.from_pretrained(made)


@pytest.fixture(scope="module")
def texts(real_data: Path) -> list[str]:
    """Each 300th text, its first 150 characters: the encoder above takes quadratic time. A C string ends at a NUL."""
    odd = [text for text in ODD if "\0" not in text and "▁" not in text]
    return [text[:150] for text in [*corpus(real_data)[::300], *odd]]


def ids_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in TextEncoder(tokenizer, ["<unk>", "<s>", "</s>"]).encode_sealed(texts)]


def test_vocabulary_and_settings(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]) -> None:
    stated = ["<unk>", "<s>", "</s>", *(piece.decode().replace(" ", "▁") for _, piece in pieces[3:])]
    assert len(tokenizer) == 512
    assert tokenizer.convert_ids_to_tokens(list(range(512))) == stated
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token is None and tokenizer.is_fast


def test_ids_and_texts(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece], texts: list[str]) -> None:
    expected = [c_encode(text, pieces) for text in texts]
    assert len(texts) > 500 and sum(map(len, expected)) > 10_000
    assert ids_of(tokenizer, texts) == expected
    assert tokenizer("Once upon a time").input_ids == [1, *c_encode("Once upon a time", pieces)]
    decoded = tokenizer.backend_tokenizer.decode_batch(expected)
    assert decoded == texts


def test_the_space_sign_itself_is_a_space_as_in_sentencepiece(
    tokenizer: PreTrainedTokenizerFast, pieces: list[Piece]
) -> None:
    """The one difference to the C program, which writes U+2581 in a text as three bytes; the model it was made from,
    and with it every text the checkpoint was trained on, takes it for a space."""
    assert ids_of(tokenizer, ["a▁b"]) == [c_encode("a b", pieces)] != [c_encode("a▁b", pieces)]


def test_ids_are_sentencepieces(tokenizer: PreTrainedTokenizerFast, pieces: list[Piece], texts: list[str]) -> None:
    """The file came from a SentencePiece model; put back into one, the library cuts texts of any length the same."""
    proto = sentencepiece_model_pb2.ModelProto()
    for i, (score, _) in enumerate(pieces):
        kind = {0: 2, 1: 3, 2: 3}.get(i, 6 if i < 259 else 1)
        proto.pieces.add(piece=tokenizer.convert_ids_to_tokens(i), score=score, type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.remove_extra_whitespaces = False
    library = SentencePieceProcessor(model_proto=proto.SerializeToString())
    longer = ["".join(texts), *ODD]
    assert ids_of(tokenizer, longer) == library.encode(longer)


def test_older_files_spell_bytes_as_characters(
    tokenizer: PreTrainedTokenizerFast, pieces: list[Piece], tmp_path: Path, texts: list[str]
) -> None:
    older = [*pieces[:3], *((0.0, chr(value).encode()) for value in range(256)), *pieces[259:]]
    (tmp_path / "tokenizer.bin").write_bytes(file_of(older))
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(texts).input_ids == tokenizer(texts).input_ids


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-1], "it ends inside piece 511"),
        (lambda data: data[:-5], "it ends inside piece 511"),
        (lambda data: data[:3_000], "it ends inside piece"),
        (lambda data: data[:17], "it begins with ['<unk>']"),
        (lambda data: file_of(pieces_of(data)[:200]), "its pieces 3 to 258 are not the 256 bytes"),
        (lambda data: file_of([*pieces_of(data), pieces_of(data)[-1]]), "stands in it twice"),
        (lambda data: file_of([*pieces_of(data), (0.0, b"\xff")]), r"piece 512 is not UTF-8: b'\xff'"),
        (lambda data: file_of([*pieces_of(data), (float("nan"), b"qqq")]), "piece 512 has length 3 and score nan"),
        (lambda data: file_of([*pieces_of(data), (0.0, b"")]), "piece 512 has length 0"),
    ],
    ids=["last-byte", "last-record", "half", "head", "few", "twice", "utf-8", "nan", "empty-piece"],
)
def test_damaged_files(change: Any, said: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "tok512.bin"
    file.write_bytes(change(source.read_bytes()))
    for use in (lambda: write_tokenizer(file, tmp_path / "out"), lambda: load_tokenizer(file)):
        with pytest.raises(UserError) as caught:
            use()
        assert f"the llama2.c tokenizer {file} is damaged" in caught.value.problems[0].what
        assert said in caught.value.problems[0].what
    assert not (tmp_path / "out" / "tokenizer.json").exists()
