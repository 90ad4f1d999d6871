"""What a compute plan is asked: numbers from the command line, held together and against each other."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.plan.compute import TRAINING, Point
from llama_ft.plan.compute_runs import UTILISATION
from llama_ft.plan.hardware import CARDS, Hardware, parse_hardware

HARDWARE = "2048xA100-80GB"
"""LLaMA's own (arXiv 2302.13971 §2.4)."""
AGREEMENT = 0.05
"""How far C may be from 6·N·D where all three are given: 7e9 for LLaMA's 6.74e9 is 4 %."""
PICTURES = (".png", ".svg", ".pdf")

_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:e[+-]?\d+)?)\s*([kmbt]?)", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Range:
    """What a number may be. `why` stands behind the limits where they are passed."""

    least: float
    most: float
    unit: str
    why: str


RANGES = {
    "--compute": Range(1e15, 1e30, "FLOP of training", "Llama 3 405B took 3.8e25, arXiv 2407.21783"),
    "--tokens": Range(1e6, 1e18, "tokens of training", "Llama 3 405B saw 1.56e13, arXiv 2407.21783"),
    "--params": Range(1e6, 1e15, "parameters", "Llama 3 405B has 4.05e11, arXiv 2407.21783"),
    "--served": Range(
        0.0, 1e20, "tokens to be served", "a billion people reading a thousand a day for ten years: 4e15"
    ),
}


@dataclass(frozen=True)
class Ask:
    """A question. compute: FLOP; tokens: of training; params: N; served: tokens over the model's life. Of the first
    three one or two are set, never all: the third follows. utilisation: of the card's dense bfloat16 rate."""

    compute: float | None
    tokens: float | None
    params: float | None
    served: float | None
    hardware: Hardware
    utilisation: float
    price: float | None = None
    """Of one device and hour."""

    @property
    def pair(self) -> Point | None:
        """The model that was asked about, where two numbers fix it."""
        if self.params is not None and self.tokens is not None:
            return Point(self.params, self.tokens)
        if self.compute is not None and self.params is not None:
            return Point(self.params, self.compute / TRAINING / self.params)
        if self.compute is not None and self.tokens is not None:
            return Point(self.compute / TRAINING / self.tokens, self.tokens)
        return None


def number(text: str, option: str) -> float:
    """`1e21`, `7B`, `1.4T`, `1_000_000`. UserError for anything else, and for what is out of `RANGES`."""
    found = _NUMBER.fullmatch(text.strip())
    limits = RANGES[option]
    if found is None:
        hint = "write 1e21, 1.4T, 7B or 350M" + ("; a point, no comma, before the fraction" if "," in text else "")
        raise UserError(f"'{text[:40]}' is not a number of {limits.unit}", key=option, hint=hint)
    value = float(found[1]) * _UNITS[found[2].lower()]
    if value < 0:
        raise UserError(f"{text.strip()} is negative", key=option, hint=f"how many {limits.unit}?")
    if not limits.least <= value <= limits.most or not math.isfinite(value):
        hint = f"from {limits.least:g} to {limits.most:g}; {limits.why}"
        raise UserError(f"{value:g} {limits.unit} is beyond reason", key=option, hint=hint)
    return value


def share(text: str) -> float:
    """`0.47` or `47%`, above 0 and at most 1."""
    plain = text.strip().removesuffix("%")
    hint = f"a share of the card's dense bfloat16 rate, as in {UTILISATION:g}"
    try:
        value = float(plain) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        raise UserError(f"'{text[:40]}' is not a share", key="--utilisation", hint=hint) from None
    if 1 < value <= 100:
        hint = f"did you mean {value / 100:g}?"
    if not 0 < value <= 1:
        raise UserError(f"{text.strip()[:40]} is not above 0 and at most 1", key="--utilisation", hint=hint)
    return value


def rated(text: str) -> Hardware:
    """Hardware whose rate is known: a card by name, and not bare memory or a CPU."""
    found = parse_hardware(text)
    if found.card is None:
        hint = f"name a card: {', '.join(CARDS)}"
        raise UserError(f"no rate is known for '{text.strip()[:60]}'", key="--hardware", hint=hint)
    return found


def picture(path: Path) -> Path:
    """Where a chart may be written: its ending says how."""
    if path.suffix.lower() not in PICTURES:
        hint = did_you_mean(path.suffix.lower(), PICTURES, kind="endings")
        raise UserError(f"cannot draw '{path.suffix}' files", where=str(path), key="--chart", hint=hint)
    if path.is_dir():
        raise UserError("a folder stands there", where=str(path), key="--chart", hint="name a file in it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise UserError(f"{parent} is a file, not a folder", where=str(path), key="--chart")
    return path


def ask(
    *,
    compute: str | None = None,
    tokens: str | None = None,
    params: str | None = None,
    served: str | None = None,
    hardware: str | None = None,
    utilisation: str | None = None,
    price: float | None = None,
    chart: Path | None = None,
) -> Ask:
    """The question that options put, as they were written. UserError with every mistake in them."""
    problems: list[Problem] = []
    read: dict[str, float | None] = {}
    for option, text in {"--compute": compute, "--tokens": tokens, "--params": params, "--served": served}.items():
        read[option] = None
        if text is not None:
            try:
                read[option] = number(text, option)
            except UserError as error:
                problems += error.problems
    found_share, found_hardware = UTILISATION, None
    try:
        found_share = share(utilisation) if utilisation is not None else UTILISATION
    except UserError as error:
        problems += error.problems
    try:
        found_hardware = rated(hardware if hardware is not None else HARDWARE)
    except UserError as error:
        problems += error.problems
    try:
        _ = picture(chart) if chart is not None else None
    except UserError as error:
        problems += error.problems
    if price is not None and not 0 <= price < math.inf:
        problems.append(Problem("a price is not negative", key="--price"))
    c, d, n = (read[option] for option in ("--compute", "--tokens", "--params"))
    if c is not None and d is not None and n is not None and abs(math.log(c / Point(n, d).compute)) > AGREEMENT:
        what = f"{c:g} FLOP is not 6 × {n:g} parameters × {d:g} tokens, which is {Point(n, d).compute:.4g}"
        problems.append(Problem(what, key="--compute", hint="leave one of the three out: it follows"))
    if problems:
        raise UserError(problems)
    assert found_hardware is not None
    if d is not None and n is not None:
        c = None
    return Ask(c, d, n, read["--served"], found_hardware, found_share, price)
