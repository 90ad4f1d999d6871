"""The answer to a compute question: models by each law, what they cost, the family's shapes beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llama_ft.llama.shapes import Shape
from llama_ft.plan.compute import (
    BESIROGLU,
    FITS,
    HOFFMANN,
    MAIN,
    RATIO,
    Fit,
    Point,
    extrapolated,
    rule_for_compute,
)
from llama_ft.plan.compute_ask import Ask
from llama_ft.plan.compute_runs import gpu_hours
from llama_ft.plan.compute_shape import CONTEXT, Named, exact_flops, nearest_presets, suggest
from llama_ft.plan.words import count

VERSION = 1
"""Of the JSON document; raised when a key changes its meaning or goes."""
MONTH = 30 * 24.0
"""Hours in which a training is to be done for the column of GPUs."""
RULE = f"{RATIO:g} per parameter"
ASKED, SERVED = "as asked", "{}, served"
"""Names of rows; the others have their law's."""


@dataclass(frozen=True)
class Row:
    """A model by a law. loss: by each fit; hours: of one GPU; served: tokens that it is made for, 0 for none."""

    law: str
    point: Point
    loss: dict[str, float]
    hours: float
    served: float = 0.0
    lifetime: float = 0.0
    saved: float | None = None
    """Share of training and serving that this model saves against the one of its law made for training alone."""


@dataclass(frozen=True)
class Preset:
    """A shape of the family in the same place. point: None where no number of tokens brings it to the loss."""

    named: Named
    point: Point | None
    loss: dict[str, float]
    hours: float | None
    exact: float | None
    """FLOP of training by llama_ft/plan/flops.py, where the rest is by 6ND."""
    lifetime: float | None


@dataclass(frozen=True)
class Answer:
    """Everything that is printed."""

    ask: Ask
    rows: tuple[Row, ...]
    shapes: tuple[tuple[Row, Shape | None], ...]
    presets: tuple[Preset, ...]
    notes: tuple[str, ...]


def answer(ask: Ask) -> Answer:
    """Works a question out."""
    base = _plain_rows(ask)
    rows = list(base)
    if ask.served:
        rows += [_served(ask, fit, row) for fit in FITS for row in base if row.law == (ASKED if ask.pair else fit.name)]
    centre = _centre(rows)
    presets = tuple(_preset(ask, named, centre) for named in nearest_presets(centre.point.parameters))
    shapes = tuple((row, suggest(row.point.parameters)) for row in rows)
    return Answer(ask, tuple(rows), shapes, presets, tuple(_notes(ask, rows)))


def _row(ask: Ask, law: str, point: Point, **more: Any) -> Row:
    loss = {fit.name: fit.loss(point) for fit in FITS}
    hours = _hours(ask, point.compute)
    return Row(law, point, loss, hours, **{"lifetime": point.lifetime(ask.served or 0.0), **more})


def _hours(ask: Ask, flops: float) -> float:
    assert ask.hardware.card is not None
    return gpu_hours(flops, ask.hardware.card.flops, ask.utilisation)


def _plain_rows(ask: Ask) -> list[Row]:
    """What is asked, and the optima of training alone: of its compute, for its tokens, or for its parameters."""
    pair = ask.pair
    rows = [_row(ask, ASKED, pair)] if pair is not None else []
    compute = pair.compute if pair is not None else ask.compute
    if compute is not None:
        points = {fit.name: fit.for_compute(compute) for fit in FITS} | {RULE: rule_for_compute(compute)}
    elif ask.params is not None:
        points = {fit.name: fit.for_parameters(ask.params) for fit in FITS}
        points[RULE] = Point(ask.params, RATIO * ask.params)
    else:
        assert ask.tokens is not None
        points = {fit.name: fit.for_tokens(ask.tokens) for fit in FITS}
        points[RULE] = Point(ask.tokens / RATIO, ask.tokens)
    return rows + [_row(ask, law, point) for law, point in points.items()]


def _served(ask: Ask, fit: Fit, row: Row) -> Row:
    """The model of a row's loss by `fit` that training and serving together cost least."""
    assert ask.served is not None
    point = fit.served(row.loss[fit.name], ask.served)
    saved = 1 - point.lifetime(ask.served) / row.point.lifetime(ask.served)
    return _row(ask, SERVED.format(fit.name), point, served=ask.served, saved=saved)


