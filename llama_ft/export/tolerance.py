"""What counts as equal: the tolerances of an export, by the type its weights are stored in.

The numbers are the project's agreement (docs/export.md explains them). A type that only rounds (bfloat16) is judged by
what it does to probabilities: rounding SmolLM2's weights to bfloat16, with no adapter at all, moves its logits by 0.18.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Tolerance:
    """Limits; None = not judged."""

    max_delta: float | None
    """Largest |Δ logit| over all positions and all tokens."""
    mean_kl: float | None
    """Mean over positions of KL(trained ‖ merged), in nats."""
    top1: float | None
    """Share of positions where both put the same token first."""
    greedy: Literal["equal", "near ties"]
    """`equal`: every answer is the same. `near ties`: it may differ where the top-2 gap is below 2 · max|Δ logit|."""


ROUNDED = Tolerance(max_delta=None, mean_kl=1e-3, top1=0.99, greedy="near ties")
TOLERANCES = {
    "float32": Tolerance(max_delta=1e-3, mean_kl=None, top1=None, greedy="equal"),
    "bfloat16": ROUNDED,
    "float16": ROUNDED,  # rounds finer than bfloat16; overflow is caught by the merge
}


def judge(tolerance: Tolerance, measured: dict[str, Any], greedy: list[dict[str, Any]]) -> list[str]:
    """Every way in which measurements exceed a tolerance, in words; empty = equal. A NaN is never within."""
    faults = []
    delta, kl, top1 = measured["max_delta_logit"], measured["mean_kl"], measured["top1_agreement"]
    if tolerance.max_delta is not None and not delta <= tolerance.max_delta:
        faults.append(f"max |Δ logit| is {delta:.3g}, allowed {tolerance.max_delta:g}")
    if tolerance.mean_kl is not None and not kl <= tolerance.mean_kl:
        faults.append(f"mean KL is {kl:.3g} nats, allowed {tolerance.mean_kl:g}")
    if tolerance.top1 is not None and not top1 >= tolerance.top1:
        faults.append(f"top-1 agreement is {top1:.2%}, allowed {tolerance.top1:.0%} or more")
    for number, answer in enumerate(greedy, 1):
        if answer["equal"]:
            continue
        gap = answer["top2_gap"]
        if tolerance.greedy == "equal":
            faults.append(f"greedy answer {number} differs from its token {answer['differs_at']} on, allowed nowhere")
        elif not (gap is not None and gap < 2 * delta):
            found = "no gap" if gap is None else f"{gap:.3g}"
            faults.append(
                f"greedy answer {number} differs where the top-2 gap is {found}, "
                f"allowed below {2 * delta:.3g} (2 · max|Δ|)"
            )
    return faults
