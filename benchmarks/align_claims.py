"""What a finished run on answers must show, each said as a sentence with its numbers, and whether it does."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import read
from llama_ft.recipe.run import Run

CLEAR = 3.0
"""Standard errors that a difference must be apart by to be called one."""
PAIRS = 500
"""Held-out pairs that a reward model's accuracy must be told from."""
NEAR = 0.2
"""How far the gain of the best of k may be from what normally distributed rewards give, relative."""


@dataclass(frozen=True)
class Claim:
    """One thing that a run shows, or does not."""

    said: str
    holds: bool


def series(run: Run, key: str) -> list[tuple[int, float]]:
    """(step, value) of all lines of metrics.jsonl that have it."""
    lines = (run.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [(one["step"], one[key]) for one in map(json.loads, lines) if one.get(key) is not None]


def ends(run: Run, key: str) -> tuple[float, float]:
    """A held-out figure before the first step and at the last evaluation."""
    found = series(run, f"eval_{key}")
    if len(found) < 2 or found[0][0] != 0:
        raise ValueError(f"{run.path} has no eval_{key} before and after")
    return found[0][1], found[-1][1]


def held_out(run: Run) -> int:
    """Held-out documents of a run."""
    sources = read(run.lock_file)["data"]["sources"]
    return sum(one["kept"] if one["role"] == "eval" else one["held_out"] for one in sources)


def of_share(share: float, count: int) -> float:
    """The standard error of a share."""
    return math.sqrt(share * (1 - share) / count)


def reward_claims(run: Run) -> list[Claim]:
    """A reward model is right more often than a coin, on enough held-out pairs."""
    found = json.loads((run.path / "eval" / "accuracy.json").read_text(encoding="utf-8"))
    every = found[-1]
    apart = (every["accuracy"] - 0.5) / of_share(0.5, every["pairs"])
    close, clear = found[0], found[-2]
    return [
        Claim(
            f"ranks {every['accuracy']:.1%} ± {every['error']:.1%} of {every['pairs']} held-out pairs right, "
            f"{apart:.1f} standard errors above chance",
            every["pairs"] >= PAIRS and apart > CLEAR,
        ),
        Claim(
            f"is right more often where it is surer: {close['accuracy']:.0%} of the quarter that it scores closest, "
            f"{clear['accuracy']:.0%} of the clearest",
            clear["accuracy"] > close["accuracy"],
        ),
    ]


def normal_best_of(k: int) -> float:
    """The mean of the largest of k standard normal numbers: ∫ x k φ(x) Φ(x)^(k−1) dx, by the trapezoid rule."""
    normal, step = statistics.NormalDist(), 1e-3
    places = (step * number for number in range(-8000, 8001))
    return step * sum(x * k * normal.pdf(x) * normal.cdf(x) ** (k - 1) for x in places)


def spread_of(rewards: Sequence[float]) -> float:
    """Standard deviation of a prompt's rewards, without the bias that few of them have where they are normal (c₄)."""
    count = len(rewards)
    c4 = math.sqrt(2 / (count - 1)) * math.gamma(count / 2) / math.gamma((count - 1) / 2)
    return statistics.stdev(rewards) / c4


def best_of_claims(run: Run) -> list[Claim]:
    """Of more answers the best is worth more, by what order statistics say, also where other answers are drawn."""
    lines = (run.path / "sampled" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    groups = [[one["reward"] for one in json.loads(line)["answers"]] for line in lines]
    told = {one["k"]: one["mean"] for one in json.loads((run.path / "sampled" / "best_of_k.json").read_text())}
    spread = statistics.fmean(map(spread_of, groups))
    ratios = {k: (told[k] - told[1]) / (spread * normal_best_of(k)) for k in told if k > 1}
    gains = [max(group[-4:]) - group[0] for group in groups]
    gain, error = statistics.fmean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    curve = ", ".join(f"{k}: {told[k]:.3f}" for k in told)
    return [
        Claim(
            f"mean reward of the best of k answers to {len(groups)} prompts: {curve}; its rise is "
            f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} of what normal order statistics give for the "
            f"spread within a prompt, {spread:.3f}",
            all(abs(ratio - 1) <= NEAR for ratio in ratios.values()),
        ),
        Claim(
            f"the best of each prompt's last four answers is worth {gain:.3f} ± {error:.3f} more than its first one",
            gain > CLEAR * error,
        ),
    ]


def dpo_claims(run: Run) -> list[Claim]:
    """Held-out pairs are told apart better than before."""
    (margin, margin_after), (share, share_after) = ends(run, "margin"), ends(run, "accuracy")
    count = held_out(run)
    apart = (share_after - 0.5) / of_share(0.5, count)
    return [
        Claim(f"held-out margin {margin:.3f} → {margin_after:.3f}", margin_after > margin),
        Claim(
            f"the chosen answer gains on the rejected one in {share:.1%} → {share_after:.1%} ± "
            f"{of_share(share_after, count):.1%} of {count} held-out pairs",
            apart > CLEAR and share_after > share,
        ),
    ]


def kto_claims(run: Run) -> list[Claim]:
    """Held-out good answers gain on bad ones."""
    good, bad, loss = (ends(run, name) for name in ("rewards_chosen", "rewards_rejected", "loss"))
    return [
        Claim(
            f"of {held_out(run)} held-out answers the good gain on the bad: {good[0] - bad[0]:.3f} → "
            f"{good[1] - bad[1]:.3f}",
            good[1] - bad[1] > good[0] - bad[0],
        ),
        Claim(f"held-out loss {loss[0]:.4f} → {loss[1]:.4f}", loss[1] < loss[0]),
    ]


def grpo_claims(run: Run) -> list[Claim]:
    """Answers to held-out prompts are right more often than before, and so are those that the policy learns from."""
    (reward, reward_after), (right, right_after) = ends(run, "reward"), ends(run, "reward/exact_match")
    count = held_out(run)
    error = math.hypot(of_share(right, count), of_share(right_after, count))
    told = [value for _, value in series(run, "reward/exact_match")]
    tenth = max(2, len(told) // 10)
    first, last = told[:tenth], told[-tenth:]
    rise = statistics.fmean(last) - statistics.fmean(first)
    noise = math.sqrt((statistics.variance(first) + statistics.variance(last)) / tenth)
    return [
        Claim(
            f"right answers to {count} held-out prompts {right:.1%} → {right_after:.1%} ± {error:.1%}, reward "
            f"{reward:.3f} → {reward_after:.3f}",
            right_after - right > CLEAR * error and reward_after > reward,
        ),
        Claim(
            f"right answers in the first {tenth} steps {statistics.fmean(first):.1%}, in the last "
            f"{statistics.fmean(last):.1%}: {rise / noise if noise else math.inf:.1f} standard errors more",
            rise > CLEAR * noise,
        ),
    ]


def samples(run: Run) -> list[dict[str, Any]]:
    """Answers before and after; see llama_ft/train/samples.py."""
    file = Path(run.path, "eval", "samples.json")
    return list(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else []
