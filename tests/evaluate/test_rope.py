"""`--rope`, and the other options of suites that read long texts, as a user meets them."""

from __future__ import annotations

import pytest

from llama_ft.cli import app
from llama_ft.errors import UserError
from llama_ft.evaluate.opening import open_model
from llama_ft.evaluate.page import page
from llama_ft.evaluate.positions import SUITE as POSITIONS
from llama_ft.evaluate.positions import borders_of, pairs, score_name
from llama_ft.evaluate.result import Score, SuiteResult
from llama_ft.evaluate.rope import read_rope, rope_name


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("{rope_type: yarn, factor: 2}", "yarn-2"),
        ("{rope_type: linear, factor: 4, rope_theta: 500000}", "linear-4-theta-500000"),
        ("{rope_type: default, rope_theta: 1000000}", "theta-1e+06"),
        ("{rope_type: yarn, factor: 2, truncate: false}", "yarn-2-truncate-False"),
    ],
)
def test_a_scaling_has_a_name(said, name):
    scaling = read_rope(said)
    assert rope_name(scaling) == name and scaling.rope_type in said


@pytest.mark.parametrize(
    ("said", "where", "what"),
    [
        ("{rope_type: yarm, factor: 2}", "--rope.rope_type", "did you mean 'yarn'"),
        ("{rope_type: yarn}", "--rope.factor", "needs it"),
        ("{rope_type: linear, factor: 2, low_freq_factor: 1}", "--rope.low_freq_factor", "belongs to llama3"),
        ("yarn", "--rope", ""),
        ("{rope_type: yarn", "--rope", ""),
        ("null", "--rope", "no scaling was named"),
    ],
)
def test_a_mistake_is_told_as_in_a_recipe(said, where, what):
    with pytest.raises(UserError) as told:
        read_rope(said)
    assert where in str(told.value) and what in str(told.value) and "override" not in str(told.value)


def test_a_scaled_model_has_its_reach_and_a_name_of_its_own(tiny_base):
    plain, scaled = (
        open_model(str(tiny_base)),
        open_model(str(tiny_base), rope=read_rope("{rope_type: yarn, factor: 4}")),
    )
    assert (plain.context, scaled.context) == (512, 2048)
    assert scaled.name == f"{plain.name}-yarn-4"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--suite", "passkey", "--lengths", "1k"], "--lengths: '1k' is no number of tokens"),
        (["--suite", "passkey", "--lengths", ","], "--lengths: no length was named"),
        (["--suite", "passkey", "--rope", "{rope_type: yarn}"], "--rope.factor"),
        (["--suite", "heldout", "--lengths", "512"], "--lengths"),
        (["--suite", "positions", "--infilling-tokens", "a,b,c,d"], "only the suite infilling has --infilling-tokens"),
        (["--suite", "infilling", "--infilling-tokens", "a,b"], "infilling needs four tokens, found 2"),
        (["--suite", "passkey", "--data", "small-sums"], "which passkey does not measure on"),
        (["--suite", "positons"], "did you mean 'positions'"),
    ],
)
def test_options_that_make_no_sense(arguments, told, tiny_base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        app(["eval", str(tiny_base), "--out", str(tmp_path / "out"), *arguments])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and told in said and "Traceback" not in said


def test_a_run_takes_no_other_scaling(tiny_run, capsys):
    with pytest.raises(SystemExit):
        app(["eval", str(tiny_run.path), "--suite", "passkey", "--rope", "{rope_type: yarn, factor: 2}"])
    assert "--rope: a run is measured with the RoPE scaling that it was trained with" in capsys.readouterr().err


def test_the_page_draws_a_line_for_each_subject():
    borders = borders_of(2048)
    results = []
    for name, nats in (("tuned", 2.0), ("unscaled", 3.0)):
        scores = [
            Score(score_name(*pair), nats + place / 8, 0, 9, 4, "nats", "lower")
            for place, pair in enumerate(pairs(borders))
        ]
        results.append(SuiteResult(POSITIONS.name, name, scores, [], {"borders": borders}, 1.0))
    said = page("run", [results])
    assert said.count('stroke-width="2" d="M') == 2 + 2, "two lines, and two in the key"
    assert 'data-by="position"' in said and "tuned 2.375 nats at position 1,792" in said
    assert (
        "curve"
        not in page("run", [[SuiteResult("heldout", "base", results[0].scores, [], {}, 1.0)]])
        .split("</style>")[1]
        .split("<script")[0]
    )
