"""The suite `infilling`: what middles cost, beside plain transformers, and which lines count as written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from llama_ft.data.infilling import InfillingEncoder, InfillingTokens
from llama_ft.data.render import MASKED
from llama_ft.errors import UserError
from llama_ft.evaluate.answers import Answer
from llama_ft.evaluate.gaps import Gap
from llama_ft.evaluate.infilling import BLIND, ENDED, EXACT, FORMS, NLL, SUITE, Asker
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.subject import Subject
from llama_ft.evaluate.suites import Context
from tests.data.test_infilling import code_llama  # noqa: F401  (fixture)

MARKERS = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_end>"]
SMOLLM2 = ["<repo_name>", "<reponame>", "<filename>", "<|endoftext|>"]
GAP = Gap("span:mine.py:0.0", "the llama eats", " grass and hay", " and\nstones\n")


@pytest.fixture(scope="module")
def base(tiny_base, tmp_path_factory) -> Path:
    """The tiny model with four more tokens."""
    folder = tmp_path_factory.mktemp("infilling")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    model = LlamaForCausalLM.from_pretrained(tiny_base)
    torch.manual_seed(2)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def subject(base) -> Subject:
    return open_model(str(base))


@pytest.fixture
def named(tmp_path) -> Context:
    """A file of code, the tiny model's four tokens."""
    path = tmp_path / "code.py"
    path.write_text("".join(f"def eat_{i}(hay, grass):\n    return hay * {i} + grass\n\n\n" for i in range(12)))
    return Context(tmp_path / "eval", data=[str(path)], limit=5, infilling_tokens=MARKERS)