def _centre(rows: list[Row]) -> Row:
    """The row that presets are chosen around: the main fit's for serving, what was asked, or the main fit's."""
    by_law = {row.law: row for row in rows}
    return next(by_law[law] for law in (SERVED.format(MAIN.name), ASKED, MAIN.name) if law in by_law)


def _preset(ask: Ask, named: Named, centre: Row) -> Preset:
    """A preset with the tokens that the question leaves it: for the loss if it is to be served, else what is fixed."""
    size = float(named.shape.parameters)
    pair = ask.pair
    compute = pair.compute if pair is not None else ask.compute
    tokens: float | None
    if ask.served:
        tokens = MAIN.tokens_for(centre.loss[MAIN.name], size)
    elif compute is not None:
        tokens = compute / Point(size, 1.0).compute
    else:
        tokens = ask.tokens if ask.tokens is not None else MAIN.for_parameters(size).tokens
    if tokens is None:
        return Preset(named, None, {}, None, None, None)
    point = Point(size, tokens)
    loss = {fit.name: fit.loss(point) for fit in FITS}
    exact = exact_flops(named.shape, named.context) * tokens
    return Preset(named, point, loss, _hours(ask, point.compute), exact, point.lifetime(ask.served or 0.0))


def _notes(ask: Ask, rows: list[Row]) -> list[str]:
    notes = []
    pair = ask.pair
    if pair is not None:
        for fit in (HOFFMANN, BESIROGLU):
            best, pays = fit.for_loss(fit.loss(pair)), fit.pays_from(pair)
            least = f"the same loss takes {best.compute / pair.compute:.2g} of the FLOP at {count(best.parameters)}"
            use = (
                f"it is the cheapest of its loss if {count(pays)} tokens are served"
                if pays > 0
                else "a smaller one is cheaper to train and to serve"
            )
            notes.append(f"{fit.name}: {least} parameters; {use}")
    if any(extrapolated(row.point) for row in rows):
        notes.append("extrapolated: both fits saw models of 70M to 16B parameters and 5B to 500B tokens")
    return notes


def as_json(found: Answer) -> dict[str, Any]:
    """The whole answer; FLOP, tokens, hours of one GPU, nats per token; null for what cannot be."""
    ask = found.ask
    assert ask.hardware.card is not None
    return {
        "version": VERSION,
        "asked": {name: getattr(ask, name) for name in ("compute", "tokens", "params", "served")},
        "hardware": {
            "name": ask.hardware.name,
            "devices": ask.hardware.devices,
            "flops": ask.hardware.card.flops,
            "utilisation": ask.utilisation,
        },
        "fits": [asdict(fit) for fit in FITS],
        "models": [
            {
                "law": row.law,
                **_numbers(row.point),
                "loss": row.loss,
                "gpu_hours": row.hours,
                "hours": row.hours / ask.hardware.devices,
                "price": row.hours * ask.price if ask.price is not None else None,
                "served": row.served,
                "lifetime_flops": row.lifetime,
                "saved": row.saved,
                "shape": _shape(shape, CONTEXT) if shape is not None else None,
            }
            for row, shape in found.shapes
        ],
        "presets": [
            {
                "name": one.named.name,
                **(_numbers(one.point) if one.point is not None else {"tokens": None, "compute": None}),
                **_shape(one.named.shape, one.named.context),
                "loss": one.loss or None,
                "gpu_hours": one.hours,
                "exact_flops": one.exact,
                "lifetime_flops": one.lifetime,
            }
            for one in found.presets
        ],
        "notes": list(found.notes),
    }


def _numbers(point: Point) -> dict[str, float]:
    return {"parameters": point.parameters, "tokens": point.tokens, "compute": point.compute}


def _shape(shape: Shape, context: int) -> dict[str, float]:
    return {
        "parameters": shape.parameters,
        "layers": shape.layers,
        "hidden": shape.hidden,
        "heads": shape.heads,
        "kv_heads": shape.kv_heads,
        "intermediate": shape.intermediate,
        "vocabulary": shape.vocabulary,
        "context": context,
        "flops_per_token": exact_flops(shape, context),
    }
