"""`llama-ft models`: the shapes that `preset:NAME` takes, as a table or as JSON. No torch."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence

from llama_ft.llama.shapes import KINDS, PRESETS, Shape

_SIZES = ("preset", "hidden", "layers", "heads", "mlp", "vocab", "context", "rope")
_MEMORY = ("weights", *(f"{kind} GiB" for kind in KINDS))
_NOTE = """heads: query/key-value. rope: theta and scaling. GiB: the weights alone;
int8 and nf4 (double quantisation) hold the linear layers so, the rest bfloat16."""


def print_models(*, as_json: bool = False) -> None:
    """Prints every preset. A table is one block where the lines fit, else sizes first and memory below."""
    if as_json:
        print(json.dumps([{"name": name, **shape.as_dict()} for name, shape in PRESETS.items()], indent=2))
        return
    rows = [(*_sizes(name, shape), *_gib(shape)) for name, shape in PRESETS.items()]
    head = (*_SIZES, *_MEMORY)
    whole = _lines(head, rows)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if width is None or max(map(len, whole)) <= width:
        print("\n".join(whole))
    else:
        cut = len(_SIZES)
        print("\n".join(_lines(head[:cut], [row[:cut] for row in rows])))
        print()
        print("\n".join(_lines((head[0], *head[cut:]), [(row[0], *row[cut:]) for row in rows])))
    if width is not None:
        print(f"\n{_NOTE}")


def _sizes(name: str, shape: Shape) -> tuple[str, ...]:
    numbers = (shape.hidden, shape.layers, f"{shape.heads}/{shape.kv_heads}", shape.intermediate, shape.vocabulary)
    theta = f"{shape.theta / 1000:g}k"
    scaling = shape.rope_scaling
    rope = f"{theta} {scaling['rope_type']}x{scaling['factor']:g}" if scaling else theta
    return (name, *map(str, numbers), str(shape.context), rope)


def _gib(shape: Shape) -> tuple[str, ...]:
    return (_short(shape.parameters), *(f"{shape.memory(kind) / 2**30:.2f}" for kind in KINDS))


def _short(count: int) -> str:
    """6738415616 as 6.74B."""
    for unit, size in (("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.2f}{unit}" if count < 100 * size else f"{count / size:.1f}{unit}"
    return f"{count / 1000:.0f}K"


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart, the first to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, *rows]:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    return lines