@torch.no_grad()
def plain_cost(folder: Path, before: list[int], after: list[int]) -> float:
    """Nats of `after` behind `before`, by transformers alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = [*before, *after]
    log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return -sum(log_probs[t - 1, ids[t]].item() for t in range(len(before), len(ids)))


@pytest.mark.parametrize("way", [*FORMS, BLIND])
def test_a_middle_costs_what_transformers_says(base, subject, named, way):
    tokenizer = AutoTokenizer.from_pretrained(base)
    pre, suf, mid = tokenizer.convert_tokens_to_ids(MARKERS[:3])
    ids = {part: tokenizer(getattr(GAP, part))["input_ids"] for part in ("prefix", "middle", "suffix")}
    middle = ids["middle"]
    if way == "psm":
        before = [pre, *ids["prefix"], suf, *ids["suffix"], mid]
    elif way == "spm":
        both = tokenizer(GAP.prefix + GAP.middle)["input_ids"]
        assert both == [*ids["prefix"], *middle], "no token joins the two here"
        before = [pre, suf, *ids["suffix"], mid, *ids["prefix"]]
    else:
        before = ids["prefix"]
    [row] = Asker.of(subject, named).score([GAP], lambda done: None)
    value, tokens = row["values"][f"{way}: {NLL}"]
    assert tokens == len(middle)
    assert value * tokens == pytest.approx(plain_cost(base, before, middle), rel=1e-4)


def test_in_spm_a_token_that_joins_prefix_and_middle_is_the_middles(smollm2, tmp_path):
    """`return` is one token of SmolLM2's: after `ret` it is the middle's, from left to right `urn` alone is."""
    subject = open_model("smollm2-135m")
    asker = Asker.of(subject, Context(tmp_path, infilling_tokens=SMOLLM2))
    gap = Gap("span:x:0.0", "def f():\n    ret", "urn 1\n", "")
    tokenizer = subject.tokenizer

    def said(way: str) -> str:
        return tokenizer.decode([token for token in asker.document(gap, way)[1] if token >= 0])

    assert said("psm") == said(BLIND) == "urn 1\n"
    assert said("spm") == " return 1\n"


@pytest.mark.parametrize("way", [*FORMS, BLIND])
def test_code_llamas_pieces_of_a_middle_are_its_own(code_llama, tmp_path, way):  # noqa: F811
    """A SentencePiece tokenizer, whose markers are no control tokens to every reader and which writes a space before a
    text: what is scored says the middle, and nothing of prefix, suffix and markers."""
    asker = Asker.of(SimpleNamespace(tokenizer=code_llama, context=4096), Context(tmp_path))
    assert asker.names == ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
    gap = Gap("span:x:0.0", "def f(a, b):\n    return", " a + b", "\n\nprint(f(1, 2))\n")
    ids, labels = asker.document(gap, way)
    assert len(ids) == len(labels) and ids[0] == code_llama.bos_token_id
    scored = [token for token, label in zip(ids, labels, strict=True) if label == token]
    pieces = code_llama.convert_ids_to_tokens(scored)
    assert "".join(pieces).replace("▁", " ") == gap.middle
    assert all(label in (token, MASKED) for token, label in zip(ids, labels, strict=True))
    if way != BLIND:
        assert ids[-1] == asker.ids["▁<EOT>"] and labels[-1] == MASKED


def test_its_scores_are_of_all_gaps(subject, named):
    assert SUITE.needs(named) == []
    result = SUITE.run(subject, named)
    rows = {score.name: score.rows for score in result.scores}
    nats = dict.fromkeys([f"{way}: {NLL}" for way in (*FORMS, BLIND)], 1)  # the text is of one window
    shares = dict.fromkeys([f"{form}: {measure}" for form in FORMS for measure in (EXACT, ENDED)], 5)
    assert rows == nats | shares
    assert result.score(f"psm: {EXACT}").value == 0 and result.score(f"psm: {EXACT}").high == pytest.approx(
        0.4345, abs=1e-3
    )
    assert result.remarks == ["psm: exact match 0 of 5, spm: exact match 0 of 5; intervals are Wilson's"]
    lines = [row for row in result.rows if row["id"].startswith("line:")]
    assert all(row["wanted"].startswith(("def eat_", "return hay")) for row in lines)
    assert result.settings["tokens"] == MARKERS


def test_a_line_counts_when_it_is_equal_and_ended(subject, named, monkeypatch):
    """Of four lines: written and ended, with white space around, not ended, and another line."""
    asker = Asker.of(subject, named)
    end = asker.ids[MARKERS[3]]
    gaps = [Gap(f"line:x:0@{i}", "a\n", "return hay", "\nb\n") for i in range(4)]
    texts = [("return hay", [7, end]), (" return hay\n", [7, end]), ("return hay", [7, 8]), ("return", [7, end])]
    asked = []

    def answers(prompts, max_tokens, ends):
        asked.append((prompts, ends))
        return [[Answer(text, ids, "end")] for text, ids in texts]

    monkeypatch.setattr(subject, "answers", answers)
    rows = asker.write(gaps, lambda done: None)
    assert [row["values"][f"psm: {EXACT}"] for row in rows] == [1, 1, 0, 0]
    assert [row["values"][f"spm: {ENDED}"] for row in rows] == [1, 1, 0, 1]
    encoder = InfillingEncoder(subject.tokenizer, InfillingTokens(*MARKERS))
    assert [prompts[0] for prompts, _ in asked] == [encoder.prompt("a\n", "\nb\n", spm=spm) for spm in (False, True)]
    assert all(end in ends and subject.stop < ends for _, ends in asked)


def test_answers_end_where_they_are_told_to(subject):
    prompt = subject.tokenizer("the llama eats")["input_ids"]
    [[free]] = subject.answers([prompt], 12)
    ends = frozenset({free.tokens[3]})
    [[cut]] = subject.answers([prompt], 12, ends=ends)
    assert cut.ended == "end" and cut.tokens == free.tokens[: free.tokens.index(free.tokens[3]) + 1]


def test_smollm2_fills_gaps_no_better_than_chance_before_training(smollm2, tmp_path):
    subject = open_model("smollm2-135m")
    result = SUITE.run(subject, Context(tmp_path, limit=1, infilling_tokens=SMOLLM2))
    assert 0.5 < result.score(f"{BLIND}: {NLL}").value < 6
    assert result.score(f"psm: {NLL}").value > 0.5
    assert result.score(f"psm: {EXACT}").rows == 1
    assert all("█" in row["asked"] for row in result.rows)


def test_what_is_wrong_is_said(tiny_base, subject, named, tmp_path):
    with pytest.raises(UserError, match="--infilling-tokens: the tokenizer has no tokens for infilling"):
        SUITE.run(open_model(str(tiny_base)), Context(tmp_path, data=named.data))
    with pytest.raises(UserError, match="did you mean '<fim_end>'"):
        SUITE.run(subject, Context(tmp_path, data=named.data, infilling_tokens=[*MARKERS[:3], "<fim_ends>"]))
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}))
    [problem] = SUITE.needs(Context(tmp_path, data=[str(chat)]))
    assert "layout messages" in problem.what and problem.key == "--data"
    [problem] = SUITE.needs(Context(tmp_path, data=["no_such.py"]))
    assert "there is no file and no card 'no_such.py'" in problem.what
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    with pytest.raises(UserError, match="there is no text to measure on"):
        SUITE.run(subject, Context(tmp_path, data=[str(empty)], infilling_tokens=MARKERS))
