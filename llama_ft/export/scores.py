"""The proof of a reward model: two models score the same answers, and must put the same one of each pair first.

What is proven is what a reward model is used for. One side is what was trained (base and adapter, read back from disk),
asked at the token that training scored; the other is merged/, opened by transformers' own class, which finds that token
by itself. Both compute in float32 with the weights as they are stored, one answer at a time and so without padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from llama_ft.data.prepare import Prepared
from llama_ft.export.job import Job, adapter_facts, finite, reopen, trained_model
from llama_ft.export.prompts import template_faults, whole_conversations
from llama_ft.export.proof import pick_device
from llama_ft.llama.reward import LlamaForSequenceClassification

PAIRS = 16
"""Held-out pairs that are scored, if the data has as many."""
TOKENS = 6144
"""Tokens of all their answers, prompts included: pairs that would go beyond are passed over."""
_LAST = 64  # training pairs to choose from where nothing is held out


@dataclass(frozen=True)
class Pair:
    """The ids of two answers to a prompt, with the prompt, end tokens included."""

    chosen: list[int]
    rejected: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that a model is asked to read."""
        return len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class ScoreTolerance:
    """Limits of a reward model's export; None = not judged."""

    max_delta: float | None
    """Largest |Δ score| over all answers."""
    mean_kl: float | None
    """Mean over pairs of the KL between the two models' say on which answer is better, in nats."""


ROUNDED = ScoreTolerance(max_delta=None, mean_kl=1e-3)
TOLERANCES = {"float32": ScoreTolerance(max_delta=1e-3, mean_kl=None), "bfloat16": ROUNDED, "float16": ROUNDED}
"""By the type that weights are stored in. 16 bits are judged by what rounding does to preferences, with the limit that
logits have: a reward has no unit, but two of them say a probability, and where margins move by a share r of themselves
the KL is at most 0.22·r², whatever their scale. SmolLM2-135M with an adapter trained on pairs of HH-RLHF for 40 steps:
rounding to bfloat16 moves scores by up to 0.13 and margins by 6 %, a KL of 2e-4 (float16: 0.003, and 3e-8); a merge at
twice the adapter's scale is at 8e-3, one with two layers' down_proj swapped at 2e-2.
"""


