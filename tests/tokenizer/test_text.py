"""Offsets of whole tokens, and control strings that stay text."""

from __future__ import annotations

import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.text import TextEncoder


@pytest.fixture(scope="module", params=["smollm2", "llama2"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    if request.param == "smollm2":
        return load_tokenizer(request.getfixturevalue("smollm2"))
    folder = tmp_path_factory.mktemp("llama2")
    model = request.getfixturevalue("real_data") / "tokenizers" / "llama2_tokenizer.model"
    shutil.copyfile(model, folder / "tokenizer.model")
    return load_tokenizer(folder)


def specials(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


TEXTS = ["Hello wörld 🦙 2023\n\n x", "  two spaces", "", "日本語 and\ttabs \r\n", "a" * 300]


def test_ids_are_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, specials(tokenizer))
    end = tokenizer.eos_token
    texts = [*TEXTS, f"one{end}two {end} three"]
    expected = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert [encoding.ids for encoding in encoder.encode(texts)] == expected


def test_offsets_cover_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    """No character between two tokens is left out: trimmed offsets would hide that a token begins with a space."""
    encoder = TextEncoder(tokenizer, specials(tokenizer))
    for text, encoding in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        at = 0
        for start, end in encoding.offsets:
            assert start <= at <= end
            at = max(at, end)
        assert at == len(text)


def test_sealed_text_without_control_strings_is_cut_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    encoder = TextEncoder(tokenizer, specials(tokenizer))
    plain, sealed = encoder.encode(TEXTS), encoder.encode_sealed(TEXTS)
    assert [(e.ids, e.offsets) for e in plain] == [(e.ids, e.offsets) for e in sealed]


def test_control_strings_stay_text_and_sealed_ones_do_not(tokenizer: PreTrainedTokenizerFast) -> None:
    control = specials(tokenizer)
    encoder = TextEncoder(tokenizer, control)
    ids = set(tokenizer.convert_tokens_to_ids(control))
    typed = " ".join(control) + "".join(control)
    assert not ids & set(encoder.encode_sealed([typed])[0].ids)
    for name in control:
        sealed = encoder.encode_sealed([f"x {name} y{encoder.seal(name)}z {name}"])[0].ids
        own = tokenizer.convert_tokens_to_ids(name)
        assert sealed.count(own) == 1 and len(ids & set(sealed)) == 1
    assert tokenizer.decode(encoder.encode_sealed([typed])[0].ids) == typed


def test_merges_that_would_build_a_control_token() -> None:
    """SentencePiece vocabularies converted by score hold a merge for every pair, `</` + `s>` included."""
    vocabulary = {"</s>": 0, "<": 1, "/": 2, "s": 3, ">": 4, "</": 5, "s>": 6}
    backend = Tokenizer(models.BPE(vocabulary, [("<", "/"), ("s", ">"), ("</", "s>")]))
    backend.add_special_tokens(["</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    encoder = TextEncoder(tokenizer, ["</s>"])
    assert encoder.encode(["s</s>"])[0].ids == [3, 0]
    assert encoder.encode_sealed(["s</s>" + encoder.seal("</s>")])[0].ids == [3, 5, 6, 0]


def test_tokens_outside_the_models_vocabulary_keep_their_ids() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<x>", "<y>"])
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=backend), ["<x>", "<y>"])
    assert encoder.encode_sealed([f"a <x> {encoder.seal('<y>')}{encoder.seal('<x>')}"])[0].ids == [1, 0, 3, 2]


def test_a_trimming_post_processor_is_not_believed() -> None:
    """Llama-3's tokenizer trims the space off ` A`, as if the token lay wholly inside an answer that begins with A."""
    backend = Tokenizer(models.BPE({"Ġ": 0, "A": 1, "ĠA": 2, ":": 3}, [("Ġ", "A")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert tokenizer(": A", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (2, 3)]
    encoding = TextEncoder(tokenizer, []).encode([": A"])[0]
    assert encoding.ids == [3, 2] and encoding.offsets == [(0, 1), (1, 3)]
