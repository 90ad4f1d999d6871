"""Seconds of a run, part by part: from FLOP and the machine's rate, and from bytes and its memory's."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llama_ft.plan.data import DataFacts
from llama_ft.plan.disk import Disk
from llama_ft.plan.flops import Tokens, forward, training
from llama_ft.plan.hardware import Card
from llama_ft.plan.memory import Case, optimizer
from llama_ft.plan.probe import Rates
from llama_ft.plan.steps import Steps
from llama_ft.plan.weights import BYTES, FLOAT
from llama_ft.recipe.schema import Recipe

OF_G = {"fused": 0.68, "plain": 0.50, "full": 0.55, "forward": 0.70, "few rows": 0.16}
"""CPU: share of G that a step reaches: the fused LoRA product, PEFT's own forward (DoRA, dropout, quantised), full
tuning; an evaluation; and the few rows of a decoding step. From runs of SmolLM2-135M (docs/plan.md)."""
OF_CARD = ((900e12, 0.36), (0.0, 0.50))
"""GPU: share of the dense bfloat16 rate, by the card's rate. Fast cards: torchtitan's 6,667 tokens/s per H100 in full
tuning of 8B; others: torchtune's 3,083 tokens/s for LoRA of 8B on a 4090 (56 %) and 2,413 for QLoRA (44 %)."""
START = 12.5
"""Start of launcher and trainer, the plan they make, and their end, in multiples of `import torch` on that machine."""
GPU_START = 60.0
"""Seconds until the first step on a GPU: imports, CUDA, weights read; not yet measured by us."""
DISK = 400e6
"""Bytes/s that a checkpoint is written, synced and read again with."""
SAMPLE_TOKENS = 96
"""llama_ft.train.samples: the longest answer before and after training, to five questions at once."""
QUESTIONS = 5
"""llama_ft.train.samples: asked at once."""
PROOF_POSITIONS, PROOF_TOKENS = 700, 3 * 48 // 2
"""llama_ft.export.proof: positions compared and tokens answered, by two models each. A tuned model ends most answers
before their limit: of three, about half."""
DECODE_LAYER = 1.5e-3
"""Seconds that a layer takes to decode one token beside reading its weights: calls of small kernels."""
DURING = 64
"""llama_ft.train.samples: tokens of an answer at an evaluation."""


@dataclass(frozen=True)
class Seconds:
    """Parts of a run. `training` is the steps alone; `samples` the answers before and after."""

    start: float
    training: float
    evaluation: float
    samples: float
    checkpoints: float
    export: float

    @property
    def total(self) -> float:
        """From the command to its end."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Speed:
    """What one device does: FLOP/s in training, in evaluation, in decoding several answers; bytes/s of its memory;
    seconds of the start."""

    training: float
    forward: float
    few_rows: float
    bandwidth: float
    start: float
    source: str


def cpu_speed(case: Case, rates: Rates, dtype: str) -> Speed:
    """Of a CPU whose products were measured, in the type that training multiplies in."""
    kind = "full" if case.weights.full else "fused" if case.fused else "plain"
    g = rates.flops[dtype]
    where = f"{dtype} on {rates.threads} threads"
    source = f"measured here just now: {g / 1e9:.0f} GFLOP/s in {where}, of which {OF_G[kind]:.0%}"
    training, forward, few_rows = (g * OF_G[name] for name in (kind, "forward", "few rows"))
    return Speed(training, forward, few_rows, rates.bandwidth, START * rates.imported, source)


def card_speed(card: Card, case: Case) -> Speed:
    """Of a GPU by its vendor's rate and the share of it that others have published."""
    share = next(share for least, share in OF_CARD if card.flops >= least)
    if case.weights.quantised:
        share *= 0.44 / 0.56
    source = f"{card.flops / 1e12:.0f} TFLOP/s dense bfloat16 ({card.source}), of which {share:.0%}; not run by us"
    rate = card.flops * share
    return Speed(rate, rate, rate, card.bandwidth, GPU_START, source)


def seconds(
    recipe: Recipe, facts: DataFacts, case: Case, steps: Steps, speed: Speed, stored: Disk, passes: float
) -> Seconds:
    """Seconds of the whole run. `passes`: forward and backward passes of one device over all steps."""
    assert steps.total is not None and steps.seen is not None
    weights, world = case.weights, case.engine.devices
    work = training(weights, steps.seen, recipe.training) / world
    if recipe.training.objective in ("dpo", "kto"):  # the reference model reads every pair as well
        work += forward(weights, steps.seen) / world
    moved = steps.total * _step_bytes(case) + passes * _pass_bytes(case)
    evaluations, answers = 0.0, 0.0
    if facts.evaluated is not None:
        rounds = 1 + steps.total // recipe.training.eval_every + (steps.total % recipe.training.eval_every > 0)
        held_out = Tokens(*facts.evaluated)
        evaluations = rounds * forward(weights, held_out) / world / speed.forward
        between = max(0, rounds - 2)  # an evaluation on the way is followed by shorter answers
        answers = (2 * SAMPLE_TOKENS + between * DURING) * _decode(case, speed, QUESTIONS)
        asked = QUESTIONS * held_out.mean_context  # padded to the longest, which Σℓ²/Σℓ leans to
        questions = Tokens(asked, QUESTIONS, asked * held_out.mean_context)
        answers += (2 + between) * forward(weights, questions) / speed.forward
    writes = stored.checkpoint * max(1, -(-steps.total // recipe.training.save_every)) / DISK
    return Seconds(
        start=speed.start,
        training=work / speed.training + moved / speed.bandwidth,
        evaluation=evaluations,
        samples=answers,
        checkpoints=writes,
        export=_export(recipe, case, speed, stored) if recipe.export.merged else 0.0,
    )


def _step_bytes(case: Case) -> int:
    """What the optimizer moves once a step: weight, gradient and states read, weight and states written; the clip."""
    trained = case.weights.trained
    return 2 * optimizer(case) + 4 * FLOAT * trained // case.engine.optimizer_shards


def _pass_bytes(case: Case) -> float:
    """What a pass moves besides its products: quantised weights written out twice, and read (PERFORMANCE.md: 2.5 bytes
    per weight and pass); trained weights' gradients added up."""
    linear = case.weights.shape.linear_weights
    return 2 * 2.5 * linear if case.weights.quantised else 3.0 * FLOAT * case.weights.trained_whole


def _decode(case: Case, speed: Speed, rows: int) -> float:
    """Seconds of a token of `rows` answers at once: every weight is read, every layer called, more rows multiplied."""
    weights = case.weights
    # On a CPU quantised weights are unpacked to decode (llama_ft.adapters.quantised.unpacked).
    read = FLOAT * weights.total if weights.quantised and not case.on_gpu else weights.held(case.held)
    calls = DECODE_LAYER * weights.shape.layers
    return read / speed.bandwidth + calls + 2 * weights.total * (rows - 1) / speed.few_rows


def _export(recipe: Recipe, case: Case, speed: Speed, stored: Disk) -> float:
    """Merge, read back, and the proof: two models in float32 see the same positions and answer the same prompts."""
    weights = case.weights
    seen = Tokens(PROOF_POSITIONS, PROOF_POSITIONS, PROOF_POSITIONS * 128.0)
    work = 2 * forward(weights, seen) / speed.forward
    answers = 2 * PROOF_TOKENS * (FLOAT * weights.total / speed.bandwidth + DECODE_LAYER * weights.shape.layers)
    files = (2 * stored.merged + 2 * BYTES[recipe.model.dtype] * weights.total) / DISK
    return work + answers + files
