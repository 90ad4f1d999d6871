"""A compute plan as text; and the tables of docs/plan.md, which `python -m llama_ft.plan.compute_table` prints."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence

from llama_ft.plan.compute import FITS, Point
from llama_ft.plan.compute_ask import Ask, ask
from llama_ft.plan.compute_plan import MONTH, Answer, Preset, Row, answer
from llama_ft.plan.compute_runs import LLAMA, LLAMA_2, PUBLISHED, SOURCES, UTILISATION
from llama_ft.plan.compute_shape import CONTEXT, exact_flops
from llama_ft.plan.words import count, duration

EXAMPLES = (
    "--compute 5.76e23",
    "--compute 1e21 --served 2T --hardware 8xH100-80GB --utilisation 0.4",
    "--params 7B --tokens 1T --served 2T",
)
"""Commands of docs/plan.md."""


def answer_lines(found: Answer) -> list[str]:
    """The whole answer as plain aligned lines."""
    asked, served = found.ask, bool(found.ask.served)
    price = ("price",) if asked.price is not None else ()
    head = [*_POINT, *(fit.name for fit in FITS), "GPU-hours", "time", "GPUs", *price]
    lines = [*_question(asked), "", "models, with the loss in nats per token that each fit predicts; GPUs for 30 days"]
    lines += table([["model", *head, *(_LIFE if served else ())], *(_model(asked, row, served) for row in found.rows)])
    lines += ["", f"a shape for each, drawn as LLaMA's are; exact FLOP by 6ND in rows of {CONTEXT:,} tokens"]
    shapes = [["model", "width", "layers", "heads", "inner", "params", "exact"]]
    for row, shape in found.shapes:
        if shape is None:
            shapes.append([row.law, "none", *["-"] * 5])
            continue
        exact = exact_flops(shape, CONTEXT) / Point(shape.parameters, 1.0).compute
        sizes = (shape.hidden, shape.layers, shape.heads, shape.intermediate)
        shapes.append([row.law, *(f"{size:,}" for size in sizes), count(shape.parameters), f"{exact:.3f}"])
    lines += [*table(shapes), "", _about_presets(asked)]
    head = ["preset", "layers", "width", *_POINT, *(fit.name for fit in FITS), "GPU-hours", "time", "exact"]
    lines += table([[*head, *_LIFE[:served]], *(_preset(asked, one, served) for one in found.presets)])
    return lines + ([""] if found.notes else []) + list(found.notes)


_POINT = ("params", "tokens", "per param", "FLOP")
_LIFE = ("with serving", "saved")


def _question(asked: Ask) -> list[str]:
    parts = [
        f"{value:.4g} {what}"
        for value, what in (
            (asked.compute, "FLOP of training"),
            (asked.params, "parameters"),
            (asked.tokens, "tokens of training"),
            (asked.served, "tokens to be served"),
        )
        if value
    ]
    assert asked.hardware.card is not None
    rate = asked.hardware.card.flops
    of = f"{100 * asked.utilisation:.3g}% of {rate / 1e12:,.0f} TFLOP/s"
    return [f"asked     {', '.join(parts)}", f"hardware  {asked.hardware.name}, {of} each, counted as 6ND"]


def _about_presets(asked: Ask) -> str:
    if asked.served:
        return "the family's shapes that are nearest, trained to the same loss by the replicated fit"
    if asked.compute is not None or asked.pair is not None:
        return "the family's shapes that are nearest, for the same FLOP"
    if asked.tokens is not None:
        return "the family's shapes that are nearest, for the same tokens"
    return "the family's shapes that are nearest, each with its own best tokens by the replicated fit"


def _cost(asked: Ask, hours: float) -> list[str]:
    seconds = hours / asked.hardware.devices * 3600
    return [f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}", _time(seconds)]


def _time(seconds: float) -> str:
    """Days beyond a thousand years say nothing."""
    years = seconds / 86400 / 365.25
    return duration(seconds) if years < 10 else f"{years:,.0f} years" if years < 1e6 else f"{years:.1e} years"


def _model(asked: Ask, row: Row, served: bool) -> list[str]:
    cells = [row.law, *_point(row.point), *_losses(row.loss), *_cost(asked, row.hours)]
    cells.append(f"{math.ceil(row.hours / MONTH):,}")
    if asked.price is not None:
        cells.append(f"{row.hours * asked.price:,.0f}")
    if served:
        cells += [f"{row.lifetime:.3g}", f"{row.saved:.1%}" if row.saved is not None else "-"]
    return cells


def _preset(asked: Ask, one: Preset, served: bool) -> list[str]:
    shape = one.named.shape
    first = [one.named.name, str(shape.layers), f"{shape.hidden:,}"]
    if one.point is None or one.hours is None or one.exact is None:
        return [*first, count(shape.parameters), "never", *["-"] * (7 + served)]
    cells = [*first, *_point(one.point), *_losses(one.loss), *_cost(asked, one.hours)]
    cells.append(f"{one.exact / one.point.compute:.3f}")
    return [*cells, f"{one.lifetime:.3g}"] if served else cells


def _point(point: Point) -> list[str]:
    per = f"{point.ratio:,.1f}" if point.ratio < 1e6 else f"{point.ratio:.1e}"
    return [count(point.parameters), count(point.tokens), per, f"{point.compute:.3g}"]


def _losses(loss: dict[str, float]) -> list[str]:
    return [f"{loss[fit.name]:.3f}" for fit in FITS]


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(one.rjust(width) for one, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def published_lines(family: str) -> list[str]:
    """Markdown: the hours that a family's paper prints, against ours."""
    head = "| model | tokens | printed GPU-hours | 6ND | exact | tokens/s per GPU | utilisation, 6ND | exact |"
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for one in PUBLISHED:
        if one.family == family:
            planned = [one.planned(exact=exact) for exact in (False, True)]
            ours = " | ".join(f"{hours:,.0f} ({hours / one.hours - 1:+.1%})" for hours in planned)
            shares = " | ".join(f"{one.utilisation(exact=exact):.1%}" for exact in (False, True))
            name = f"{one.family} {one.size}"
            lines.append(f"| {name} | {count(one.tokens)} | {one.hours:,.0f} | {ours} | {one.rate:,.0f} | {shares} |")
    return lines


def serving_lines() -> list[str]:
    """Markdown: for how much serving the published models are the right size."""
    head = " | ".join(f"loss, {fit.name} | best for serving" for fit in FITS)
    lines = [f"| model | tokens per parameter | {head} |", "|---|---|---|---|---|---|"]
    for one in PUBLISHED:
        cells = []
        for fit in FITS:
            pays = fit.pays_from(one.point)
            cells += [f"{fit.loss(one.point):.3f}", f"{count(pays)} tokens" if pays > 0 else "too large for any"]
        lines.append(f"| {one.family} {one.size} | {one.point.ratio:.0f} | {' | '.join(cells)} |")
    return lines


def documented() -> str:
    """All tables between the marks of docs/plan.md."""
    parts = []
    for example in EXAMPLES:
        words = shlex.split(example)
        keys = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
        lines = [f"$ llama-ft plan {example}", "", *answer_lines(answer(ask(**keys)))]  # type: ignore[arg-type]
        parts.append("```text\n" + "\n".join(lines) + "\n```")
    for family in (LLAMA, LLAMA_2):
        parts.append(f"{family} ({SOURCES[family]}), planned at {UTILISATION:.0%}:")
        parts.append("\n".join(published_lines(family)))
    parts += ["How much serving each is made for:", "\n".join(serving_lines())]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(documented(), end="")
