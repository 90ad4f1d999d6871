"""What a report says by the objective of its run: the sentences of its head, two of its numbers, and its curves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from llama_ft.data.page.tokens import plural, safe
from llama_ft.recipe.objectives import COMPARED, PAIRS, POLICY
from llama_ft.recipe.schema import Recipe
from llama_ft.train.page.curves import NATS, Curve
from llama_ft.train.page.gather import ReportView
from llama_ft.train.page.html import loss, number

PER_TOKEN = ("sft", "pretrain", "rejection_sampling")
"""Objectives whose loss is in nats per labelled token."""
DOCUMENTS = {
    **dict.fromkeys(PAIRS, "pair"),
    "kto": "judged answer",
    **dict.fromkeys((*POLICY, "rejection_sampling"), "prompt"),
}
"""What a document is; elsewhere just that."""


@dataclass(frozen=True)
class Measure:
    """One thing that a run is judged by. `form`: nats, share, or any other number; `up`: whether more is better."""

    key: str
    name: str
    form: str = "number"
    up: bool = True

    def said(self, value: float) -> str:
        """A value as the page writes it."""
        if self.form == "share":
            return f"{value:.1%}"
        return loss(value) if self.form == "nats" else number(value)


LOSS = Measure("loss", "loss", "nats", up=False)
FIRST = {
    **dict.fromkeys(PAIRS, Measure("accuracy", "accuracy", "share")),
    "kto": Measure("loss", "loss", up=False),
    **dict.fromkeys((*POLICY, "rejection_sampling"), Measure("reward", "reward")),
}
"""What the second sentence of the page tells; where it was not measured, the loss."""
NUMBERS = {
    **dict.fromkeys(PAIRS, (FIRST["dpo"], Measure("margin", "margin"))),
    "kto": (
        Measure("rewards_chosen", "reward of desirable answers"),
        Measure("rewards_rejected", "reward of undesirable answers", up=False),
    ),
    **dict.fromkeys(
        POLICY,
        (
            FIRST["grpo"],
            Measure("kl", "KL to the reference, nats", "nats", up=False),
            Measure("answer_tokens", "tokens of an answer"),
        ),
    ),
    "rejection_sampling": (FIRST["rejection_sampling"], LOSS),
}
"""The first two of these that were measured stand in the head of the page."""


class Way(NamedTuple):
    """From where a measure went to where. Held-out values are exact; of steps, which are noisy, it may be `means` of
    the first and the last tenth."""

    first: float
    last: float
    step: int
    values: int
    held_out: bool
    means: bool

    def html(self, measure: Measure) -> str:
        """As a number of the head."""
        last = measure.said(self.last)
        return f"{measure.said(self.first)} → <b>{last}</b>" if self.values > 1 else last


def way(view: ReportView, measure: Measure, *, means: bool) -> Way | None:
    """What metrics.jsonl holds of a measure; None if nothing that is finite."""
    for key, held_out in ((f"eval_{measure.key}", True), (measure.key, False)):
        found = [(step, value) for step, value in view.series(key) if math.isfinite(value)]
        if not found:
            continue
        values = [value for _, value in found]
        size = max(1, len(values) // 10) if means and not held_out else 1
        first, last = fmean(values[:size]), fmean(values[-size:])
        return Way(first, last, found[-1][0], len(values), held_out, size > 1)
    return None


def lede(view: ReportView) -> str:
    """The run in two sentences, HTML."""
    said = []
    if view.recipe is not None:
        said.append(_what_was_done(view.recipe, view.lock.get("documents")))
    best = _best_of(view)
    if best is not None:
        k, one, most = best
        said.append(
            f"The best of {k} drawn answers is worth <b>{number(most)}</b> in the mean, one alone {number(one)}."
        )
    first = FIRST.get(view.objective or "")
    for measure in filter(None, (first, LOSS)):
        found = way(view, measure, means=first is not None)
        if found is not None and found.values > 1:
            said.append(_how_it_went(measure, found))
            break
    else:
        said += [] if best else ["Nothing has been measured yet."]
    return " ".join(said)


def _what_was_done(recipe: Recipe, documents: object) -> str:
    objective = recipe.training.objective
    method = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA"}[recipe.adapter.method]
    became = "made a reward model" if objective == "reward" else "tuned"
    name = {"simpo": "SimPO"}.get(objective, objective.upper())
    by = f" by {name}" if objective in ("dpo", "kto", "orpo", "simpo", *POLICY) else ""
    on = ""
    if isinstance(documents, int):
        best = "the best answer to each of " if objective == "rejection_sampling" else ""
        on = f" on {best}{plural(documents, DOCUMENTS.get(objective, 'document'))}"
    return f"{safe(recipe.model.base)}, {became} with {method}{by}{on}."


def _how_it_went(measure: Measure, found: Way) -> str:
    verb = "rise" if measure.up else "fall"
    better = found.last > found.first if measure.up else found.last < found.first
    went = {"rise": "rose", "fall": "fell"}[verb] if better else f"did not {verb}: it went"
    kind = "held-out" if found.held_out else "training"
    means = " (means of the first and the last tenth)" if found.means else ""
    return (
        f"The {kind} {measure.name} {went} from {measure.said(found.first)} to <b>{measure.said(found.last)}</b> "
        f"in {plural(found.step, 'step')}{means}."
    )


def numbers(view: ReportView) -> list[tuple[str, str]]:
    """Two numbers of the head, names and HTML: what the run is judged by, first and last."""
    if view.objective not in NUMBERS:
        pairs = []
        for key, name in (("loss", "training loss"), ("eval_loss", "held-out loss")):
            values = [value for _, value in view.series(key) if math.isfinite(value)]
            if values:
                both = loss(values[0]) + (f" → <b>{loss(values[-1])}</b>" if len(values) > 1 else "")
                pairs.append((name, both))
        return pairs
    pairs = []
    best = _best_of(view)
    if best is not None:
        k, one, most = best
        pairs.append((f"reward, one answer → best of {k}", f"{number(one)} → <b>{number(most)}</b>"))
    for measure in NUMBERS[view.objective]:
        found = way(view, measure, means=True)
        if found is not None:
            tenths = ", by tenths of the run" if found.means else ""
            pairs.append(
                (f"{'held-out' if found.held_out else 'training'} {measure.name}{tenths}", found.html(measure))
            )
    return pairs[:2]


def _best_of(view: ReportView) -> tuple[int, float, float] | None:
    """K, and the mean reward of one answer and of the best of K."""
    try:
        first, last = view.best_of_k[0], view.best_of_k[-1]
        k, one, most = int(last["k"]), float(first["mean"]), float(last["mean"])
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return (k, one, most) if math.isfinite(one + most) else None


def rate_of(view: ReportView) -> tuple[str, str, str]:
    """What tokens are called, and the keys of their number and of their rate."""
    if view.objective == "reward":
        return "tokens", "tokens", "tokens_per_second"
    name = "answer tokens" if view.objective in POLICY else "labelled tokens"
    return name, "labelled_tokens", "labelled_tokens_per_second"


def figures(view: ReportView) -> list[Curve]:
    """The curves of the objective itself, the most telling first and large."""
    objective = view.objective
    if objective in POLICY:
        return _of_policy(view)
    item = f" per {DOCUMENTS[objective]}" if objective in COMPARED else ""
    unit = NATS if objective in PER_TOKEN else ""
    curves = [_curve(view, f"Loss{item}", "loss", unit, large=True)]
    if objective == "rejection_sampling":
        curves += _of_answers(view)
    elif objective in COMPARED:
        curves += _of_sides(view)
    return curves


def _curve(view: ReportView, name: str, key: str, unit: str = "", **how: Any) -> Curve:
    """A figure of metrics.jsonl: of the steps a line, smoothed, and of evaluations points."""
    return Curve(name, view.series(key), unit, view.series(f"eval_{key}"), "held-out", smooth=True, **how)


def _of_sides(view: ReportView) -> list[Curve]:
    """Of chosen and rejected, or of desirable and undesirable answers."""
    said = "score" if view.objective == "reward" else "rewards"
    sides = ("desirable", "undesirable") if view.objective == "kto" else ("chosen", "rejected")
    word = "Scores" if view.objective == "reward" else "Rewards"
    both = []
    for prefix, name in (("", f"{word} of {' and '.join(sides)} answers"), ("eval_", f"Held-out {word.lower()}")):
        line, other = (view.series(f"{prefix}{said}_{side}") for side in ("chosen", "rejected"))
        both.append(Curve(name, line, "", other, sides[1], smooth=not prefix, paired=True, line_name=sides[0]))
    return [
        _curve(view, "Accuracy", "accuracy", percent=True),
        _curve(view, "Margin", "margin"),
        *both,
        _curve(view, "Log-odds of chosen over rejected", "log_odds"),
        _curve(view, "Chosen answers, per token", "nll_chosen", NATS),
        _curve(view, "KL estimate z", "kl", NATS, from_zero=True),
    ]


def _of_policy(view: ReportView) -> list[Curve]:
    reward, *others = _of_answers(view)
    reward.large = True
    return [
        reward,
        _curve(view, "KL to the reference, per token", "kl", NATS, from_zero=True),
        *others,
        _curve(view, "Spread of rewards within a prompt", "reward_spread", from_zero=True),
        _curve(view, "Prompts all of whose answers are worth the same", "flat_groups", from_zero=True, percent=True),
        _curve(view, "Answers that repeat themselves", "repeated_text", from_zero=True, percent=True),
        Curve("Loss", view.series("loss"), smooth=True),  # of an evaluation it is the reward again
    ]


def _of_answers(view: ReportView) -> list[Curve]:
    """Of drawn answers: the reward first, then its parts, lengths and ends."""
    parts = dict.fromkeys([*view.names("reward/"), *view.names("eval_reward/")])
    return [
        _curve(view, "Reward", "reward"),
        *(_curve(view, f"Reward by {safe(part)}", f"reward/{part}") for part in parts),
        _curve(view, "Tokens of an answer", "answer_tokens", " tokens", from_zero=True),
        _curve(view, "Answers that came to their end", "ended", from_zero=True, percent=True),
    ]


def about(recipe: Recipe | None) -> str:
    """What the curves of an objective show, in words."""
    objective = None if recipe is None else recipe.training.objective
    if recipe is None or objective is None:
        return ""
    if objective in PER_TOKEN:
        more = " of the best answers. Reward: one drawn answer to each held-out prompt, by the same seeds every time"
        return f"Loss: nats per labelled token{more if objective == 'rejection_sampling' else ''}."
    if objective == "reward":
        return (
            "Accuracy: share of pairs whose chosen answer scores higher. Of scores only differences count: where one "
            "is x, the model gives the chosen answer a probability of 1 / (1 + exp(−x))."
        )
    if objective in POLICY:
        return (
            "Reward: sum of weight times value, mean of the step's answers; held-out, of one answer to each prompt, "
            "drawn by the same seeds every time. But for GRPO's KL the loss is 0 by construction and tells nothing."
        )
    normalised = objective == "dpo" and (recipe.preference.length_normalised or recipe.preference.loss == "ipo")
    per_token = " per token" if normalised or objective in ("orpo", "simpo") else ""
    of = "log-probability" if objective in ("orpo", "simpo") else "log-ratio to the reference"
    reward = f"The reward of an answer is β times its {of}, in nats{per_token}."
    if objective == "kto":
        return f"{reward} z is by how much the policy favours answers to other prompts, in nats per answer."
    return f"{reward} Margin: chosen less rejected. Accuracy: share of pairs whose chosen answer has the higher reward."
