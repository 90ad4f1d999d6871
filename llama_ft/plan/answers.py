"""What a model computes of a document where an objective compares answers or draws them: from rows to work.

With a document of L tokens, N of them labelled: of a pair the prompt has p = L − N and an answer e = N/2 on average. A
prompt that is shared is computed once (llama_ft/data/ends.py), and each answer sees it whole:

    pair          p + 2e tokens       p² + 2(2pe + e²) in place of ℓ² for attention
    plain pair    2(p + e)            2(p + e)²
    group of K    p + K·n             p² + K(2pn + n²), n the longest answer that may be drawn
    best of K     p + n               (p + n)², the one that is tuned on

A document of kto, and of sft, is one prompt and one answer. No torch here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from llama_ft.plan.data import DataFacts
from llama_ft.recipe.objectives import ONLINE, PAIRS, POLICY, reference_of
from llama_ft.recipe.schema import Recipe


class Cost(NamedTuple):
    """Of one document, or arrays over several: tokens computed, tokens that the head scores, and Σℓ² of attention."""

    tokens: Any
    labelled: Any
    squares: Any


def cost(recipe: Recipe, length: Any, labelled: Any, *, pairs: bool) -> Cost:
    """What a document of so many tokens takes; numbers, or arrays of equal shape. pairs: whether rows are pairs."""
    objective, shared = recipe.training.objective, recipe.sequence.packing
    prompt = length - labelled
    if objective in PAIRS:
        end = labelled / 2
        squares = prompt**2 + 2 * (2 * prompt * end + end**2) if shared else 2 * (prompt + end) ** 2
        head = 0 * labelled if objective == "reward" else labelled  # a score has one row, not a vocabulary of them
        return Cost(length if shared else 2 * length - labelled, head, squares)
    if objective in ONLINE:
        new = recipe.sampling.max_new_tokens
        count = recipe.sampling.answers if objective in POLICY else 1
        drawn = 0 * labelled + count * new
        if shared:
            return Cost(prompt + drawn, drawn, prompt**2 + count * (2 * prompt * new + new**2))
        return Cost(count * prompt + drawn, drawn, count * (prompt + new) ** 2)
    if pairs:  # sft learns the better answer
        length, labelled = length - labelled // 2, labelled - labelled // 2
    return Cost(length, labelled, length**2)


def work_of(recipe: Recipe, facts: DataFacts) -> DataFacts:
    """The facts of what is computed, in place of those of the rows. Equal for sft on conversations and for pretrain."""
    objective = recipe.training.objective
    if objective not in (*PAIRS, *ONLINE) and not facts.pairs:
        return facts
    rows = (facts.mean_tokens, facts.mean_labelled)
    mean = Cost(*map(float, cost(recipe, *rows, pairs=facts.pairs)))
    spread = facts.mean_squares / max(facts.mean_tokens, 1.0) ** 2
    bent = min(spread, 2.0) if objective in ONLINE else spread  # drawn answers are all as long
    deviation = max(0.0, facts.mean_squares - facts.mean_tokens**2) ** 0.5
    found = replace(
        facts,
        mean_tokens=mean.tokens,
        mean_labelled=mean.labelled,
        mean_squares=mean.squares * max(1.0, bent),
        longest=longest(recipe),
        deviation=deviation * (mean.tokens / facts.mean_tokens if facts.mean_tokens else 1.0),
        evaluated=_evaluated(recipe, facts),
        notes=(*facts.notes, *notes(recipe)),
        exact=facts.exact and objective not in ONLINE,
    )
    if facts.lengths is None or facts.labelled is None:
        return found
    each = cost(recipe, facts.lengths.astype(np.int64), facts.labelled.astype(np.int64), pairs=facts.pairs)
    order = facts.mixture.order(0) if facts.mixture is not None else slice(None)
    return replace(
        found,
        lengths=each.tokens.astype(np.int64),
        labelled=each.labelled.astype(np.int64),
        squares=np.asarray(each.squares, dtype=np.float64),
        mean_squares=float(np.mean(each.squares[order])),
    )


def longest(recipe: Recipe) -> int:
    """Tokens of a document that no other exceeds, as it is computed."""
    length, objective = recipe.sequence.max_length, recipe.training.objective
    if objective in PAIRS:
        return 2 * length
    if objective in POLICY:
        count, new = recipe.sampling.answers, recipe.sampling.max_new_tokens
        return length + count * new if recipe.sequence.packing else count * (length + new)
    return length + recipe.sampling.max_new_tokens if objective in ONLINE else length


def _evaluated(recipe: Recipe, facts: DataFacts) -> tuple[float, float, float] | None:
    """Of one evaluation: a policy answers each held-out prompt once; rejection sampling reads rows, as sft does."""
    if facts.evaluated is None or not facts.eval_documents:
        return facts.evaluated
    tokens, labelled, squares = facts.evaluated
    count, objective = facts.eval_documents, recipe.training.objective
    asked = recipe
    if objective in POLICY:
        asked = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"answers": 1})})
    elif objective in ONLINE:
        asked = recipe.model_copy(update={"training": recipe.training.model_copy(update={"objective": "sft"})})
    each = cost(asked, tokens / count, labelled / count, pairs=facts.pairs)
    spread = max(1.0, squares * count / max(tokens, 1.0) ** 2)
    return float(count * each.tokens), float(count * each.labelled), float(count * each.squares * spread)


def forward_passes(recipe: Recipe) -> tuple[int, int]:
    """(in each step, once before training): further forward passes over all that is trained on.

    The reference's own; for kto both models' on answers to other prompts; for rloo the policy's, whose KL is part of
    the reward.
    """
    objective, reference = recipe.training.objective, reference_of(recipe)
    each = 0 if reference in ("none", "precomputed") else 1
    before = 1 if reference == "precomputed" else 0
    if objective == "kto":
        return 2 * each + 1, 2 * before
    own = objective == "rloo" and reference != "none"
    return each + int(own), before


def notes(recipe: Recipe) -> list[str]:
    """What a reader of the figures must know."""
    objective, reference = recipe.training.objective, reference_of(recipe)
    told = {
        "adapter_off": "the reference, the model without its adapter, reads every answer once more",
        "copy": "the reference, a second model in memory, reads every answer once more",
        "precomputed": "the reference reads every answer once, before training",
    }
    found = [told[reference]] if reference in told else []
    if objective in ONLINE:
        new = recipe.sampling.max_new_tokens
        found.append(f"every drawn answer is counted with {new:,} tokens, the longest: an upper bound")
    return found
