"""The learning rate as text: a line of blocks over the run, and its rate at a few steps."""

from __future__ import annotations

from llama_ft.recipe.schedule import rate
from llama_ft.recipe.schema import Training

BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 48


def curve(training: Training, steps: int, width: int = WIDTH) -> str:
    """One block per part of the run, as high as the mean rate in it; a run of few steps has one per step."""
    columns = min(width, steps)
    blocks = []
    for column in range(columns):
        first = column * steps // columns
        last = max(first + 1, (column + 1) * steps // columns)
        some = range(first, last, max(1, (last - first) // 16))
        mean = sum(rate(training, step, steps) for step in some) / len(some)
        blocks.append(BLOCKS[round(mean * (len(BLOCKS) - 1))])
    return "".join(blocks)


def points(training: Training, steps: int) -> list[tuple[int, float]]:
    """(step, learning rate) at the start, the end of warm-up, the middle and the last step; steps count from 1."""
    peak = float(training.learning_rate)
    highest = next((k for k in range(steps) if rate(training, k, steps) >= 1.0), 0)
    chosen = sorted({0, highest, steps // 2, steps - 1})
    return [(k + 1, peak * rate(training, k, steps)) for k in chosen if 0 <= k < steps]
