"""The suite `positions`: nats by position, beside plain transformers; how far a subject reads."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from llama_ft.errors import UserError
from llama_ft.evaluate.opening import check_subjects, open_model, open_subjects
from llama_ft.evaluate.positions import NLL, SUITE, borders_of, long_documents, pairs, score_name
from llama_ft.evaluate.rope import read_rope
from llama_ft.evaluate.suites import Context
from llama_ft.llama.context import context_length
from llama_ft.llama.head import CHUNK_BYTES
from tests.tiny_run import make_run

WORDS = "the llama eats grass and hay while the alpaca sleeps on a hill of stones near the river "


@pytest.fixture
def named(tmp_path) -> Context:
    """Two long texts and a short one."""
    for name, count in (("a", 40), ("b", 70), ("c", 2)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {i}: {WORDS}" for i in range(count)))
    data = [str(tmp_path / f"{name}.txt") for name in "abc"]
    return Context(tmp_path / "eval", data=data, lengths=[256])


@pytest.mark.parametrize(
    ("length", "borders"),
    [
        (16384, [*range(0, 16385, 1024)]),
        (8192, [*range(0, 8193, 512)]),
        (1300, [0, 512, 1024, 1300]),
        (1000, [0, 250, 500, 750, 1000]),
        (3, [0, 1, 2, 3]),
    ],
)
def test_buckets_lie_end_to_end(length, borders):
    assert borders_of(length) == borders


def test_positions_cost_what_transformers_says(tiny_base, named):
    subject = open_model(str(tiny_base))
    assert SUITE.needs(named) == []
    result = SUITE.run(subject, named)
    model = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    documents = {one.id: one.ids for one in long_documents(subject, named, 256)}
    assert len(result.rows) == min(8, len(documents)) > 3
    for row in result.rows:
        ids = torch.tensor(documents[row["id"]])
        with torch.no_grad():
            log_probs = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
        nats = -log_probs[:-1].gather(1, ids[1:, None])[:, 0].numpy()
        assert row["values"][NLL] == [pytest.approx(nats.mean(), rel=1e-4), 255]
        # position 0 is predicted by nothing: the first bucket has a token less
        assert row["values"][score_name(0, 64)] == [pytest.approx(nats[:63].mean(), rel=1e-4), 63]
        assert row["values"][score_name(192, 256)] == [pytest.approx(nats[191:].mean(), rel=1e-4), 64]
    assert [score.name for score in result.scores] == [NLL, *(score_name(*pair) for pair in pairs(borders_of(256)))]
    whole = np.mean([row["values"][NLL][0] for row in result.rows])
    assert result.score(NLL).value == pytest.approx(whole)


def test_pieces_are_of_one_document_and_as_long_as_asked(tiny_base, named):
    subject = open_model(str(tiny_base))
    documents = long_documents(subject, named, 256)
    assert {one.id.partition(":")[0] for one in documents} == {"a.txt", "b.txt"}, "the short one has no such piece"
    for one in documents:
        assert len(one.ids) == 256
        name = one.id[0]
        others = {f"{other} {i}: the" for other in "abc" if other != name for i in range(70)}
        assert not any(text in one.text for text in others)


def test_what_is_too_long_is_said_before_anything_is_measured(tiny_base, named):
    subject = open_model(str(tiny_base))
    named.lengths = [1024]
    with pytest.raises(UserError, match=r"reads 512 tokens, not 1024") as told:
        SUITE.run(subject, named)
    assert "--rope '{rope_type: default, rope_theta: 10000}'" in str(told.value)
    assert "{rope_type: yarn, factor: 2}" in str(told.value)
    named.lengths, named.data = [400], named.data[2:]
    with pytest.raises(UserError, match=r"no document has 400 tokens, the longest has \d+"):
        SUITE.run(subject, named)


def test_the_hint_is_followed_by_a_model_that_reads_on(tiny_base, named):
    """Frequencies are the base's own; the same numbers as far as it could read before."""
    named.lengths = [256]
    subject = open_model(str(tiny_base), rope=read_rope("{rope_type: default, rope_theta: 10000}"), longest=1024)
    assert subject.context == 1024 and subject.name.endswith("-theta-10000")
    here = SUITE.run(subject, named).score(NLL).value
    named.folder = named.folder / "plain"
    assert SUITE.run(open_model(str(tiny_base)), named).score(NLL).value == pytest.approx(here, rel=1e-6)
    named.lengths = [1024]
    named.folder = named.folder / "long"
    assert SUITE.run(subject, named).settings["length"] == 1024


def test_a_run_is_shown_beside_its_base_with_and_without_the_scaling(tiny_base, tmp_path, named):
    changes = {"model__rope_scaling": "{rope_type: linear, factor: 2}", "sequence__max_length": 1024}
    run = make_run(tmp_path / "run", tiny_base, **changes)[0]
    context = Context(tmp_path / "eval", run, data=named.data, limit=2)
    names = ("unscaled", "base", "tuned")
    subjects = {one.name: one for one in open_subjects(run, names, context.prepared)}
    assert [one.context for one in subjects.values()] == [1024] * 3
    turns = {name: one.model.model.rotary_emb.inv_freq for name, one in subjects.items()}
    assert torch.equal(turns["unscaled"], 2 * turns["base"]) and torch.equal(turns["base"], turns["tuned"])
    assert context_length(subjects["unscaled"].model.config) == 512, "its config says what the base says"
    results = {name: SUITE.run(one, context) for name, one in subjects.items()}
    assert {result.settings["length"] for result in results.values()} == {1024}, "what the run was trained on"
    assert len({result.score(NLL).value for result in results.values()}) == 3


def test_a_run_without_scaling_has_no_unscaled_base(tiny_run):
    with pytest.raises(UserError, match=r"has no model\.rope_scaling: its base is not scaled"):
        check_subjects(tiny_run, ["unscaled", "tuned"])


def test_smollm2_is_read_by_position_and_never_holds_all_logits(smollm2, tmp_path):
    """The first 1,024 tokens of a module that python-files holds out; logits come in chunks of the loss head's size."""
    subject = open_model("smollm2-135m")
    rows = []
    hook = subject.model.lm_head.register_forward_hook(lambda module, args, out: rows.append(out.numel() * 4))
    result = SUITE.run(subject, Context(tmp_path, lengths=[1024], limit=1))
    hook.remove()
    assert max(rows) <= CHUNK_BYTES["cpu"] < 1023 * subject.model.config.vocab_size * 4
    assert [score.name for score in result.scores] == [NLL, score_name(0, 512), score_name(512, 1024)]
    assert all(0.5 < score.value < 4 for score in result.scores)


def test_no_matrix_of_all_positions_is_made(tiny_base):
    """6,144 tokens: scores of all pairs would take 600 MB in one layer of four heads."""
    code = (
        "import resource, sys; from llama_ft.evaluate.opening import open_model; "
        "from llama_ft.evaluate.rope import read_rope; "
        "rope = read_rope('{rope_type: yarn, factor: 16}'); one = open_model(sys.argv[1], rope=rope); "
        "ids = one.tokenizer(sys.argv[2] * 800)['input_ids'][:6144]; assert len(ids) == 6144; "
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024; "
        "one.losses(ids[:64]); before = peak(); one.losses(ids); one.answers([ids[:6130]], 4); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_base), WORDS], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 300
