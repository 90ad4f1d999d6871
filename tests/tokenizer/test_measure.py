"""Figures of tokenizers: each against a count by hand, parts of a text against the whole, the table and the JSON."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from llama_ft.data.vocabulary.report import OTHER, PART, measure_tokenizers, part_starts, print_tokenizer_report
from llama_ft.data.vocabulary.train import train_on_sources
from llama_ft.errors import UserError
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.measure import BYTE_OF, Cut, Cutter, token_bytes
from tests.conftest import ROOT

ENGLISH = (
    "The committee met on Tuesday to discuss whether the library should stay open on Sundays, as many had asked.\n"
)
GERMAN = "Der Ausschuss beriet am Dienstag darüber, ob die Bücherei künftig auch sonntags für alle Leser öffnen soll.\n"
FRENCH = "Le comité s'est réuni mardi pour décider si la bibliothèque devait rester ouverte le dimanche après-midi.\n"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose that never changes: the licence."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def byte_level(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / "bytes"
    train_on_sources([str(words)], folder, vocab_size=400)
    return folder


@pytest.fixture(scope="module")
def sentence(words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measure") / "sentence"
    train_on_sources([str(words)], folder, vocab_size=400, kind="sentencepiece")
    return folder


def test_figures_by_hand(byte_level: Path) -> None:
    tokenizer = load_tokenizer(byte_level)
    backend = tokenizer.backend_tokenizer
    text = "zq 🦙 zq\n"
    (cut,) = Cutter(tokenizer).cut(text)
    pieces = backend.encode(text, add_special_tokens=False).tokens
    assert (
        pieces[:2] == ["z", "q"] and len(pieces) == 4 + 1 + 4 + 2
    )  # two of zq, a space each, 🦙 in bytes, the line end
    assert (cut.words, cut.characters, cut.bytes, cut.tokens) == (3, 8, 11, len(pieces))
    assert (cut.one_byte, cut.broken, cut.unknown) == (len(pieces), 4, 0)
    assert cut.used == {backend.token_to_id(piece) for piece in pieces}
    figures = cut.figures(tokenizer.vocab_size)
    assert figures["tokens_per_word"] == len(pieces) / 3 and figures["bytes_per_token"] == 11 / len(pieces)
    assert figures["used"] == len(cut.used) / 400 and figures["broken"] == 4 / len(pieces)


def test_nothing_is_divided_by_nothing() -> None:
    assert {value for value in Cut().figures(10).values() if value is None or value} == {None}


def test_byte_fallback_and_control_names(sentence: Path) -> None:
    cutter = Cutter(load_tokenizer(sentence))
    (cut,) = cutter.cut("the 🦙")
    assert cut.broken == 4 and cut.unknown == 0
    (cut,) = cutter.cut("<unk> </s>")  # written in a text they are letters
    assert cut.unknown == 0 and cut.tokens > 4


def test_a_vocabulary_without_bytes_shows_its_unknown_share(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "<pad>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>").save_pretrained(tmp_path)
    (cut,) = Cutter(load_tokenizer(tmp_path)).cut("a b a b b")
    assert (cut.tokens, cut.unknown) == (5, 3)


def test_bytes_of_every_piece_are_what_it_decodes_to(byte_level: Path, sentence: Path, smollm2: Path) -> None:
    assert sorted(BYTE_OF.values()) == list(range(256))
    for folder in (byte_level, sentence, smollm2):
        backend = load_tokenizer(folder).backend_tokenizer
        # SentencePiece takes a space off the start of a text: in the middle of one it is there.
        middle = backend.encode("x", add_special_tokens=False).ids[-1]
        for token, value in token_bytes(backend).items():
            decoded = backend.decode([middle, token], skip_special_tokens=False)
            assert decoded == "x" + value.decode(errors="replace") or "\ufffd" in decoded


def test_parts_sum_to_the_whole(byte_level: Path, sentence: Path) -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8") + "🦙 " * 3000
    starts = part_starts(text)
    assert len(starts) > 3 and all(text[at - 1] == "\n" for at in starts[1:])
    assert min(b - a for a, b in pairwise(starts)) >= PART
    for folder in (byte_level, sentence):
        cutter = Cutter(load_tokenizer(folder))
        (whole,) = cutter.cut(text)
        total = Cut()
        parts = cutter.cut(text, starts)
        for part in parts:
            total.add(part)
        assert total == whole and min(part.tokens for part in parts) > 0


def test_sources_languages_and_all(byte_level: Path, sentence: Path, tmp_path: Path) -> None:
    pytest.importorskip("py3langid")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [GERMAN, ENGLISH, "12 3"])
    )
    (tmp_path / "long.txt").write_text(ENGLISH * 80 + FRENCH * 60)
    sources = [str(tmp_path / "rows.jsonl"), str(tmp_path / "long.txt")]
    rows = measure_tokenizers([str(byte_level), str(sentence)], sources)
    on = list(dict.fromkeys((row.kind, Path(row.on).name) for row in rows))
    assert on == [
        ("all", "all"),
        ("source", "rows.jsonl"),
        ("source", "long.txt"),
        *(("language", name) for name in ("en", "fr", OTHER)),  # one line of German and a row of digits: below 1 %
    ]
    assert [row.tokenizer for row in rows[:2]] == [str(byte_level), str(sentence)]
    for tokenizer in (byte_level, sentence):
        mine = [row for row in rows if row.tokenizer == str(tokenizer)]
        for name in ("words", "characters", "bytes", "tokens", "broken"):
            whole, *parts = (getattr(row.cut, name) for row in mine)
            assert whole == sum(parts[:2]) == sum(parts[2:])
    french = next(row for row in rows if row.on == "fr")
    assert abs(french.cut.characters - 60 * len(FRENCH)) <= PART + 120


def test_the_better_vocabulary_has_longer_tokens(byte_level: Path, real_data: Path) -> None:
    models = [str(real_data / "tokenizers" / name) for name in ("llama2_tokenizer.model", "llama3_tokenizer.model")]
    source = str(real_data / "text" / "c4_demo.jsonl")
    small, llama2, llama3 = measure_tokenizers([str(byte_level), *models], [source], limit=20)[:3]
    figures = [row.cut.figures(row.vocabulary)["bytes_per_token"] for row in (small, llama2, llama3)]
    assert figures == sorted(figures) and figures[0] < 2.5 < figures[1] < 4.2 < figures[2]
    assert (llama2.vocabulary, llama3.vocabulary) == (32_000, 128_256)
    assert llama2.kind == "source", "one source is all there is"


def test_what_is_printed(byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text(ENGLISH * 3)
    names, on = [str(byte_level)], [str(tmp_path / "some.txt")]
    print_tokenizer_report(names, on, as_json=True)
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["bytes"] == len(ENGLISH.encode()) * 3 and rows[0]["kind"] == "source"
    print_tokenizer_report(names, on)
    said = capsys.readouterr().out
    assert f"{rows[0]['tokens']:,}" in said and f"{rows[0]['bytes_per_token']:.2f}" in said and "tokens/word" in said


def test_what_cannot_be_measured(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no text to measure on"):
        measure_tokenizers([str(byte_level)], [str(tmp_path / "blank.txt")])
    with pytest.raises(UserError) as caught:
        measure_tokenizers([str(tmp_path / "none"), "./nor/this"], ["small-sums"])
    assert len(caught.value.problems) == 2
