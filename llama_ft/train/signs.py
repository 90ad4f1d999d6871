"""Signs that a policy learns something else than was meant, read off what it says in each step.

Four of them, each a function of the run's numbers that answers in words or not at all, and silent where steps are too
few to tell. They warn once and stop nothing: what is wrong shows in the answers themselves (sampled/answers.jsonl).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean, median, variance
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llama_ft.recipe.schema import Recipe
    from llama_ft.train.asking import Answer

WINDOW = 10
"""Steps that are the start of a run, and as many that are now; two windows must not overlap."""
RECENT = 5
"""Steps whose mean KL is held against a limit."""
RUNAWAY, FAR = 10.0, 0.5
"""KL per token, beside the median of the start, and in nats at the least: at 0.5 a token is e^0.5 = 1.6 times as likely
as before on average, and a hundred of them are another text."""
LONGER = 2.0
"""Length beside that of the start, up or down."""
GRAM, DISTINCT = 4, 0.5
"""Tokens of an n-gram, and share of an answer's n-grams that must be different (arXiv 1510.03055's distinct-n)."""
PERIOD, TIMES = 16, 8
"""Tokens at most that are said over and over, and how often in a row."""
SHORTEST = 20
"""Tokens of an answer that can be called repeated."""
REPEATED = 0.2
"""Share of answers."""
COLLAPSED = 0.9
"""Share of groups."""
GROUPS = 20
"""Groups below which a share of them says nothing."""


@dataclass(frozen=True)
class Heard:
    """Numbers of one step, for metrics.jsonl.

    `reward`: mean; `answer_median`: tokens; `repeated_text`: share of answers; `flat_groups`: share of prompts all of
    whose answers are worth the same; `equal_groups`: share of those whose answers are all the same; `groups`: prompts
    with several answers.
    """

    reward: float
    answer_median: float
    repeated_text: float
    flat_groups: float
    equal_groups: float
    groups: int


class Signs:
    """Watches the answers of one run, in the process that warns.

    say: `Warnings.say`; records: lines of metrics.jsonl of an earlier part of the run, where they hold these numbers.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str, str], None], records: Iterable[Mapping[str, Any]] = ()):
        self.max_kl = None if recipe.policy.max_kl is None else float(recipe.policy.max_kl)
        self.say = say
        self.steps: list[Heard] = []
        self.kl: list[float] = []
        names = [one.name for one in fields(Heard)]
        for record in records:
            if all(name in record for name in names):
                self.steps.append(Heard(**{name: record[name] for name in names}))
                if "kl" in record:
                    self.kl.append(float(record["kl"]))

    def heard(self, step: int, groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """Judges the answers of a step, one group a prompt. Returns its numbers, to be logged; none without answers.

        Without the reward, which the trainer logs: the mean of all processes, where this one may see its own alone.
        """
        every = [answer for group in groups for answer in group]
        if not every:
            return {}
        several = [group for group in groups if len(group) > 1]
        flat = [len({one.scored.total for one in group}) == 1 for group in several]
        equal = [len({tuple(one.ids) for one in group}) == 1 for group in several]
        now = Heard(
            reward=fmean(one.scored.total for one in every),
            answer_median=float(median(len(one.ids) for one in every)),
            repeated_text=fmean(repeats(one.ids) for one in every),
            flat_groups=fmean(flat) if flat else 0.0,
            equal_groups=fmean(equal) if equal else 0.0,
            groups=len(several),
        )
        self.steps.append(now)
        rewards = [one.reward for one in self.steps]
        self._tell("length-drift", length_drift([one.answer_median for one in self.steps], rewards))
        self._tell("repeated-text", repeated_text([one.repeated_text for one in self.steps]))
        self._tell("collapsed-groups", collapsed(self.steps))
        return {name: value for name, value in asdict(now).items() if name != "reward"}

    def moved(self, kl: float) -> None:
        """Judges the distance to the reference after a step: mean KL in nats per answer token."""
        self.kl.append(kl)
        self._tell("kl-runaway", kl_runaway(self.kl, self.max_kl))

    def _tell(self, name: str, message: str | None) -> None:
        if message is not None:
            self.say(name, message)


def kl_runaway(kl: Sequence[float], max_kl: float | None = None) -> str | None:
    """Whether the policy has left its reference behind. kl: nats per answer token, of each step so far.

    Yes where the mean of the last steps is above `max_kl`, or is no number; or above 0.5 nats and ten times the median
    of the run's start.
    """
    if len(kl) < RECENT:
        return None
    now = fmean(kl[-RECENT:])
    advice = "raise policy.kl or lower training.learning_rate"
    if not math.isfinite(now):
        return f"the KL to the reference is no number; {advice}"
    if max_kl is not None and now > max_kl:
        return f"the KL to the reference is {now:.3g} nats per token, above policy.max_kl {max_kl:g}; {advice}"
    if len(kl) < 2 * WINDOW:
        return None
    start = median(kl[:WINDOW])
    if now <= FAR or now <= RUNAWAY * start:
        return None
    return f"the KL to the reference runs away: {now:.3g} nats per token, {start:.2g} at first; {advice}"


def length_drift(lengths: Sequence[float], rewards: Sequence[float]) -> str | None:
    """Whether rewards rise while answers become more than twice, or less than half, as long as at first.

    lengths: the median answer of each step, in tokens; rewards: the mean of each.
    """
    if len(lengths) < 2 * WINDOW:
        return None
    before, now = median(lengths[:WINDOW]), median(lengths[-WINDOW:])
    if before <= 0 or now <= 0 or max(now / before, before / now) <= LONGER or not rises(rewards):
        return None
    kind = "length" if now > before else "brevity"
    rose = f"reward {fmean(rewards[:WINDOW]):.3g} to {fmean(rewards[-WINDOW:]):.3g}"
    return f"answers went from {before:.0f} to {now:.0f} tokens, {rose}: it may be {kind} that is rewarded"


def repeats(ids: Sequence[int]) -> bool:
    """Whether an answer says the same again and again: few different n-grams, or a phrase many times in a row."""
    tokens = np.asarray(ids)
    if len(tokens) < SHORTEST:
        return False
    grams = np.lib.stride_tricks.sliding_window_view(tokens, GRAM)
    if len(np.unique(grams, axis=0)) < DISTINCT * len(grams):
        return True
    for period in range(1, min(PERIOD, len(tokens) // TIMES) + 1):
        differ = np.flatnonzero(tokens[period:] != tokens[:-period])
        borders = np.concatenate([[-1], differ, [len(tokens) - period]])
        if int(np.diff(borders).max()) - 1 >= (TIMES - 1) * period:
            return True
    return False


def repeated_text(shares: Sequence[float]) -> str | None:
    """Whether more and more answers repeat themselves. shares: of the answers of each step."""
    if len(shares) < 2 * WINDOW:
        return None
    before, now = fmean(shares[:WINDOW]), fmean(shares[-WINDOW:])
    if now <= REPEATED or not rises(shares):
        return None
    return f"{now:.0%} of the answers say the same over and over, {before:.0%} at first: the rewards may not mind it"


def collapsed(steps: Sequence[Heard]) -> str | None:
    """Whether the last steps taught nothing: of nearly all prompts, every answer was worth the same."""
    recent = steps[-WINDOW:]
    groups = sum(one.groups for one in recent)
    if len(recent) < WINDOW or groups < GROUPS:
        return None
    flat = sum(one.flat_groups * one.groups for one in recent) / groups
    equal = sum(one.equal_groups * one.groups for one in recent) / groups
    if flat <= COLLAPSED:
        return None
    said = f"for {flat:.0%} of the last {groups} prompts all answers are worth the same, so nothing is learnt from them"
    if equal > COLLAPSED:
        return f"{said}: they are the same answers; raise sampling.temperature or policy.kl"
    reward = fmean(one.reward for one in recent)
    return f"{said}: the task is too hard for this model, or solved (mean reward {reward:.3g})"


def rises(values: Sequence[float]) -> bool:
    """Whether the mean of the last window is above that of the first by more than three standard errors.

    Three, for it is asked at every step: at two, one look in forty at mere noise would be a rise.
    """
    first, last = values[:WINDOW], values[-WINDOW:]
    error = math.sqrt((variance(first) + variance(last)) / WINDOW)
    return fmean(last) - fmean(first) > max(3 * error, 1e-9)
