"""A plan as people and programs read it: aligned plain lines, or one JSON document. Figures say how they were got."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama_ft.plan.curve import curve, points
from llama_ft.plan.plan import Plan, alternatives
from llama_ft.plan.sweep import Cell
from llama_ft.plan.words import count, duration, gib
from llama_ft.recipe.objectives import POLICY

VERSION = 1
"""Of the JSON document; raised when a key changes its meaning or goes."""


def as_json(plan: Plan, launch: Sequence[str], price: float | None) -> dict[str, Any]:
    """The whole plan; bytes and seconds as numbers, null where something cannot be known."""
    facts, steps, cut, seen = plan.facts, plan.steps, plan.fit.chosen, plan.steps.seen
    weights, training = plan.case.weights, plan.recipe.training
    return {
        "version": VERSION,
        "recipe": plan.recipe.name,
        "base": {
            "name": plan.recipe.model.base,
            "sizes_from": plan.known.source,
            "weights": weights.total,
            "trained": weights.trained,
            "linear_weights": weights.shape.linear_weights,
            "head_weights": weights.shape.vocabulary * weights.shape.hidden,
        },
        "data": {
            "exact": facts.exact,
            "source": facts.source,
            "documents": facts.documents,
            "tokens": round(facts.documents * facts.mean_tokens) if facts.documents is not None else None,
            "labelled_share": facts.mean_labelled / facts.mean_tokens if facts.mean_tokens else None,
            "mean_tokens": facts.mean_tokens,
            "eval_documents": facts.eval_documents,
            "notes": list(plan.work.notes),
        },
        "steps": {
            "total": steps.total,
            "per_epoch": steps.per_epoch,
            "tokens": round(seen.tokens) if seen is not None else None,
            "labelled_tokens": round(seen.labelled) if seen is not None else None,
            "longest_pass_tokens": steps.longest[0],
        },
        "batch": {
            "global": training.global_batch,
            "micro": cut.micro_batch,
            "accumulation": cut.accumulation,
            "devices": cut.world,
            "largest_micro": plan.fit.largest,
        },
        "learning_rate": points(training, steps.total) if steps.total else [],
        "hardware": {
            "name": plan.hardware.name,
            "devices": plan.hardware.devices,
            "memory": plan.hardware.memory,
            "usable": plan.hardware.usable,
            "engine": plan.case.engine.name or None,
            "dtype": plan.dtype,
        },
        "memory": {
            **asdict(plan.memory),
            "training_peak": plan.memory.total,
            "export_peak": plan.host.export if plan.host is not None else None,
            "peak": plan.peak,
        },
        "exchange": {**asdict(plan.exchange), "sent": plan.exchange.sent},
        "alternatives": [
            {"engine": name, "gradient_checkpointing": again, "memory": size}
            for name, again, size in alternatives(plan)
        ],
        "flops_per_token": plan.flops_per_token,
        "seconds": None if plan.seconds is None else {**asdict(plan.seconds), "total": plan.seconds.total},
        "rate": None if plan.speed is None else plan.speed.source,
        "disk": {**asdict(plan.disk), "total": plan.disk.total},
        "cost": cost(plan, price),
        "launch": shlex.join(launch),
    }


def cost(plan: Plan, price: float | None) -> float | None:
    """Price per device and hour, times devices and hours."""
    if price is None or plan.seconds is None:
        return None
    return price * plan.hardware.devices * plan.seconds.total / 3600


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def plan_lines(plan: Plan, launch: Sequence[str], price: float | None) -> list[tuple[str, str]]:
    """(heading, text) of every line; an empty heading goes on with the one above."""
    mark = "exact" if plan.facts.exact else "estimated"
    return [
        ("recipe", f"{plan.recipe.name}: {_method(plan)} on {plan.recipe.model.base}"),
        ("hardware", _hardware(plan)),
        *_data_lines(plan, mark),
        *_step_lines(plan, mark if plan.work.exact else "estimated"),
        *_memory_lines(plan),
        *_exchange_lines(plan),
        *_time_lines(plan, price),
        *_disk_lines(plan),
        ("launch", shlex.join(launch)),
    ]


def _method(plan: Plan) -> str:
    weights = plan.case.weights
    bits = f" {weights.adapter.bits} bits" if weights.quantised else ""
    return f"{weights.adapter.method}{bits}, {count(weights.trained)} of {count(weights.total)} weights trained"


def _hardware(plan: Plan) -> str:
    hardware, engine = plan.hardware, plan.case.engine
    memory = "memory not known" if hardware.memory is None else f"{gib(hardware.memory)} each"
    if not hardware.on_gpu and hardware.memory is not None:
        memory = f"{gib(hardware.memory)} free now"
    how = f", {engine.name}{' with offload' if engine.offload else ''}" if engine.name else ""
    return f"{hardware.name}, {memory}{how}, products in {plan.dtype}"


def _data_lines(plan: Plan, mark: str) -> list[tuple[str, str]]:
    facts = plan.facts
    known = facts.documents is not None
    documents = f"{facts.documents:,} documents" if known else "documents not known"
    share = facts.mean_labelled / facts.mean_tokens if facts.mean_tokens else 0.0
    epoch = f", {count((facts.documents or 0) * facts.mean_tokens)} tokens an epoch" if known else ""
    first = f"{documents}{epoch}, {facts.mean_tokens:.0f} a document, {share:.0%} labelled ({mark})"
    return [("data", first), ("", facts.source), *[("", note) for note in plan.work.notes]]


def _step_lines(plan: Plan, mark: str) -> list[tuple[str, str]]:
    steps, cut, training = plan.steps, plan.fit.chosen, plan.recipe.training
    largest = "" if plan.fit.largest is None else f"; the largest that fits is {plan.fit.largest}"
    if plan.fit.largest == 0:
        largest = "; NOTHING FITS, not even one document a pass"
    unit = {"pretrain": "tokens", **dict.fromkeys(POLICY, "answers")}.get(training.objective, "documents")
    of = f" of prompts with {plan.recipe.sampling.answers} answers" if training.objective in POLICY else ""
    parts = f"micro-batch {cut.micro_batch} × {cut.accumulation} × {cut.world}{of}{largest}"
    batch = f"{training.global_batch:,} {unit} = {parts}"
    if steps.total is None:
        return [
            ("steps", "not known: nothing says how many rows there are (training.max_steps would)"),
            ("batch", batch),
        ]
    seen = f", {steps.seen.tokens:,.0f} tokens" if steps.seen is not None else ""
    per_epoch = f", {steps.per_epoch:,} an epoch" if steps.per_epoch is not None else ""
    rates = ", ".join(f"{rate:.2g} at {step:,}" for step, rate in points(training, steps.total))
    return [
        ("steps", f"{steps.total:,}{per_epoch}{seen} ({mark})"),
        ("batch", batch),
        ("rate", f"{curve(training, steps.total)} {training.schedule}"),
        ("", rates),
    ]


def _memory_lines(plan: Plan) -> list[tuple[str, str]]:
    tokens, labelled = plan.steps.longest
    where = "of this process" if plan.host is not None else "per device"
    lines = [("memory", f"{where}, at a pass of {tokens:,} tokens ({labelled:,} labelled), estimated")]
    lines += [("", f"{name:12}{gib(size):>12}") for name, size in plan.memory.rows() if size]
    lines.append(("", f"{'peak':12}{gib(plan.memory.total):>12}"))
    if plan.host is not None and plan.host.export:
        lines.append(("", f"{'at export':12}{gib(plan.host.export):>12}"))
    usable = plan.hardware.usable
    if usable is not None and plan.peak > usable:
        lines.append(("", f"does not fit: {gib(usable)} may be used"))
        others = [f"{n}, checkpointing {a}: {gib(size)}" for n, a, size in alternatives(plan) if size <= usable]
        lines += [("", f"fits: {other}") for other in others[:4]]
    return lines


def _exchange_lines(plan: Plan) -> list[tuple[str, str]]:
    exchange = plan.exchange
    parts = [
        f"{name} {gib(size)}"
        for name, size in (("gradients", exchange.reduced), ("weights", exchange.gathered))
        if size
    ]
    lines = []
    if exchange.sent:
        lines.append(f"{gib(exchange.sent)} sent per device and step (calculation): {', '.join(parts)}")
    if exchange.host:
        lines.append(f"{gib(exchange.host)} between main memory and device, per device and step (calculation)")
    return [("" if number else "exchange", line) for number, line in enumerate(lines)]


def _time_lines(plan: Plan, price: float | None) -> list[tuple[str, str]]:
    if plan.seconds is None:
        why = "steps are not known" if plan.steps.total is None else "no rate is known: name a card with --hardware"
        return [("time", f"not known: {why}")]
    parts = ", ".join(f"{name} {duration(part)}" for name, part in asdict(plan.seconds).items() if part >= 0.5)
    assert plan.speed is not None
    lines = [("time", f"{duration(plan.seconds.total)} (estimated): {parts}"), ("", plan.speed.source)]
    lines.append(("", f"{count(plan.flops_per_token)} FLOP a token"))
    paid = cost(plan, price)
    return lines if paid is None else [*lines, ("price", f"{paid:,.2f} at {price:g} a device and hour")]


def _disk_lines(plan: Plan) -> list[tuple[str, str]]:
    stored = plan.disk
    each = f"{stored.checkpoints} checkpoints of {gib(stored.checkpoint)}"
    rest = [(name, getattr(stored, name)) for name in ("base", "adapter", "merged", "gguf")]
    parts = ", ".join([each, *(f"{name} {gib(size)}" for name, size in rest if size)])
    return [("disk", f"{gib(stored.total)}: {parts}")]


def print_lines(lines: Sequence[tuple[str, str]]) -> None:
    """Plain lines; on a terminal headings are bold and what does not fit stands out."""
    if not sys.stdout.isatty():
        for head, text in lines:
            print(f"{head:10}{text}")
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for head, text in lines:
        line = Text(f"{head:10}", style="bold")
        line.append(text, style="bold red" if "NOTHING FITS" in text or "does not fit" in text else "not bold")
        console.print(line)


def sweep_lines(cells: Sequence[Cell]) -> list[str]:
    """A table of methods and cards."""
    head = ("card", "method", "fits", "micro-batch", "checkpointing", "memory", "tokens/s", "time")
    rows = [head]
    for cell in sorted(cells, key=lambda one: list(dict.fromkeys(c.card for c in cells)).index(one.card)):
        fits = cell.micro_batch > 0
        rate = f"{cell.tokens_per_second:,.0f}" if cell.tokens_per_second is not None else "-"
        time = duration(cell.seconds) if cell.seconds is not None else "-"
        again = ("on" if cell.checkpointing else "off") if fits else "-"
        micro = str(cell.micro_batch) if fits else "-"
        rows.append((cell.card, cell.method, "yes" if fits else "no", micro, again, gib(cell.needed), rate, time))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
