"""A model with more tokens: old rows bit for bit, new rows the mean of their parts, the same logits for old ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from llama_ft.cli import app
from llama_ft.data.vocabulary.train import train_on_sources
from llama_ft.errors import UserError
from llama_ft.llama.checkpoints.hf import EMBEDDING, HEAD
from llama_ft.llama.grow import TEXTS, grow_model, new_rows, token_names
from llama_ft.tokenizer.load import load_tokenizer
from tests.conftest import ROOT
from tests.tiny_run import make_base


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other")
    (folder / "words.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"), encoding="utf-8")
    train_on_sources([str(folder / "words.txt")], folder / "tokenizer", vocab_size=500)
    return folder / "tokenizer"


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("grown") / f"tied-{request.param}", tied=request.param)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_rows_and_logits(base: Path, other: Path, tmp_path: Path) -> None:
    done = grow_model(str(base), tmp_path / "out", names=["<tool>", "zebra"], other=str(other), count=30, multiple=64)
    assert done.tokens == (360, 392) and done.rows == (360, 448)
    assert done.rows_kept and done.states and done.difference == 0
    assert 0 < done.share < 0.5 and done.loss > 0
    before, after = weights(base), weights(tmp_path / "out")
    assert before.keys() == after.keys() and (HEAD in after) == (not done.tied)
    for name, old in before.items():
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(old, after[name])
            continue
        assert torch.equal(old, after[name][:360]) and after[name].shape == (448, 64)
        for token, parts in done.grown.parts.items():
            assert torch.allclose(after[name][token], old[parts].mean(dim=0), atol=1e-7)
        assert torch.allclose(after[name][447], old.mean(dim=0), atol=1e-7)
        assert len(set(map(tuple, after[name][360:392].tolist()))) > 25, "new tokens can be told apart"


def test_plain_transformers_opens_it(base: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = grow_model(str(base), out, names=["<tool>"], other=str(other), count=20)
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) == 381 == model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    text = "The Licensor shall grant the Licensee a License <tool>"
    ids = tokenizer(text).input_ids
    old_ids = load_tokenizer(base)(text.removesuffix("<tool>")).input_ids
    parts = [part for token in ids[:-1] for part in done.grown.parts.get(token, [token])]
    assert parts == old_ids and len(ids) < len(old_ids) and ids[-1] == tokenizer.convert_tokens_to_ids("<tool>") == 380
    old = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        tokens = torch.tensor([old_ids])
        assert torch.equal(old(tokens).logits, model(tokens).logits[..., :360])
    assert load_tokenizer(out).eos_token == "<|im_end|>" and load_tokenizer(out).pad_token == "<|endoftext|>"


def test_a_new_token_takes_no_more_than_its_likeliest_part(base: Path, other: Path, tmp_path: Path) -> None:
    """The bound in the module's words, measured: a mean of logits is below their maximum."""
    done = grow_model(str(base), tmp_path / "out", other=str(other), count=25)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(torch.tensor([load_tokenizer(base)(TEXTS[0]).input_ids])).logits[0].double()
    for token, parts in done.grown.parts.items():
        assert torch.allclose(logits[:, token], logits[:, parts].mean(dim=1), atol=1e-4)
        assert (logits[:, token].exp() <= logits[:, parts].exp().mean(dim=1) * 1.0001).all()


