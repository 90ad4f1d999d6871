"""Keys of preference, reward_model, sampling, rewards and policy: read by their objective, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.check_data import NEEDS, layout_fits
from llama_ft.recipe.diff import differences, open_side, values
from llama_ft.recipe.objectives import KEYS, READS, reference_of, unused_objective_keys
from llama_ft.recipe.schema import Recipe
from tests.recipe.conftest import GOOD, ONLINE, REWARD, Report, recipe

OBJECTIVES = tuple(NEEDS)
VALUES = {
    "preference.loss": "ipo", "preference.beta": "0.2", "preference.label_smoothing": "0.1",
    "preference.length_normalised": "true", "preference.sft_weight": "0.5", "preference.margin": "0.7",
    "preference.desirable_weight": "2", "preference.undesirable_weight": "2", "preference.reference": "copy",
    "reward_model.margin": "true", "reward_model.center": "0.01", "sampling.answers": "4",
    "sampling.max_new_tokens": "64", "sampling.temperature": "0.9", "sampling.top_p": "1", "policy.kl": "0.1",
    "policy.whiten": "true", "policy.max_kl": "0.5",
    "rewards": "[{function: exact_match}]",
}  # fmt: skip
"""A value other than the default for every key that only some objectives read."""


def test_every_key_is_read_by_some_objective_and_has_a_default_to_go_back_to():
    assert set(KEYS) == set(VALUES) == {key for keys in READS.values() for key in keys} | {"sampling.answers"}
    assert set(READS) == {*OBJECTIVES} - {"sft", "pretrain"}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_key_that_the_objective_does_not_read_is_refused_by_name(report: Report, objective: str) -> None:
    read = READS.get(objective, ())
    for key, value in VALUES.items():
        section, _, name = key.partition(".")
        line = f"{section}: {{{name}: {value}}}" if name else f"{section}: {value}"
        found = report(recipe(objective, line, rewards=objective in ONLINE and key != "rewards"))
        refused = [text for text in found if f"{objective} does not read it" in text]
        if key in read:
            assert not refused, found
        else:
            assert len(refused) == 1 and refused[0].startswith("r.yaml:6:")
            assert f"{key}: {name or key} belongs to " in refused[0] and " — " in refused[0]


NEAREST = {
    "the KL of grpo": (
        recipe("grpo", "preference: {beta: 0.1}"),
        "r.yaml:6:14: preference.beta: beta belongs to dpo, kto, orpo, simpo; grpo does not read it"
        " — write policy.kl, the weight of the KL",
    ),
    "the KL of dpo": (
        recipe("dpo", "policy: {kl: 0.1}"),
        "r.yaml:6:10: policy.kl: kl belongs to grpo, rloo; dpo does not read it"
        " — write preference.beta: the larger, the nearer to the reference",
    ),
    "a margin by rating": (
        recipe("reward", "preference: {margin: 0.5}"),
        "r.yaml:6:14: preference.margin: margin belongs to simpo; reward does not read it"
        " — write reward_model: {margin: true}, and each pair's margin in its row",
    ),
    "a margin of rewards": (
        recipe("simpo", "reward_model: {margin: true}"),
        "r.yaml:6:16: reward_model.margin: margin belongs to reward; simpo does not read it — write preference.margin",
    ),
    "no reference": (
        recipe("orpo", "preference: {reference: copy}"),
        "r.yaml:6:14: preference.reference: reference belongs to dpo, kto, grpo, rloo; orpo does not read it"
        " — remove it, orpo has no reference",
    ),
    "whitening": (
        recipe("grpo", "policy: {whiten: true}"),
        "r.yaml:6:10: policy.whiten: whiten belongs to rloo; grpo does not read it"
        " — remove it, grpo always normalises within a prompt's answers",
    ),
    "another objective": (
        recipe("sft", "sampling: {answers: 4}"),
        "r.yaml:6:12: sampling.answers: answers belongs to grpo, rloo, rejection_sampling; sft does not read it"
        " — remove it, or write objective: grpo",
    ),
    "scores of a reward model": (
        recipe("reward", REWARD.strip()),
        "r.yaml:6:1: rewards: rewards belongs to grpo, rloo, rejection_sampling; reward does not read it"
        " — remove it, a reward model learns from pairs; grpo and rloo name its run in rewards",
    ),
    "smoothing of another loss": (
        recipe("dpo", "preference: {loss: ipo, label_smoothing: 0.1}"),
        "r.yaml:6:25: preference.label_smoothing: label_smoothing belongs to loss: sigmoid and robust — remove it",
    ),
    "length of another loss": (
        recipe("dpo", "preference: {loss: hinge, length_normalised: true}"),
        "r.yaml:6:27: preference.length_normalised: length_normalised belongs to loss: sigmoid — remove it",
    ),
    "a limit of a KL that is not known": (
        recipe("grpo", "policy: {kl: 0, max_kl: 1}"),
        "r.yaml:6:17: policy.max_kl: with kl: 0 there is no reference to be far from — remove it",
    ),
    "a reference that nothing asks": (
        recipe("grpo", "policy: {kl: 0}", "preference: {reference: copy}"),
        "r.yaml:7:14: preference.reference: with kl: 0 there is no reference — remove it",
    ),
    "robust against nothing": (
        recipe("dpo", "preference: {loss: robust}"),
        "r.yaml:6:14: preference.loss: robust with label_smoothing 0 is sigmoid"
        " — add label_smoothing: 0.1, the share of pairs that are labelled the wrong way round, or write sigmoid",
    ),
    "no adapter to switch off": (
        recipe("dpo", "adapter: {method: full}", "preference: {reference: adapter_off}"),
        "r.yaml:7:14: preference.reference: method: full has no adapter that could be switched off"
        " — write precomputed, or copy",
    ),
    "answers that are not known yet": (
        recipe("grpo", "preference: {reference: precomputed}"),
        "r.yaml:6:14: preference.reference: grpo samples its answers, nothing about them can be known before"
        " — write adapter_off, or copy",
    ),
    "noise": (
        GOOD + "training: {objective: dpo, neftune_alpha: 5}\n",
        "r.yaml:5:28: training.neftune_alpha: NEFTune's noise is for sft and pretrain, dpo compares answers, which it"
        " would blur — remove it, or write null",
    ),
    "a head that is not there": (
        recipe("reward", "adapter: {modules_to_save: [lm_head]}"),
        "r.yaml:6:11: adapter.modules_to_save: a reward model has no lm_head"
        " — remove lm_head, its score is trained in any case",
    ),
    "loss on prompts": (
        recipe("kto", "sequence: {train_on: all}"),
        "r.yaml:6:12: sequence.train_on: kto compares answers, the prompt is not learned from"
        " — write responses, or last_response",
    ),
    "split prompts": (
        recipe("rloo", "sequence: {overlong: split}"),
        "r.yaml:6:12: sequence.overlong: rloo answers whole prompts, which cannot be split — write drop or truncate",
    ),
    "a stream of verdicts": (
        GOOD + "training: {objective: kto, max_steps: 5}\nmixture: {streaming: true}\n",
        "r.yaml:6:11: mixture.streaming: kto measures its KL on the answers of other rows, which a stream has not read"
        " yet — write streaming: false",
    ),
    "a stream of prompts": (
        GOOD + "training: {objective: grpo, max_steps: 5}\nmixture: {streaming: true}\n" + REWARD,
        "r.yaml:6:11: mixture.streaming: grpo draws prompts from a prepared set — write streaming: false",
    ),
    "a stream of pairs": (
        GOOD + "training: {objective: dpo, max_steps: 5}\nmixture: {streaming: true}\nadapter: {method: full}\n",
        "r.yaml:6:11: mixture.streaming: dpo numbers its rows, whose both answers a stream does not keep — write"
        " streaming: false",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NEAREST.values(), ids=NEAREST)
def test_what_is_said(report: Report, text: str, expected: str) -> None:
    assert report(text) == [expected]


GOOD_ONES = {
    "reward": recipe("reward", "reward_model: {margin: true, center: 0.01}"),
    "dpo": recipe("dpo", "preference: {label_smoothing: 0.1, length_normalised: true, sft_weight: 1}"),
    "dpo by copy": recipe("dpo", "adapter: {method: full}", "preference: {loss: robust, label_smoothing: 0.2}"),
    "kto": recipe("kto", "preference: {undesirable_weight: 1.33, reference: precomputed}"),
    "orpo": recipe("orpo", "preference: {beta: 0.2}"),
    "simpo": recipe("simpo", "preference: {beta: 2, margin: 1.6}"),
    "grpo": recipe("grpo", "policy: {kl: 0.1, max_kl: 1}", "sampling: {answers: 4, max_new_tokens: 9}"),
    "grpo without a reference": recipe("grpo", "policy: {kl: 0}"),
    "rloo": recipe("rloo", "policy: {whiten: true}", "preference: {reference: adapter_off}"),
    "several rewards": recipe(
        "rloo",
        "rewards: [{model: runs/r, weight: 0.5}, {function: length, target: 9, weight: -1}, {function: code}]",
        rewards=False,
    ),
    "best of one": recipe("rejection_sampling", "sampling: {answers: 1, top_p: 0.9}"),
    "pairs in one pass each": recipe("dpo", "sequence: {packing: false}"),
}


@pytest.mark.parametrize("text", GOOD_ONES.values(), ids=GOOD_ONES)
def test_a_recipe_reads_back_equal_and_holds_nothing_that_is_not_read(here: Path, text: str) -> None:
    Path("r.yaml").write_text(text)
    first = load_recipe("r.yaml")
    Path("d.yaml").write_text(dump(first))
    assert load_recipe("d.yaml") == first
    stated = dump(first)
    for section in ("preference", "reward_model", "sampling", "rewards", "policy"):
        reads = any(key.partition(".")[0] == section for key in READS[first.training.objective])
        reads = reads and not (section == "preference" and first.policy.kl == 0)
        assert (f"\n{section}:" in stated) == reads
    told = values(open_side("r.yaml"))
    assert not set(unused_objective_keys(first)) & set(told)
    assert not differences(told, values(open_side("d.yaml")))


def test_what_a_parent_says_to_another_objective_is_no_mistake_and_is_forgotten(here: Path) -> None:
    Path("p.yaml").write_text(recipe("dpo", "preference: {loss: ipo, beta: 5, sft_weight: 1}"))
    Path("r.yaml").write_text("extends: p.yaml\ntraining: {objective: kto}\n")
    found = load_recipe("r.yaml")
    assert (found.preference.loss, found.preference.beta, found.preference.sft_weight) == ("sigmoid", 5, 0.0)
    Path("d.yaml").write_text(dump(found))
    assert load_recipe("d.yaml") == found
    assert load_recipe("p.yaml", ["training.objective=sft"]).preference == type(found.preference)()
    Path("q.yaml").write_text("extends: p.yaml\npreference: {loss: sigmoid}\ntraining: {objective: dpo}\n")
    assert load_recipe("q.yaml").preference.sft_weight == 1
    with pytest.raises(UserError, match="sft does not read it"):
        load_recipe("p.yaml", ["training.objective=sft", "preference.beta=1"])


def test_the_reference_that_auto_means() -> None:
    def resolved(*overrides: str) -> str:
        return reference_of(load_recipe("quickstart", overrides))

    online = ("rewards=[{function: exact_match}]", "training.global_batch=8")
    assert resolved() == resolved("training.objective=simpo") == "none"
    for name in ("dpo", "kto"):
        assert resolved(f"training.objective={name}") == "adapter_off"
        assert resolved(f"training.objective={name}", "preference.reference=precomputed") == "precomputed"
    for name in ("grpo", "rloo"):
        assert resolved(f"training.objective={name}", *online) == "adapter_off"
        assert resolved(f"training.objective={name}", *online, "policy.kl=0") == "none"
    assert reference_of(load_recipe("alpaca/smollm2-135m-full", ["training.objective=dpo"])) == "precomputed"
    assert reference_of(load_recipe("alpaca/smollm2-135m-full", ["training.objective=grpo", *online])) == "copy"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_prompts_are_drawn_from_whatever_has_a_question(objective: str) -> None:
    layouts = {"alpaca", "sharegpt", "messages", "preference", "rated", "text", "prompt-completion"}
    fitting = {layout for layout in layouts if layout_fits(objective, layout) is None}
    if objective in ONLINE:
        assert fitting == layouts - {"text"}
    elif objective == "sft":
        assert fitting == layouts - {"rated"}
    else:
        assert fitting == {{"pretrain": "text", "kto": "rated"}.get(objective, "preference")}
    for layout in layouts - fitting:
        what, hint = layout_fits(objective, layout)  # type: ignore[misc]
        assert objective in what and layout in what and hint


def test_a_misspelt_key_is_looked_for_in_the_new_sections(report: Report) -> None:
    assert report(GOOD + "beta: 0.1\n") == ["r.yaml:5:1: beta: unknown key 'beta' — did you mean 'preference.beta'?"]
    assert report(recipe("dpo", "preference: {label_smothing: 0.1}"))[0].endswith("did you mean 'label_smoothing'?")
    assert "a number above 0 and at most 1 is needed" in report(recipe("grpo", "sampling: {top_p: 1.5}"))[0]


def test_a_recipe_from_python_has_all_sections(here: Path) -> None:
    Path("r.yaml").write_text(recipe("grpo"))
    found = load_recipe("r.yaml")
    assert isinstance(found, Recipe) and found.rewards[0].function == "exact_match" and found.rewards[0].weight == 1.0
    assert (found.sampling.answers, found.policy.kl, found.reward_model.center, found.preference.beta) == (
        8,
        0.04,
        0,
        0.1,
    )
