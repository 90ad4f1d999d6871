"""More tokens: every new one is a run of old ones, no id moves, and what cannot be added is told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from llama_ft.errors import UserError
from llama_ft.tokenizer.grow import Grown, add_names, add_pieces
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.training.byte_bpe import train_byte_bpe
from llama_ft.tokenizer.training.sentence_bpe import train_sentence_bpe
from tests.tokenizer.test_training import ODD, random_texts

CHEMISTRY = (
    "Acetylsalicylic acid inhibits cyclooxygenase; paracetamol does not. Hydroxychloroquine, methotrexate and "
    "sulfasalazine are given in rheumatoid arthritis. Acetylsalicylate 1,5-naphthyridine 苯甲酸 醋酸 苯甲酸 醋酸 🧪🧪 "
)


@pytest.fixture(scope="module")
def domain() -> Tokenizer:
    """A tokenizer for a field of its own."""
    return train_byte_bpe([CHEMISTRY * 3], 395)


def texts_of_all_kinds() -> list[str]:
    draw = random.Random(4)
    words = CHEMISTRY.split()
    mixed = [" ".join(draw.choices(words, k=draw.randrange(1, 30))) for _ in range(100)]
    return [*ODD, CHEMISTRY, CHEMISTRY.upper(), *mixed, *random_texts(300, seed=11)]


def check_exact(old: Tokenizer, grown: Grown) -> int:
    """Every text's new ids, each written as its parts, are the old ids. Returns how many tokens were saved."""
    saved = 0
    for text in texts_of_all_kinds():
        before = old.encode(text, add_special_tokens=False).ids
        after = grown.backend.encode(text, add_special_tokens=False).ids
        assert [part for token in after for part in grown.parts.get(token, [token])] == before, repr(text)
        saved += len(before) - len(after)
    return saved


def same_ids(old: Tokenizer, new: Tokenizer) -> bool:
    return all(new.token_to_id(piece) == token for piece, token in old.get_vocab().items())


def test_smollm2_grows_exactly(smollm2: Path, domain: Tokenizer) -> None:
    old = load_tokenizer(smollm2).backend_tokenizer
    grown = add_pieces(old, domain, 47)
    assert sorted(grown.parts) == list(range(49_152, 49_199)) and same_ids(old, grown.backend)
    assert check_exact(old, grown) > 500
    assert {len(parts) for parts in grown.parts.values()} >= {2, 3}  # a new piece may be made of new ones


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_llamas_grow_exactly(real_data: Path, domain: Tokenizer, name: str) -> None:
    """Llama 2 has bytes to fall back on and runs of spaces; Llama 3 has 256 control tokens behind its vocabulary."""
    old = load_tokenizer(real_data / "tokenizers" / f"{name}_tokenizer.model").backend_tokenizer
    grown = add_pieces(old, domain, 40)
    size = old.get_vocab_size()
    assert sorted(grown.parts) == list(range(size, size + 40)) and same_ids(old, grown.backend)
    assert check_exact(old, grown) > 200
    again = Tokenizer.from_str(grown.backend.to_str())
    assert same_ids(grown.backend, again)
    if name == "llama3":
        assert again.encode("<|eot_id|>", add_special_tokens=False).ids == [128_009]


def test_a_character_that_had_no_piece(real_data: Path, tmp_path: Path) -> None:
    """Llama 2 writes 醋 in three bytes. SentencePiece numbers characters last; one is taken when a piece needs it."""
    old = load_tokenizer(real_data / "tokenizers" / "llama2_tokenizer.model").backend_tokenizer
    assert len(old.encode("醋", add_special_tokens=False).ids) == 4  # with the space before a text
    (tmp_path / "tokenizer.model").write_bytes(train_sentence_bpe(["苯甲酸 醋酸 " * 50], 267))
    other = load_tokenizer(tmp_path).backend_tokenizer
    grown = add_pieces(old, other, 4)
    ids, name = old.get_vocab(), grown.backend.id_to_token
    new = {name(token): parts for token, parts in grown.parts.items()}
    assert new["醋"] == new["▁醋"][1:] == [ids[f"<0x{byte:02X}>"] for byte in "醋".encode()]
    assert new["▁醋"][0] == ids["▁"]
    assert check_exact(old, grown) > 0


def test_what_cannot_be_one_word_here_is_passed_over(smollm2: Path) -> None:
    """`.\\n\\n` is a word to Llama 3, and three to SmolLM2: as a piece it would never come up."""
    old = load_tokenizer(smollm2).backend_tokenizer
    other = train_byte_bpe(["zqx.\n\n zqx.\n\n zqx"] * 3, 264)
    assert ".ĊĊ" in other.get_vocab()
    grown = add_pieces(old, other, 3)
    assert grown.passed_over >= 1 and ".ĊĊ" not in grown.backend.get_vocab()


def test_too_many_pieces_are_refused_with_the_number(smollm2: Path, domain: Tokenizer) -> None:
    old = load_tokenizer(smollm2).backend_tokenizer
    with pytest.raises(UserError, match=r"500 are asked") as caught:
        add_pieces(old, domain, 500)
    most = int(str(caught.value.problems[0].hint).split()[1].strip(","))
    assert len(add_pieces(old, domain, most).parts) == most
    with pytest.raises(UserError, match="is WordLevel, plain BPE is needed"):
        add_pieces(old, Tokenizer(models.WordLevel({"a": 0}, unk_token="a")), 1)


def test_names_are_control_tokens_or_words(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    old = tokenizer.backend_tokenizer
    grown = add_names(old, ["<tool_call>", "[END]", "aspirin", " ibuprofen"])
    added = {token["content"]: token for token in json.loads(grown.backend.to_str())["added_tokens"]}
    assert [added[name]["special"] for name in ("<tool_call>", "[END]", "aspirin", " ibuprofen")] == [True, True] + [
        False
    ] * 2
    assert list(grown.parts) == [49_152, 49_153, 49_154, 49_155]
    assert grown.parts[49_154] == old.encode("aspirin").ids
    new = grown.backend.encode("take aspirins, ibuprofen<tool_call>").tokens
    assert "aspirin" in new and " ibuprofen" in new and new[-1] == "<tool_call>"
    assert check_exact(old, grown) == 0, "a text without them is cut as before"
    opened = PreTrainedTokenizerFast(tokenizer_object=grown.backend)
    assert opened.decode(grown.backend.encode("an aspirin").ids, skip_special_tokens=True) == "an aspirin"


def test_every_name_that_cannot_be_added_is_told(smollm2: Path) -> None:
    with pytest.raises(UserError) as caught:
        add_names(load_tokenizer(smollm2).backend_tokenizer, ["<|im_end|>", "", "<new>", "<new>"])
    assert [problem.what for problem in caught.value.problems] == [
        "'<|im_end|>' is there already, id 2",
        "token 1 is empty",
        "'<new>' is named twice",
    ]
    with pytest.raises(UserError, match="no token is named"):
        add_names(load_tokenizer(smollm2).backend_tokenizer, [])