def test_the_stored_type_stays(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    done = grow_model(str(base), tmp_path / "out", names=["<a>"])
    after = weights(tmp_path / "out")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert done.rows_kept and done.states and done.difference == 0
    parts = done.grown.parts[360]
    exact = weights(base)[EMBEDDING][parts].double().mean(dim=0)
    assert torch.equal(after[EMBEDDING][360], exact.to(torch.bfloat16))


def test_spare_rows_of_the_base_are_taken_first(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", vocab_size=384)
    done = grow_model(str(base), tmp_path / "out", names=["<a>", "<b>"])
    assert done.rows == (384, 384) and done.tokens == (360, 362)
    assert not torch.equal(weights(base)[EMBEDDING][360], weights(tmp_path / "out")[EMBEDDING][360])


def test_new_rows_keep_the_type_and_the_old() -> None:
    rows = torch.arange(12, dtype=torch.float16).view(4, 3)
    grown = new_rows(rows, {4: [0, 3], 5: [2]}, 4, 7)
    assert grown.dtype == torch.float16 and torch.equal(grown[:4], rows)
    assert grown[4].tolist() == [4.5, 5.5, 6.5] and torch.equal(grown[5], rows[2])
    assert grown[6].tolist() == [4.5, 5.5, 6.5]


def test_a_sentencepiece_base_loses_its_model_file(real_data: Path, tmp_path: Path) -> None:
    """tokenizer.model would say something else than tokenizer.json, and llama.cpp's converter reads it first."""
    base = make_base(tmp_path / "base", vocab_size=600)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    (tmp_path / "words.txt").write_text((ROOT / "LICENSE").read_text(encoding="utf-8"))
    train_on_sources([str(tmp_path / "words.txt")], tmp_path / "sp", vocab_size=600, kind="sentencepiece")
    (base / "tokenizer.model").write_bytes((tmp_path / "sp" / "tokenizer.model").read_bytes())
    done = grow_model(str(base), tmp_path / "out", names=["<a>"])
    assert not (tmp_path / "out" / "tokenizer.model").exists() and done.same_ids == len(TEXTS)
    opened = load_tokenizer(tmp_path / "out")
    assert (opened.bos_token, opened.eos_token, len(opened)) == ("<s>", "</s>", 601)
    assert opened("x <a>").input_ids[-1] == 600 and opened("x").input_ids[0] == 1


def test_the_command(base: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("<tool>\n\n zebra\n")
    out = str(tmp_path / "out")
    command = ["tokenizer", "grow", str(base), "--tokens", str(names), "--from", str(other), "--add", "10", "-o", out]
    with pytest.raises(SystemExit) as ended:
        app(command)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "12 tokens added to 360" in said and "rows 360 -> 372" in said
    assert "old rows equal bit by bit, last hidden states of 6 texts equal bit by bit" in said
    assert (
        "largest difference 0\n" in said and Tokenizer.from_file(f"{out}/tokenizer.json").token_to_id(" zebra") == 371
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == 372 and config["model_type"] == "llama"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing is to be added"),
        (["--from", "OTHER"], "--from and --add N go together"),
        (["--add", "3"], "--from and --add N go together"),
        (["--tokens", "nope.txt"], "no such file"),
        (["--tokens", "<|im_end|>,"], "'<|im_end|>' is there already, id 2"),
        (["--from", "OTHER", "--add", "9999"], "9,999 are asked"),
        (["--from", "./none", "--add", "1"], "no such tokenizer folder"),
    ],
)
def test_what_is_refused(base: Path, other: Path, tmp_path: Path, capsys, arguments: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as ended:
        app(
            [
                "tokenizer",
                "grow",
                str(base),
                *(str(other) if one == "OTHER" else one for one in arguments),
                "-o",
                str(tmp_path / "out"),
            ]
        )
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_outgrew_its_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", vocab_size=359)
    with pytest.raises(UserError, match="has 360 tokens, its embedding 359 rows"):
        grow_model(str(base), tmp_path / "out", names=["<a>"])


def test_a_full_folder_is_not_touched(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError):
            grow_model(str(base), tmp_path / "out", names=["<a>"], overwrite=overwrite)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_names_from_a_file_keep_their_spaces(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("<a>\n\n word\n")
    assert token_names(str(tmp_path / "names")) == ["<a>", " word"] and token_names("<a>, b") == ["<a>", "b"]
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="no UTF-8"):
        token_names(str(tmp_path / "latin"))
