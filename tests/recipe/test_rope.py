"""model.rope_scaling: each type has its keys, mistakes have their place, documents fit what a base reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.fields import fields_of
from llama_ft.recipe.rope import reach
from llama_ft.recipe.schema_model import ROPE_KEYS, RopeScaling
from tests.recipe.conftest import GOOD, Report

KEY = "model.rope_scaling"


def scaled(scaling: str, base: str = "smollm2-135m", more: str = "") -> str:
    """A recipe with this scaling on line 4, from column 18 on."""
    tokenizer = "  tokenizer: smollm2-135m\n" if base.startswith("preset:") else "  dtype: bfloat16\n"
    rest = "data: [{use: llama-qa}]\ntemplate: chatml\n"
    return f"name: x\nmodel:\n  base: '{base}'\n  rope_scaling: {scaling}\n{tokenizer}{rest}{more}"


VALID = {
    "linear": "{rope_type: linear, factor: 2}",
    "dynamic": "{rope_type: dynamic, factor: 1.5, rope_theta: 5e5}",
    "yarn": "{rope_type: yarn, factor: 4, original_max_position_embeddings: 2048, beta_fast: 16, beta_slow: 2}",
    "yarn, mscale": "{rope_type: yarn, factor: 4, mscale: 0.7, mscale_all_dim: 1, truncate: false}",
    "yarn, attention": "{rope_type: yarn, factor: 4, attention_factor: 1}",
    "llama3": "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4}",
    "theta alone": "{rope_type: default, rope_theta: 1000000}",
    "null": "null",
    "null keys": "{rope_type: linear, factor: 2, beta_fast: null}",
}
WRONG = {
    "a typo": (
        "{rope_type: linear, facotr: 2}",
        [
            f"r.yaml:4:17: {KEY}.factor: factor is missing, rope_type: linear needs it — add 'factor: 4.0'"
            " (How many times the original context is to be read; all but `default` need it)",
            f"r.yaml:4:37: {KEY}.facotr: unknown key 'facotr' — did you mean 'factor'?",
        ],
    ),
    "the old name": (
        "{type: linear, factor: 2}",
        [
            f"r.yaml:4:17: {KEY}.rope_type: rope_type is missing — add 'rope_type: …' (Positions divided by the factor"
            " (`linear`), theta by length (`dynamic`), YaRN, or Llama 3.1's rule)",
            f"r.yaml:4:18: {KEY}.type: unknown key 'type' — write rope_type, as transformers calls it since 4.45",
        ],
    ),
    "a type that is none": (
        "{rope_type: yarm, factor: 2}",
        [
            f"r.yaml:4:29: {KEY}.rope_type: rope_type is 'yarm', one of default, linear, dynamic, yarn, llama3 is"
            " needed — did you mean 'yarn'?"
        ],
    ),
    "a word for the section": (
        "linear",
        [f"r.yaml:4:17: {KEY}: rope_scaling is 'linear', a map is needed — write {{rope_type: linear}}"],
    ),
    "a factor that shrinks": (
        "{rope_type: linear, factor: 0.5}",
        [f"r.yaml:4:45: {KEY}.factor: factor is 0.5, a number from 1 up is needed"],
    ),
    "a quoted factor": (
        "{rope_type: linear, factor: '2'}",
        [f"r.yaml:4:45: {KEY}.factor: factor is '2', a number from 1 up is needed — remove the quotes"],
    ),
    "keys of another type": (
        "{rope_type: linear, factor: 2, beta_fast: 32, original_max_position_embeddings: 4096}",
        [
            f"r.yaml:4:48: {KEY}.beta_fast: beta_fast belongs to yarn, rope_type: linear does not use it — remove it",
            f"r.yaml:4:63: {KEY}.original_max_position_embeddings: original_max_position_embeddings belongs to yarn,"
            " llama3, rope_type: linear does not use it — remove it",
        ],
    ),
    "theta without a number": (
        "{rope_type: default, factor: 2}",
        [
            f"r.yaml:4:17: {KEY}.rope_theta: rope_theta is missing, rope_type: default needs it — add"
            " 'rope_theta: 1000000.0' (Another base of the frequencies; null keeps the base model's)",
            f"r.yaml:4:38: {KEY}.factor: factor belongs to linear, dynamic, yarn, llama3, rope_type: default does not"
            " use it — remove it",
        ],
    ),
    "all that llama3 needs": (
        "{rope_type: llama3}",
        [
            f"r.yaml:4:17: {KEY}.factor: factor is missing, rope_type: llama3 needs it — add 'factor: 4.0'"
            " (How many times the original context is to be read; all but `default` need it)",
            f"r.yaml:4:17: {KEY}.low_freq_factor: low_freq_factor is missing, rope_type: llama3 needs it — add"
            " 'low_freq_factor: 1.0' (llama3: wavelengths above original / this are divided by the factor"
            " (Llama 3.1: 1))",
            f"r.yaml:4:17: {KEY}.high_freq_factor: high_freq_factor is missing, rope_type: llama3 needs it — add"
            " 'high_freq_factor: 4.0' (llama3: wavelengths below original / this stay as they are (Llama 3.1: 4))",
        ],
    ),
    "a band upside down": (
        "{rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4}",
        [
            f"r.yaml:4:68: {KEY}.high_freq_factor: high_freq_factor is 4 and low_freq_factor 4"
            " — high_freq_factor is the larger one"
        ],
    ),
    "a band below a default": (
        "{rope_type: yarn, factor: 8, beta_slow: 40}",
        [f"r.yaml:4:46: {KEY}.beta_slow: beta_fast is 32 and beta_slow 40 — beta_fast is the larger one"],
    ),
    "half of a pair": (
        "{rope_type: yarn, factor: 8, mscale: 0.7}",
        [f"r.yaml:4:46: {KEY}.mscale: mscale does nothing without mscale_all_dim — add mscale_all_dim, or remove it"],
    ),
    "stated and computed": (
        "{rope_type: yarn, factor: 8, mscale: 0.7, mscale_all_dim: 1, attention_factor: 1}",
        [
            f"r.yaml:4:78: {KEY}.attention_factor: attention_factor is stated, so mscale and mscale_all_dim do nothing"
            " — write one or the other"
        ],
    ),
}


@pytest.mark.parametrize("scaling", VALID.values(), ids=VALID.keys())
def test_valid_scalings_and_their_round_trip(report: Report, here: Path, scaling: str) -> None:
    assert report(scaled(scaling)) == []
    recipe = load_recipe("r.yaml")
    Path("dumped.yaml").write_text(dump(recipe))
    assert load_recipe("dumped.yaml") == recipe


@pytest.mark.parametrize(("scaling", "expected"), WRONG.values(), ids=WRONG.keys())
def test_mistakes(report: Report, scaling: str, expected: list[str]) -> None:
    assert report(scaled(scaling)) == expected


def test_each_type_takes_exactly_its_keys(report: Report) -> None:
    """The table, key by key: stated for a type that has it, there is no complaint; else exactly one."""
    values = dict.fromkeys(fields_of(RopeScaling), "0.5") | {
        "factor": "2", "rope_theta": "1e6", "original_max_position_embeddings": "8192", "low_freq_factor": "1",
        "high_freq_factor": "4", "beta_fast": "40", "truncate": "true",
    }  # fmt: skip
    pairs = {"mscale": "mscale_all_dim", "mscale_all_dim": "mscale"}
    for kind, (needed, optional) in ROPE_KEYS.items():
        for name in fields_of(RopeScaling):
            if name == "rope_type":
                continue
            keys = dict.fromkeys([*needed, name, *([pairs[name]] if name in pairs else [])])
            text = ", ".join(f"{key}: {values[key]}" for key in keys)
            problems = report(scaled(f"{{rope_type: {kind}, {text}}}"))
            strangers = [key for key in keys if key not in (*needed, *optional)]
            assert [problem.split(": ")[1] for problem in problems] == [f"{KEY}.{key}" for key in strangers]


def test_numbers_reach_transformers_as_floats_and_lengths_as_they_are() -> None:
    scaling = RopeScaling(
        rope_type="yarn", factor=4, original_max_position_embeddings=4096, attention_factor=1, truncate=False
    )
    found = scaling.parameters()
    assert found == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.0,
        "truncate": False,
    }
    assert [type(value) for value in found.values()] == [str, float, int, float, bool]


def test_a_child_of_another_type_leaves_its_parents_keys(report: Report, here: Path) -> None:
    """Maps merge; what the parent said for yarn is no mistake of the child that chose linear, and does nothing."""
    Path("parent.yaml").write_text(scaled("{rope_type: yarn, factor: 4, beta_fast: 16}"))
    assert report("extends: ./parent.yaml\nmodel: {rope_scaling: {rope_type: linear}}\n") == []
    recipe = load_recipe("r.yaml")
    assert recipe.model.rope_scaling is not None
    assert recipe.model.rope_scaling.parameters() == {"rope_type": "linear", "factor": 4.0}
    Path("dumped.yaml").write_text(dump(recipe))
    again = load_recipe("dumped.yaml")
    assert again.model.rope_scaling is not None
    assert again.model.rope_scaling.parameters() == {"rope_type": "linear", "factor": 4.0}
    found = report("extends: ./parent.yaml\nmodel: {rope_scaling: {rope_type: linear, beta_slow: 2}}\n")
    assert [line.split(":")[:3] for line in found] == [["r.yaml", "2", "43"]]


def test_overrides_reach_into_the_section(report: Report) -> None:
    text = scaled("{rope_type: yarn, factor: 4}")
    assert report(text, ["model.rope_scaling.factor=8"]) == []
    assert load_recipe("r.yaml", ["model.rope_scaling.factor=8"]).model.rope_scaling == RopeScaling(
        rope_type="yarn", factor=8
    )
    assert load_recipe("r.yaml", ["model.rope_scaling=null"]).model.rope_scaling is None
    [problem] = report(text, ["model.rope_scaling.beta_fasst=8"])
    assert problem.startswith("override 1: model.rope_scaling.beta_fasst: unknown key")
    assert problem.endswith("did you mean 'beta_fast'?")


def test_reach() -> None:
    """factor × original; llama3 keeps what a base reads already; theta alone says nothing."""
    assert reach({"rope_type": "linear", "factor": 4.0}, 4096, 4096) == 16_384
    assert reach({"rope_type": "dynamic", "factor": 1.5}, 4096, 4096) == 6144
    assert reach({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}, 4096, 4096) == 4096
    assert reach({"rope_type": "llama3", "factor": 8.0}, 8192, 131_072) == 131_072
    assert reach({"rope_type": "llama3", "factor": 8.0}, 8192, 8192) == 65_536
    assert reach({"rope_type": "default", "rope_theta": 1e6}, 4096, 4096) is None


LONG = {
    "base": (
        "null",
        "smollm2-135m",
        8193,
        "smollm2-135m can read, 8192 — write 8192 or less, or set model.rope_scaling",
    ),
    "base, fits": ("null", "smollm2-135m", 8192, None),
    "linear": (
        "{rope_type: linear, factor: 2}",
        "smollm2-135m",
        20_000,
        "smollm2-135m can read, 16384 with rope_type: linear — write 16384 or less, or a factor of 3",
    ),
    "linear, fits": ("{rope_type: linear, factor: 2}", "smollm2-135m", 16_384, None),
    "yarn from a stated length": (
        "{rope_type: yarn, factor: 4, original_max_position_embeddings: 2048}",
        "smollm2-135m",
        8193,
        "smollm2-135m can read, 8192 with rope_type: yarn — write 8192 or less, or a factor of 5",
    ),
    "theta alone": ("{rope_type: default, rope_theta: 1e6}", "smollm2-135m", 1_000_000, None),
    "preset": ("null", "preset:llama-2-7b", 1_000_000, None),
    "preset, scaled": (
        "{rope_type: dynamic, factor: 2}",
        "preset:llama-2-7b",
        8193,
        "preset:llama-2-7b can read, 8192 with rope_type: dynamic — write 8192 or less, or a factor of 3",
    ),
    "preset that is scaled already": (
        "{rope_type: linear, factor: 2}",
        "preset:llama-3.1-8b",
        16_385,
        "preset:llama-3.1-8b can read, 16384 with rope_type: linear — write 16384 or less, or a factor of 3",
    ),
    "llama3 again": (
        "{rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4}",
        "preset:llama-3.1-8b",
        131_072,
        None,
    ),
    "a base that nobody knows here": ("null", "org/name", 1_000_000, None),
}


@pytest.mark.parametrize(("scaling", "base", "length", "expected"), LONG.values(), ids=LONG.keys())
def test_documents_fit_the_base(report: Report, scaling: str, base: str, length: int, expected: str | None) -> None:
    found = report(scaled(scaling, base, f"sequence: {{max_length: {length}}}\n"))
    line = f"r.yaml:8:12: sequence.max_length: {length} tokens are more than {expected}"
    assert found == ([] if expected is None else [line])


def test_random_weights_are_no_longer_refused(report: Report) -> None:
    assert report(GOOD.replace("{base: smollm2-135m}", "{base: smollm2-135m, init: random}")) == []
    assert load_recipe("r.yaml").model.starts_new
    assert not load_recipe("quickstart").model.starts_new
