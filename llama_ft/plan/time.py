"""Seconds of a run, part by part: from FLOP and the machine's rate, and from bytes and its memory's."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llama_ft.plan.answers import forward_passes
from llama_ft.plan.data import DataFacts
from llama_ft.plan.decode import DECODE_LAYER, decode
from llama_ft.plan.disk import Disk
from llama_ft.plan.flops import Tokens, forward, training
from llama_ft.plan.memory import Case, optimizer
from llama_ft.plan.online import ASKED, Drawing
from llama_ft.plan.speed import Speed
from llama_ft.plan.steps import Steps
from llama_ft.plan.weights import BYTES, FLOAT, Weights
from llama_ft.recipe.objectives import POLICY
from llama_ft.recipe.schema import Recipe

DISK = 400e6
"""Bytes/s that a checkpoint is written, synced and read again with."""
SAMPLE_TOKENS = 96
"""llama_ft.train.samples: the longest answer before and after training, to five questions at once."""
QUESTIONS = 5
"""llama_ft.train.samples: asked at once."""
PROOF_POSITIONS, PROOF_TOKENS = 700, 3 * 48 // 2
"""llama_ft.export.proof: positions compared and tokens answered, by two models each. A tuned model ends most answers
before their limit: of three, about half."""
SCORED_POSITIONS = 16 * 256
"""llama_ft.export.scores: the same of a reward model, which answers nothing."""
DURING = 64
"""llama_ft.train.samples: tokens of an answer at an evaluation."""


@dataclass(frozen=True)
class Seconds:
    """Parts of a run. `training` is the steps alone; `samples` the answers before and after; `reference` its reading of
    every answer before the first step; `sampling` drawing and scoring the answers that are learnt from."""

    start: float
    training: float
    evaluation: float
    samples: float
    checkpoints: float
    export: float
    reference: float = 0.0
    sampling: float = 0.0

    @property
    def total(self) -> float:
        """From the command to its end."""
        return sum(asdict(self).values())


def seconds(
    recipe: Recipe,
    facts: DataFacts,
    case: Case,
    steps: Steps,
    speed: Speed,
    stored: Disk,
    passes: float,
    drawing: Drawing | None = None,
) -> Seconds:
    """Seconds of the whole run. `passes`: forward and backward passes of one device over all steps.

    facts: of what is computed (:func:`llama_ft.plan.answers.work_of`). drawing: who draws answers, where any are.
    """
    assert steps.total is not None and steps.seen is not None
    weights, world, objective = case.weights, case.engine.devices, recipe.training.objective
    each, before = forward_passes(recipe)
    work = training(weights, steps.seen, recipe.training) / world / speed.training
    work += each * forward(weights, steps.seen) / world / speed.forward
    moved = steps.total * _step_bytes(case) + passes * _pass_bytes(case)
    evaluations, answers = 0.0, 0.0
    if facts.evaluated is not None:
        rounds = 1 + steps.total // recipe.training.eval_every + (steps.total % recipe.training.eval_every > 0)
        held_out = Tokens(*facts.evaluated)
        evaluations = rounds * (1 + each) * forward(weights, held_out) / world / speed.forward
        if drawing is not None:  # held-out prompts are answered, once each
            own = evaluations if objective not in POLICY else 0.0
            count = facts.eval_documents if objective in POLICY else min(ASKED, facts.eval_documents)
            evaluations = own + rounds * drawing.of(count / world, 1)
        between = max(0, rounds - 2)  # an evaluation on the way is followed by shorter answers
        if objective != "reward":
            answers = (2 * SAMPLE_TOKENS + between * DURING) * decode(case, speed, QUESTIONS)
            asked = QUESTIONS * held_out.mean_context  # padded to the longest, which Σℓ²/Σℓ leans to
            questions = Tokens(asked, QUESTIONS, asked * held_out.mean_context)
            answers += (2 + between) * forward(weights, questions) / speed.forward
    writes = stored.checkpoint * max(1, -(-steps.total // recipe.training.save_every)) / DISK
    return Seconds(
        start=speed.start,
        training=work + moved / speed.bandwidth,
        evaluation=evaluations,
        samples=answers,
        checkpoints=writes,
        export=_export(recipe, case, speed, stored) if recipe.export.merged else 0.0,
        reference=before * _once(weights, facts) / world / speed.forward,
        sampling=drawing.whole(steps.total) if drawing is not None else 0.0,
    )


def _once(weights: Weights, facts: DataFacts) -> float:
    """FLOP of a forward pass over every document of the rows, held-out ones included."""
    count = facts.documents or 0
    seen = Tokens(count * facts.mean_tokens, count * facts.mean_labelled, count * facts.mean_squares)
    return forward(weights, seen) + (forward(weights, Tokens(*facts.evaluated)) if facts.evaluated else 0.0)


def _step_bytes(case: Case) -> int:
    """What the optimizer moves once a step: weight, gradient and states read, weight and states written; the clip."""
    trained = case.weights.trained
    return 2 * optimizer(case) + 4 * FLOAT * trained // case.engine.optimizer_shards


def _pass_bytes(case: Case) -> float:
    """What a pass moves besides its products: quantised weights written out twice, and read (PERFORMANCE.md: 2.5 bytes
    per weight and pass); trained weights' gradients added up."""
    linear = case.weights.shape.linear_weights
    return 2 * 2.5 * linear if case.weights.quantised else 3.0 * FLOAT * case.weights.trained_whole


def _export(recipe: Recipe, case: Case, speed: Speed, stored: Disk) -> float:
    """Merge, read back, and the proof: two models in float32 see the same positions and answer the same prompts."""
    weights = case.weights
    positions = SCORED_POSITIONS if weights.reward else PROOF_POSITIONS
    seen = Tokens(positions, positions, positions * 128.0)
    work = 2 * forward(weights, seen) / speed.forward
    spoken = 0 if weights.reward else PROOF_TOKENS  # a score says nothing
    answers = 2 * spoken * (FLOAT * weights.total / speed.bandwidth + DECODE_LAYER * weights.shape.layers)
    files = (2 * stored.merged + 2 * BYTES[recipe.model.dtype] * weights.total) / DISK
    return work + answers + files
