"""New tokenizers: what they hold, that they come back exactly, the same each time, and are refused with a reason."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from llama_ft.cli import app
from llama_ft.data.prepare import prepare_data
from llama_ft.data.vocabulary.train import train_on_sources
from llama_ft.errors import UserError
from llama_ft.export.gguf.entries import pre_tokenizer
from llama_ft.recipe import load_recipe
from llama_ft.tokenizer.convert import write_tokenizer
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.training.byte_bpe import PATTERN, train_byte_bpe
from llama_ft.tokenizer.training.sentence_bpe import LONGEST_LINE, train_sentence_bpe
from tests.conftest import ROOT

KINDS = ("byte-bpe", "sentencepiece")
ODD = [
    "",
    " ",
    "  two  spaces  ",
    "\ttab\r\nCRLF\r\n\r\nend\n\n",
    "NUL \0 and \x7f and \ufffe",
    "naïve 🦙 👩‍👩‍👧‍👦 🏳️‍🌈 é e\u0301 ﬁ Å ㍿",
    "नमस्ते दुनिया สวัสดี العربية עברית 你好，世界。",
    "1234567 3.14 ½ ٣٤ Ⅷ",
    "<|end_of_text|></s><s>[INST] <0x0A> Ġ ## x==1:\n        return {'a': [1, 2]}\n",
    "=" * 300,
    "\u202e right to left \u200b",
]


def words() -> list[str]:
    """A few hundred lines of prose that never change: the licence."""
    return (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines(keepends=True)


def random_texts(count: int, seed: int) -> Iterator[str]:
    """Texts of characters from everywhere in Unicode, ASCII and spaces often among them."""
    draw = random.Random(seed)
    for _ in range(count):
        length = draw.randrange(1, 60)
        planes = draw.choice([[(32, 127)], [(0, 0x2FF)], [(0, 0xD7FF), (0xE000, 0x10FFFF)], [(32, 33), (0, 0xFFF)]])
        yield "".join(chr(draw.randint(*draw.choice(planes))) for _ in range(length))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(words()), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / request.param
    train_on_sources([str(source)], folder, vocab_size=512, kind=request.param, special=["<|im_end|>"])
    return folder


def test_the_door_opens_it_as_it_promises(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    assert len(tokenizer) == 512 and tokenizer.is_fast and tokenizer.padding_side == "right"
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    expected = {"byte-bpe": (0, 1, 2), "sentencepiece": (1, 2, 0)}[trained.name]
    assert roles == expected
    ids = tokenizer("a word").input_ids
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids
    assert tokenizer("a<|im_end|>").input_ids[-1] == 3


def test_plain_transformers_opens_the_same(trained: Path) -> None:
    ours, plain = load_tokenizer(trained), AutoTokenizer.from_pretrained(trained)
    assert plain.is_fast and plain.pad_token_id == ours.pad_token_id
    assert all(plain(text).input_ids == ours(text).input_ids for text in [*ODD, *words()[:50]])
    stated = json.loads((trained / "special_tokens_map.json").read_text())
    assert stated.pop("additional_special_tokens") == ["<|im_end|>"] and "<|im_end|>" in plain.all_special_tokens
    assert {name: getattr(plain, name) for name in stated} == stated and "eos_token" in stated


def test_every_text_comes_back(trained: Path) -> None:
    tokenizer = load_tokenizer(trained)
    backend = tokenizer.backend_tokenizer
    texts = [*ODD, *random_texts(1500, seed=1)]
    for text in texts:
        back = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
        # SentencePiece's own sign for a space is the one thing that does not: it becomes a space.
        assert back == (text.replace("▁", " ") if trained.name == "sentencepiece" else text)
    assert back == tokenizer.decode(tokenizer(texts[-1]).input_ids, skip_special_tokens=True)


def test_nothing_is_unknown_and_digits_stand_alone(trained: Path) -> None:
    backend = load_tokenizer(trained).backend_tokenizer
    unknown = backend.token_to_id("<unk>")
    assert all(unknown not in backend.encode(text, add_special_tokens=False).ids for text in random_texts(300, seed=2))
    pieces = backend.encode("in 2026", add_special_tokens=False).tokens
    assert pieces[-4:] == ["2", "0", "2", "6"]
    held = [piece for piece in backend.get_vocab() if any(map(str.isdigit, piece)) and not piece.startswith("<0x")]
    assert sorted(held) == sorted(set("".join(held))), "a digit stands in a longer piece"


def test_same_input_same_bytes_in_another_process(trained: Path, source: Path, tmp_path: Path) -> None:
    again = tmp_path / trained.name
    code = (
        "import sys; from llama_ft.cli import app\n"
        f"app(['tokenizer', 'train', {str(source)!r}, '--vocab-size', '512', '-o', {str(again)!r}, "
        f"'--kind', {trained.name!r}, '--special', '<|im_end|>'])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TOKENIZERS_PARALLELISM": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "512 pieces: 4 control tokens, 256 bytes, 252 learnt" in done.stdout
    before, after = digests(trained), digests(again)
    record = [json.loads((folder / "training.json").read_text()) for folder in (trained, again)]
    for one in record:  # a source is named as seen from where one stands
        one["sources"][0].pop("source")
    assert record[0] == record[1]
    before.pop("training.json"), after.pop("training.json")
    assert before == after and len(after) == (4 if trained.name == "sentencepiece" else 3)


def test_the_order_of_texts_does_not_matter_to_byte_bpe() -> None:
    texts = words()
    shuffled = random.Random(3).sample(texts, len(texts))
    assert train_byte_bpe(texts, 500).to_str() == train_byte_bpe(shuffled, 500).to_str()


def test_the_record_says_what_it_was_trained_on(trained: Path, source: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    text = source.read_text(encoding="utf-8")
    (counted,) = record["sources"]
    assert (counted["rows"], counted["characters"], counted["bytes"]) == (1, len(text), len(text.encode()))
    assert len(counted["sha256"]) == 64 and record["kind"] == trained.name and record["special"] == ["<|im_end|>"]
    assert record["versions"].keys() == {"llama-ft", "tokenizers", "sentencepiece", "transformers"}


def test_words_are_cut_as_described() -> None:
    cut = pre_tokenizers.Split(__import__("tokenizers").Regex(PATTERN), "isolated")
    parts = [part for part, _ in cut.pre_tokenize_str("I'll pay 12 dollars!!\n\n  x  = y\t\tz  ")]
    assert parts == [
        "I",
        "'ll",
        " pay",
        " ",
        "1",
        "2",
        " dollars",
        "!!\n\n",
        " ",
        " x",
        " ",
        " =",
        " y",
        "\t",
        "\tz",
        "  ",
    ]


def test_llama_cpp_knows_how_it_cuts() -> None:
    assert pre_tokenizer(json.loads(train_byte_bpe(words(), 300).to_str())) == "qwen2"


def test_frequent_words_are_one_piece_and_learning_pays() -> None:
    small, large = (train_byte_bpe(words(), size) for size in (300, 700))
    text = "".join(words())
    assert len(large.encode(text).ids) < 0.7 * len(small.encode(text).ids)
    assert large.token_to_id("ĠLicense") is not None and small.token_to_id("ĠLicense") is None


def test_sentencepiece_and_its_conversion_agree(source: Path, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = tmp_path / "sp"
    train_on_sources([str(source)], folder, vocab_size=600, kind="sentencepiece")
    backend = load_tokenizer(folder).backend_tokenizer
    library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    # As LLaMA's, control strings aside: the library knows none in a text.
    texts = [text for text in [*ODD, *random_texts(800, seed=5), *words()] if "</s>" not in text]
    assert len(texts) > 900
    for text in texts:
        assert backend.encode(text, add_special_tokens=False).ids == library.encode(text), repr(text)
    other = tmp_path / "from-model"
    write_tokenizer(folder / "tokenizer.model", other)  # the file alone gives the same tokenizer
    assert (other / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_sentencepiece_settings_are_llama_2s(real_data: Path) -> None:
    from sentencepiece import sentencepiece_model_pb2

    def settings(data: bytes) -> dict[str, object]:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(data)
        own = ("input", "model_prefix", "vocab_size", "num_threads", "input_format", "input_sentence_size")
        random_lines = ("shuffle_input_sentence",)
        said = {field.name: value for field, value in proto.trainer_spec.ListFields()}
        normal = {field.name: value for field, value in proto.normalizer_spec.ListFields()}
        return {**{name: said[name] for name in said if name not in own + random_lines}, **normal}

    theirs = settings((real_data / "tokenizers" / "llama2_tokenizer.model").read_bytes())
    ours = settings(train_sentence_bpe(words(), 500))
    differing = {name for name in theirs if name in ours and theirs[name] != ours[name]}
    assert not differing and len(theirs.keys() & ours.keys()) > 8


def test_long_lines_are_learnt_from_too() -> None:
    text = "wonderful llamas " * 2000
    assert len(text) > LONGEST_LINE
    model = train_sentence_bpe([text + "▅ abc\tabc\0abc"], 290)
    from sentencepiece import SentencePieceProcessor

    assert SentencePieceProcessor(model_proto=model).encode("wonderful", out_type=str) == ["▁wonderful"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("text", "size", "special", "said"),
    [
        ("hello hello world", 400, [], "pieces, 400 were asked for"),
        ("hello hello", 200, [], "no room for 256 bytes"),
        ("  \n\n", 300, [], "text to learn from|nothing to learn"),
        ("hello hello", 300, ["a b"], "'a b' is no name of a control token"),
        ("hello hello", 300, ["<x>", "<x>"], "'<x>' is named twice"),
    ],
)
def test_what_cannot_be_learnt_is_refused(kind, text, size, special, said, tmp_path):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(UserError, match=said):
        train_on_sources([str(tmp_path / "rows.txt")], tmp_path / "out", vocab_size=size, kind=kind, special=special)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.txt"], "nothing is left behind"


def test_every_bad_name_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        train_byte_bpe(words(), 300, ["the", "<|pad|>", "<0x41>", "", "<ok>"])
    assert [problem.what.split()[0] for problem in caught.value.problems] == ["'the'", "'<|pad|>'", "'<0x41>'", "''"]


def test_characters_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match="no room for the text's characters"):
        train_sentence_bpe(["".join(map(chr, range(0x4E00, 0x4E80))) * 3], 300)


def test_conversations_are_no_text(tmp_path: Path) -> None:
    rows = tmp_path / "chat.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}))
    with pytest.raises(UserError) as caught:
        train_on_sources([str(rows), "small-sums"], tmp_path / "out", vocab_size=300)
    assert [problem.what for problem in caught.value.problems] == [
        "holds rows of layout messages, text is needed",
        "holds rows of layout messages, text is needed",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_malformed_row_is_told_by_its_place(kind: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["good words " * 9, 3, "good words"]))
    with pytest.raises(UserError, match=r"rows.jsonl, row 1: text: .*a number \(3\)"):
        train_on_sources([str(rows)], tmp_path / "out", vocab_size=266, kind=kind)


def test_only_a_trained_tokenizer_is_replaced(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    settings = {"vocab_size": 300, "limit": 1}
    train_on_sources([str(source)], folder, **settings)
    first = digests(folder)
    with pytest.raises(UserError, match="exists"):
        train_on_sources([str(source)], folder, **settings)
    train_on_sources([str(source)], folder, vocab_size=310, overwrite=True)
    assert len(load_tokenizer(folder)) == 310 and digests(folder) != first
    (folder / "training.json").unlink()
    with pytest.raises(UserError, match="will not be replaced"):
        train_on_sources([str(source)], folder, overwrite=True, **settings)


def test_pre_training_begins_and_ends_a_text_with_it(trained: Path, tmp_path: Path) -> None:
    """One BOS, one EOS, and control names in the text stay letters."""
    text = "a </s> b <|end_of_text|> c <|im_end|> <s> d"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\n")
    recipe = {
        "name": "new",
        "model": {"base": "preset:tiny", "tokenizer": str(trained)},
        "adapter": {"method": "full"},
        "data": [{"path": str(tmp_path / "rows.jsonl"), "layout": "text"}],
        "template": "chatml",
        "sequence": {"max_length": 256, "overlong": "split"},
        "training": {"objective": "pretrain", "global_batch": 256, "max_steps": 1},
    }
    (tmp_path / "new.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    prepared = prepare_data(load_recipe(str(tmp_path / "new.yaml"), []))
    (ids,) = [list(map(int, row["input_ids"])) for row in prepared.train]
    tokenizer = prepared.tokenizer
    control = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert not set(ids[1:-1]) & set(control.values()) and len(control) == 4
    assert tokenizer.decode(ids[1:-1]).strip() == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope.txt", "--vocab-size", "300"], "no such file"),
        (["python-filez", "--vocab-size", "300"], "did you mean 'python-files'?"),
        (["WORDS", "--vocab-size", "300", "--kind", "bpe"], "no such kind 'bpe' — byte-bpe or sentencepiece"),
        (["WORDS", "--vocab-size", "90000"], "90,000 were asked for — more text, or --vocab-size"),
        (["WORDS", "--vocab-size", "300", "--special", "the"], "'the' is no name of a control token"),
    ],
)
def test_the_command_refuses_with_a_hint(arguments, said, source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        app(["tokenizer", "train", *(str(source) if one == "WORDS" else one for one in arguments), "-o", "out"])
    assert ended.value.code == 2 and said in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_real_text_and_code(real_data: Path, tmp_path: Path) -> None:
    """Plays, web pages and code; measured on an encyclopedia (2.19 bytes a token, of 1,024 pieces)."""
    text = real_data / "text"
    names = [str(text / "tinyshakespeare.txt"), str(text / "c4_demo.jsonl"), "python-files"]
    written, texts = train_on_sources(names, tmp_path / "real", vocab_size=1024, limit=40)
    assert [counted.rows for counted in texts.counted] == [1, 40, 40] and written.checked == 81
    backend = load_tokenizer(tmp_path / "real").backend_tokenizer
    held = (text / "wiki_demo.txt").read_text(encoding="utf-8")[:200_000]
    tokens = backend.encode(held, add_special_tokens=False).ids
    assert backend.decode(tokens, skip_special_tokens=False) == held
    assert 2 < len(held.encode()) / len(tokens) < 4