def choose_pairs(prepared: Prepared) -> list[Pair]:
    """Pairs spread over the held-out ones, or over the last of training if none are: PAIRS of them within TOKENS.

    Where not even one is that short, the shortest.
    """
    rows = prepared.eval
    if rows is None or len(rows) == 0:
        count = len(prepared.train)
        rows = prepared.train.select(range(max(0, count - _LAST), count))
    stride = max(1, len(rows) // PAIRS)
    first = list(range(0, len(rows), stride))
    found: list[Pair] = []
    shortest: Pair | None = None
    left = TOKENS
    for number in [*first, *sorted(set(range(len(rows))) - set(first))]:
        row = rows[number]
        pair = Pair([int(i) for i in row["input_ids"]], [int(i) for i in row["rejected_ids"]])
        if shortest is None or pair.tokens < shortest.tokens:
            shortest = pair
        if pair.tokens <= left:
            found.append(pair)
            left -= pair.tokens
        if len(found) == PAIRS:
            break
    return found or ([shortest] if shortest is not None else [])


@torch.inference_mode()
def score(model: Any, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """(score of the chosen answer, of the rejected one) of each pair, each answer alone. The model's mode stays.

    Ours is told to score at the last token, as in training; transformers' finds the last that is no padding.
    """
    was_training = model.training
    model.eval()

    def one(ids: list[int]) -> float:
        batch = torch.tensor([ids], device=model.device)
        if isinstance(model, LlamaForSequenceClassification):
            return model(batch, rows=torch.tensor([len(ids) - 1], device=model.device)).scores.item()
        return model(input_ids=batch).logits.float().item()

    found = [(one(pair.chosen), one(pair.rejected)) for pair in pairs]
    model.train(was_training)
    return found


def compare(trained: Sequence[tuple[float, float]], merged: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The measurements of export.json.

    KL(p‖q) of Bernoulli(σ(margin)) (arXiv 1706.03741, equation 1: what two scores say of a pair), averaged over pairs.
    accuracy: the share of pairs whose chosen answer is scored higher. near_ties: pairs whose trained margin is at most
    2 · max|Δ|, which rounding may turn around; turned: the others whose order differs.
    """
    flat = list(zip([s for pair in trained for s in pair], [s for pair in merged for s in pair], strict=True))
    deltas = [abs(left - right) for left, right in flat]
    largest = math.nan if any(math.isnan(delta) for delta in deltas) else max(deltas, default=0.0)
    margins = [(left[0] - left[1], right[0] - right[1]) for left, right in zip(trained, merged, strict=True)]
    firm = [(left, right) for left, right in margins if not abs(left) <= 2 * largest]
    count = max(1, len(margins))
    return {
        "pairs": len(margins),
        "max_delta_score": largest,
        "mean_kl": sum(_preference_kl(left, right) for left, right in margins) / count,
        "near_ties": len(margins) - len(firm),
        "turned": sum(not left * right > 0 for left, right in firm),
        "accuracy_trained": sum(left > 0 for left, _ in margins) / count,
        "accuracy_merged": sum(right > 0 for _, right in margins) / count,
        "mean_margin_trained": sum(left for left, _ in margins) / count,
        "mean_margin_merged": sum(right for _, right in margins) / count,
    }


def _preference_kl(left: float, right: float) -> float:
    """KL in nats between Bernoulli(σ(left)) and Bernoulli(σ(right))."""
    p = torch.tensor([left, -left], dtype=torch.float64)
    q = torch.tensor([right, -right], dtype=torch.float64)
    log_p, log_q = torch.nn.functional.logsigmoid(p), torch.nn.functional.logsigmoid(q)
    return float((log_p.exp() * (log_p - log_q)).sum())


def judge(tolerance: ScoreTolerance, measured: dict[str, Any]) -> list[str]:
    """Every way in which measurements exceed a tolerance, in words; empty = equal. A NaN is never within."""
    faults = []
    delta, kl, turned = measured["max_delta_score"], measured["mean_kl"], measured["turned"]
    if tolerance.max_delta is not None and not delta <= tolerance.max_delta:
        faults.append(f"max |Δ score| is {delta:.3g}, allowed {tolerance.max_delta:g}")
    if tolerance.mean_kl is not None and not kl <= tolerance.mean_kl:
        faults.append(f"mean KL of preferences is {kl:.3g} nats, allowed {tolerance.mean_kl:g}")
    if turned:
        faults.append(f"{turned} of {measured['pairs']} pairs are put in another order, and are no near ties")
    return faults


def prove_scores(job: Job, staged: Path) -> dict[str, Any]:
    """Asks both sides, one after the other. Returns the contents of export.json, `kind` scores."""
    pairs = choose_pairs(job.prepared)
    trained = score(trained_model(job), pairs)
    model, tokenizer = reopen(staged, transformers.LlamaForSequenceClassification)
    device = pick_device(model)
    merged = score(model.to(device), pairs)
    measured = {"tokens": sum(pair.tokens for pair in pairs), **compare(trained, merged)}
    tolerance = TOLERANCES[job.dtype]
    faults = judge(tolerance, measured) + template_faults(whole_conversations(job.prepared), tokenizer)
    scored = [
        {
            "chosen": tokenizer.decode(pair.chosen),
            "rejected": tokenizer.decode(pair.rejected),
            "trained": [finite(value) for value in left],
            "merged": [finite(value) for value in right],
        }
        for pair, left, right in zip(pairs, trained, merged, strict=True)
    ]
    return {
        "kind": "scores",
        "ok": not faults,
        "faults": faults,
        "dtype": job.dtype,
        "computed_in": f"float32 on {device.type}, weights as stored",
        "tolerance": asdict(tolerance),
        "measured": {key: finite(value) for key, value in measured.items()},
        "scored": scored,
        "adapter": adapter_facts(job),
        "opened_with": f"transformers {transformers.__version__} LlamaForSequenceClassification",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
