"""One plan: everything that a recipe will take, from the recipe, the base's sizes and the rows or their cards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llama_ft.plan.answers import work_of
from llama_ft.plan.communication import Exchange, exchange
from llama_ft.plan.data import DataFacts
from llama_ft.plan.disk import Disk, disk
from llama_ft.plan.engine import Engine
from llama_ft.plan.fit import Fit, fit
from llama_ft.plan.flops import per_token
from llama_ft.plan.hardware import Hardware
from llama_ft.plan.host import Host, host
from llama_ft.plan.memory import Case, Memory, memory
from llama_ft.plan.online import Drawing, beside, missing_notes, scorers
from llama_ft.plan.probe import Rates, rates_here
from llama_ft.plan.shape import Known, vocabulary_of
from llama_ft.plan.speed import Speed, card_speed, cpu_speed
from llama_ft.plan.steps import Cut, Steps, plan_steps
from llama_ft.plan.time import Seconds, seconds
from llama_ft.plan.weights import Weights
from llama_ft.recipe.objectives import ONLINE
from llama_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Plan:
    """A recipe's plan. None stands for what cannot be known: steps without rows, time without a rate."""

    recipe: Recipe
    known: Known
    facts: DataFacts
    """Of the rows."""
    work: DataFacts
    """Of what is computed: pairs with their prompt once or twice, drawn answers."""
    hardware: Hardware
    case: Case
    fit: Fit
    steps: Steps
    disk: Disk
    dtype: str
    """The type that products are made in."""
    speed: Speed | None
    seconds: Seconds | None
    host: Host | None
    """On a CPU: what the process is resident with."""

    @property
    def cut(self) -> Cut:
        """How a global batch is cut into passes and devices."""
        return self.fit.chosen

    @property
    def peak(self) -> int:
        """Bytes of one device at the run's peak; on a CPU of the process."""
        return self.host.peak if self.host is not None else self.fit.needed.total

    @property
    def memory(self) -> Memory:
        """By part, at the peak of training; on a CPU `overhead` has the libraries and the copies of stacked weights."""
        needed = self.fit.needed
        if self.host is None:
            return needed
        return replace(needed, overhead=needed.overhead + self.host.training - needed.total)

    @property
    def exchange(self) -> Exchange:
        """Bytes that each device exchanges in a step."""
        return exchange(self.case, self.cut.accumulation)

    @property
    def flops_per_token(self) -> float:
        """FLOP per token that is no padding, at this recipe's labelled share and mean context."""
        facts = self.work
        tokens = max(facts.mean_tokens, 1.0)
        share, context = facts.mean_labelled / tokens, facts.mean_squares / tokens
        return per_token(self.case.weights, self.recipe.training, labelled=share, mean_context=context)

    def for_lock(self) -> dict[str, Any]:
        """What a run notes of its plan, to be held against what it measures."""
        seen = self.steps.seen
        return {
            "peak_bytes": self.peak,
            "seconds": round(self.seconds.total, 1) if self.seconds is not None else None,
            "steps": self.steps.total,
            "tokens": round(seen.tokens) if seen is not None else None,
            "exact": self.work.exact,
        }


def weights_of(recipe: Recipe, known: Known, facts: DataFacts) -> Weights:
    """The weights a recipe trains, with as many rows in the embedding as its tokenizer needs."""
    named = recipe.model.tokenizer
    tokens = facts.vocabulary or (vocabulary_of(named, recipe.model.revision) if named is not None else None)
    own = known.shape.vocabulary
    new = recipe.model.starts_new and named is not None
    rows = (tokens or own) if new else max(own, tokens or 0)
    shape, reward = replace(known.shape, vocabulary=rows), recipe.training.objective == "reward"
    return Weights(shape, recipe.adapter, grown=rows > own and not new, reward=reward)


def make_plan(
    recipe: Recipe,
    known: Known,
    facts: DataFacts,
    hardware: Hardware,
    engine: Engine,
    *,
    rates: Rates | None = None,
    dtype: str | None = None,
) -> Plan:
    """Plans one recipe on `hardware` under `engine`.

    rates: a CPU's, measured here if None is given; dtype: the type a CPU multiplies in, as a run that has already
    chosen it knows; None takes what is faster.
    """
    weights = weights_of(recipe, known, facts)
    if hardware.on_gpu:
        multiplied: str = recipe.model.dtype
    else:
        rates = rates or rates_here(weights.shape, recipe.model.dtype).shared(hardware.devices)
        multiplied = dtype or ("float32" if weights.whole else rates.chosen(recipe.model.dtype))
    case = Case.of(weights, recipe.training, multiplied, engine, on_gpu=hardware.on_gpu)
    judges = scorers(recipe, weights)
    case = replace(case, beside=beside(recipe, case, facts, judges))
    work = work_of(recipe, facts)
    work = replace(work, notes=(*work.notes, *missing_notes(judges)))

    def on_host(parts: Memory, cut: Cut) -> Host:
        return host(recipe, case, parts, stored=known.stored, accumulation=cut.accumulation)

    def resident(parts: Memory, cut: Cut) -> int:
        return parts.total if hardware.on_gpu else on_host(parts, cut).peak

    fitted = fit(recipe, work, case, engine.devices, hardware.usable, resident)
    steps = plan_steps(recipe, work, fitted.chosen)
    stored = disk(recipe, case, steps.total)
    speed: Speed | None = None
    if hardware.card is not None:
        speed = card_speed(hardware.card, case)
    elif rates is not None:
        speed = cpu_speed(case, rates, multiplied)
    taken = None
    if speed is not None and steps.total is not None and steps.seen is not None:
        passes = steps.total * fitted.chosen.accumulation
        drawing = Drawing(recipe, case, speed, facts, judges) if recipe.training.objective in ONLINE else None
        taken = seconds(recipe, work, case, steps, speed, stored, passes, drawing)
    process = None if hardware.on_gpu else on_host(fitted.needed, fitted.chosen)
    return Plan(recipe, known, facts, work, hardware, case, fitted, steps, stored, multiplied, speed, taken, process)


ALTERNATIVES = ("DDP", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3")


def alternatives(plan: Plan) -> list[tuple[str, bool | str, int]]:
    """(engine, gradient_checkpointing, bytes per device) for the other ways to lay out the same run on a GPU."""
    if not plan.hardware.on_gpu:
        return []
    found = []
    tokens, labelled = plan.steps.longest
    devices = plan.case.engine.devices
    engines = [Engine(name, devices) for name in (ALTERNATIVES if devices > 1 else ("",))]
    if devices > 1:
        engines.append(Engine("ZeRO-3", devices, offload=True))
    for engine in engines:
        for again in (False, "selective", True):
            training = plan.recipe.training.model_copy(update={"gradient_checkpointing": again})
            case = replace(plan.case, engine=engine, training=training)
            name = (engine.name or "one device") + (" offload" if engine.offload else "")
            found.append((name, again, memory(case, tokens, labelled).total))
    return found
