"""SentencePiece files converted: the ids are those of the sentencepiece library itself, on real and on odd text."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer, sentencepiece_model_pb2
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llama_ft.errors import UserError
from llama_ft.tokenizer.convert import write_tokenizer
from llama_ft.tokenizer.from_sentencepiece import read_sentencepiece
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.text import TextEncoder
from tests.tokenizer.corpus import corpus

CONTROL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def model(real_data: Path) -> Path:
    return real_data / "tokenizers" / "llama2_tokenizer.model"


@pytest.fixture(scope="module")
def library(model: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(model))


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("converted")
    assert write_tokenizer(model, made) == model
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(folder)


def as_text(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Ids of texts in which `</s>` is four letters, as in everything a user wrote."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return [encoding.ids for encoding in TextEncoder(tokenizer, control).encode_sealed(texts)]


def equal(library: SentencePieceProcessor, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> int:
    """Asserts equal ids and that they decode to the text; returns the number of tokens."""
    expected = library.encode(texts)
    ours = as_text(tokenizer, texts)
    assert [text for text, a, b in zip(texts, expected, ours, strict=True) if a != b] == []
    # `▁` itself becomes a space, in SentencePiece too.
    decoded = tokenizer.backend_tokenizer.decode_batch(ours, skip_special_tokens=False)
    assert [text for text, back in zip(texts, decoded, strict=True) if text.replace("▁", " ") != back] == []
    return sum(map(len, ours))


def test_files_and_settings(folder: Path, tokenizer: PreTrainedTokenizerFast, model: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (folder / "tokenizer.model").read_bytes() == model.read_bytes()
    assert tokenizer.is_fast and tokenizer.pad_token is None
    named = [(tokenizer.unk_token, tokenizer.unk_token_id), (tokenizer.bos_token, tokenizer.bos_token_id)]
    assert [*named, (tokenizer.eos_token, tokenizer.eos_token_id)] == [("<unk>", 0), ("<s>", 1), ("</s>", 2)]
    assert tokenizer.model_max_length == 131_072  # the file states none
    assert '"legacy": false' in (folder / "tokenizer_config.json").read_text()
    assert tokenizer("Hello world").input_ids == [1, 15043, 3186]
    assert tokenizer("Hello", "world").input_ids == [1, 15043, 1, 3186]


def test_every_id_is_the_librarys_piece(tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor) -> None:
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    assert len(tokenizer) == 32_000
    assert tokenizer.convert_ids_to_tokens(list(range(32_000))) == pieces
    assert tokenizer.get_vocab() == {piece: i for i, piece in enumerate(pieces)}


def test_ids_on_the_corpus(
    tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor, real_data: Path
) -> None:
    """Each 17th text; test_ids_on_the_whole_corpus has them all."""
    sample = corpus(real_data)[::17]
    assert len(sample) > 9_000 and sum(map(len, sample)) > 1_000_000
    assert equal(library, tokenizer, sample) > 300_000


def test_plain_calls_begin_with_bos_and_end_without_eos(
    tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor, real_data: Path
) -> None:
    sample = [text for text in corpus(real_data)[::97] if not any(name in text for name in CONTROL)]
    assert tokenizer(sample).input_ids == [[1, *ids] for ids in library.encode(sample)]


@pytest.mark.slow
def test_ids_on_the_whole_corpus(
    tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor, real_data: Path
) -> None:
    texts = corpus(real_data)
    tokens = 0
    for start in range(0, len(texts), 20_000):
        tokens += equal(library, tokenizer, texts[start : start + 20_000])
    print(f"{len(texts):,} texts, {tokens:,} tokens, no mismatch")
    assert len(texts) > 160_000 and tokens > 7_000_000


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # The runs of spaces have the lowest score: a word takes its space before they form.
        ("a  b", [263, 29871, 289]),
        ("x\n    if a:\n        b", [921, 13, 1678, 565, 263, 29901, 13, 4706, 289]),
        # The dummy prefix stands before a leading space too.
        (" a", [29871, 263]),
        ("  a", [259, 263]),
        ("", []),
        (" ", [259]),
        # Pieces that mean more than their letters are not built from letters.
        ("</s>", [1533, 29879, 29958]),
        ("<0x41>", [529, 29900, 29916, 29946, 29896, 29958]),
    ],
)
def test_known_traps(
    tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor, text: str, ids: list[int]
) -> None:
    assert library.encode(text) == ids
    assert as_text(tokenizer, [text]) == [ids]


ODD = [
    "\0",
    "a\0b\x01\x02\x7f",
    "▁a ▁",
    "\ufeffx",
    "\ufffd",
    "e\u0301",
    "\u00a0x\u3000y\u2003",
    "\r\n\r\n\t",
    "\U0010ffff\ue000\ufffe",
    "🦙👨‍👩‍👧‍👦🇩🇪",
    "\u202eabc\u200b",
    "한국어 ภาษาไทย עברית العربية 日本語 𝔘𝔫𝔦",
    "a" * 5_000,
    "字" * 3_000,
    "<s>[INST] <<SYS>>\n</s><unk>",
    "=" * 333 + "-" * 777,
]


def test_odd_text(tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor) -> None:
    assert equal(library, tokenizer, ODD + [" " + text for text in ODD] + [text + " " for text in ODD])


def test_runs_of_spaces(tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor) -> None:
    """Their pieces share one score: the leftmost pair goes first, so a run grows from its left."""
    runs = [" " * count + end for count in range(200) for end in ("", "x", "\n", "\n x")]
    runs += ["a" + " " * i + "\n" + " " * j + "b" for i in range(24) for j in range(24)]
    assert equal(library, tokenizer, runs)


def test_code_points(tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor) -> None:
    """Each 29th of all 1,112,064, before and after letters, doubled, alone."""
    chars = [chr(code) for code in range(0, 0x110000, 29) if not 0xD800 <= code < 0xE000]
    assert equal(library, tokenizer, [f"a{char}b {char}{char} {char}" for char in chars])


def test_repetitive_text(tokenizer: PreTrainedTokenizerFast, library: SentencePieceProcessor) -> None:
    """Few letters, many repeats: where a pair can be joined in more than one place."""
    dice = random.Random(3)
    alphabets = [
        "ab",
        "a ",
        "= ",
        "=-",
        "01",
        " \n",
        "\t \n",
        "aA",
        "_-",
        "/*",
        "hahe",
        "<s/>unk0xA",
        "这是的不",
        "🦙é ",
    ]
    texts = ["".join(dice.choices(letters, k=dice.randint(1, 60))) for letters in alphabets for _ in range(600)]
    assert equal(library, tokenizer, texts)


def test_after_a_control_token_no_prefix_is_added(tokenizer: PreTrainedTokenizerFast) -> None:
    """Non-legacy. The library knows no control tokens in a text, so here the two cannot be compared."""
    assert tokenizer.tokenize("a</s>USER: b") == ["▁a", "</s>", "USER", ":", "▁b"]
    assert tokenizer.tokenize("<s>[INST]") == ["<s>", "[", "INST", "]"]
    assert tokenizer.tokenize("<s> [INST]") == ["<s>", "▁[", "INST", "]"]


def test_round_trip_through_save(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, real_data: Path, library: SentencePieceProcessor
) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*corpus(real_data)[::501], " a</s>USER", *ODD]
    assert again(texts).input_ids == tokenizer(texts).input_ids
    assert again.get_vocab() == tokenizer.get_vocab()
    equal(library, again, ODD)


@pytest.mark.parametrize("beside_a_config", [False, True])
def test_the_door_gives_the_same(
    tokenizer: PreTrainedTokenizerFast, folder: Path, model: Path, tmp_path: Path, beside_a_config: bool
) -> None:
    """A bare tokenizer.model, the file itself, and the converted folder are one tokenizer to load_tokenizer."""
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    if beside_a_config:
        (tmp_path / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 4096}')
    for source in (tmp_path, tmp_path / "tokenizer.model", folder):
        loaded = load_tokenizer(source)
        assert loaded(ODD).input_ids == tokenizer(ODD).input_ids
        assert (loaded.pad_token, loaded.bos_token, loaded.padding_side) == ("<unk>", "<s>", "right")
        assert loaded.model_max_length == (4096 if beside_a_config and source != folder else 131_072)


def test_opens_beside_a_llamas_config(folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """transformers must not take its LlamaTokenizer for it, which builds a pre-tokenizer of its own."""
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 2048, "vocab_size": 32000}'
    )
    write_tokenizer(folder / "tokenizer.model", tmp_path, vocab_size=32_000)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened.model_max_length == 2048
    assert opened(" a  b").input_ids == tokenizer(" a  b").input_ids == [1, 29871, 263, 29871, 289]


def test_offsets_cover_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, CONTROL)
    for text in ["Hello wörld 🦙\n\n x", "  two spaces", "x</s> y"]:
        for encoding in (encoder.encode([text])[0], encoder.encode_sealed([text])[0]):
            at = 0
            for start, end in encoding.offsets:
                assert start <= at <= end
                at = max(at, end)
            assert at == len(text)


# Models trained here, for what LLaMA's file does not have.


def train(path: Path, real_data: Path, **options: Any) -> Path:
    """A small model of the given kind, trained on Shakespeare."""
    written = io.BytesIO()
    lines = (real_data / "text" / "tinyshakespeare.txt").read_text().splitlines()[:3_000]
    settings = {
        "model_type": "bpe",
        "vocab_size": 500,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **{**settings, **options})
    path.write_bytes(written.getvalue())
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": False},
        {"add_dummy_prefix": False},
        {"pad_id": 3},
        {"unk_id": 3, "bos_id": 0, "eos_id": 1, "control_symbols": ["<turn>"]},
    ],
    ids=["llama", "no-byte-fallback", "no-prefix", "pad", "other-ids"],
)
def test_other_bpe_models(options: dict[str, Any], tmp_path: Path, real_data: Path) -> None:
    file = train(tmp_path / "m.model", real_data, **options)
    write_tokenizer(file, tmp_path / "out")
    library = SentencePieceProcessor(model_file=str(file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*ODD, *(real_data / "text" / "wikitext2_valid.txt").read_text().splitlines()[:500]]
    assert as_text(tokenizer, texts) == library.encode(texts)
    assert tokenizer.get_vocab() == {library.id_to_piece(i): i for i in range(500)}
    assert tokenizer("He is").input_ids == [library.bos_id(), *library.encode("He is")]
    assert tokenizer.pad_token_id == (3 if "pad_id" in options else None)
    known = [text for text in texts if library.unk_id() not in library.encode(text) and "▁" not in text]
    assert len(known) > 150
    assert tokenizer.batch_decode(as_text(tokenizer, known)) == known


def test_user_defined_pieces_differ_at_the_start_of_a_text_only(tmp_path: Path, real_data: Path) -> None:
    """SentencePiece cuts them out of the text with its dummy prefix; an added token leaves the prefix no place."""
    file = train(tmp_path / "m.model", real_data, user_defined_symbols=["<code>"])
    write_tokenizer(file, tmp_path / "out")
    library = SentencePieceProcessor(model_file=str(file))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["He<code> is <code>he", " <code>", "a<code", "x<code><code>"]
    assert as_text(tokenizer, texts) == library.encode(texts)
    start = library.encode("<code>he")
    assert library.id_to_piece(start[:2]) == ["▁", "<code>"]
    assert as_text(tokenizer, ["<code>he"]) == [start[1:]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "unigram"}, ["it is a unigram model; every LLaMA's is BPE"]),
        (
            {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
            [
                "its normaliser 'nmt_nfkc' rewrites the text; a LLaMA's is the identity",
                "it drops repeated spaces; a LLaMA's keeps them",
            ],
        ),
        ({"treat_whitespace_as_suffix": True}, ["it puts ▁ behind a word instead of before it"]),
    ],
)
def test_what_cannot_be_exact_is_refused(
    options: dict[str, Any], said: list[str], tmp_path: Path, real_data: Path
) -> None:
    file = train(tmp_path / "m.model", real_data, **options)
    with pytest.raises(UserError) as caught:
        write_tokenizer(file, tmp_path / "out")
    assert [problem.what for problem in caught.value.problems] == said
    assert {problem.where for problem in caught.value.problems} == {str(file)}


def altered(model: Path, change: Any) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    change(proto)
    return proto.SerializeToString()


def test_unused_pieces_are_refused(model: Path, tmp_path: Path) -> None:
    def unuse(proto: Any) -> None:
        for piece in proto.pieces[300:303]:
            piece.type = 5

    (tmp_path / "tokenizer.model").write_bytes(altered(model, unuse))
    with pytest.raises(UserError, match="3 unused pieces"):
        write_tokenizer(tmp_path, tmp_path / "out")


def test_equal_scores_are_told(model: Path, tmp_path: Path) -> None:
    def tie(proto: Any) -> None:
        for piece in proto.pieces[300:310]:
            piece.score = 0.0

    (tmp_path / "tokenizer.model").write_bytes(altered(model, tie))
    with pytest.warns(UserWarning, match="9 pieces share their score"):  # one of the ten is a run of spaces
        write_tokenizer(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_code_llamas_markers_are_control_tokens(model: Path, tmp_path: Path, kind: int) -> None:
    """Ordinary, control or user-defined in the file: they open and close parts, and text never becomes one."""

    def add(proto: Any) -> None:
        for i, text in enumerate(["▁<P", "▁<PRE", "▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]):
            piece = proto.pieces.add(piece=text, score=-40_000.0 - i)
            piece.type = kind if text.endswith(">") else 1

    (tmp_path / "tokenizer.model").write_bytes(altered(model, add))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.convert_tokens_to_ids("▁<PRE>") == 32_002
    assert tokenizer("▁<PRE> x▁<SUF>y").input_ids == [1, 32_002, 921, 32_003, 29891]
    assert 32_002 not in tokenizer("a <PRE>").input_ids
    assert 32_002 not in as_text(tokenizer, ["▁<PRE> <PRE>"])[0]


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        (lambda data: data[:100_003], "it does not parse"),
        (lambda data: data[: data.index("▁about".encode()) - 4], "without its settings"),
        (lambda data: data[:50_000] + b"\xff" * 40 + data[50_040:], "damaged"),
    ],
    ids=["inside-a-piece", "between-pieces", "overwritten"],
)
def test_damaged_files(cut: Any, said: str, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.model"
    file.write_bytes(cut(model.read_bytes()))
    for use in (lambda: write_tokenizer(tmp_path, tmp_path / "out"), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(UserError) as caught:
            use()
        problem = caught.value.problems[0]
        assert f"the SentencePiece file {file} is damaged" in problem.what and said in problem.what
        assert "fetch it again" in str(problem.hint)
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_file_cut_anywhere_in_its_settings(model: Path, tmp_path: Path) -> None:
    data, file = model.read_bytes(), tmp_path / "tokenizer.model"
    for missing in range(1, 60):
        file.write_bytes(data[:-missing])
        with pytest.raises(UserError, match="is damaged"):
            read_sentencepiece(file)
