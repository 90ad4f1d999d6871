"""What it costs that devices wait for the one with the most tokens: a step's documents as they come, and balanced.

    python -m benchmarks.balance --data ../shared/data

Prepares real rows as training does and lays out one epoch for 2, 8 and 64 devices. Of every pass the tokens of the
fullest device over the mean of all, averaged (`fullest`), and the share of the devices' time that is spent waiting,
1 - Σ mean / Σ fullest, where they wait in every pass (FSDP2, ZeRO-3) and where they wait once a step (DDP, ZeRO-1). A
token counts as a unit of time, wherever it stands: nothing is trained. Prints the Markdown table of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np

from llama_ft.data.balance import balanced, laid_out, with_silent
from llama_ft.data.prepare import prepare_data
from llama_ft.plan.steps import Cut
from llama_ft.recipe import load_recipe

ROWS = {
    "Alpaca": ("alpaca/smollm2-135m-lora", "instruct/alpaca_5000.json"),
    "chats": ("vicuna/smollm2-135m-lora", "chat/moss_en_sharegpt.json"),
}
CUTS = (Cut(16, 4, 2), Cut(4, 16, 2), Cut(16, 1, 8), Cut(4, 4, 8), Cut(1, 16, 8), Cut(2, 1, 64), Cut(8, 1, 64))
"""Of a global batch of 128, the last of 512."""


def waiting(order: np.ndarray, lengths: np.ndarray, cut: Cut) -> tuple[float, float, float]:
    """(fullest over mean in a pass, averaged; share of time spent waiting in every pass; and once a step)."""
    passes = lengths[order].astype(np.int64).reshape(-1, cut.micro_batch).sum(1).reshape(-1, cut.world)
    fullest, mean = passes.max(1), passes.mean(1)
    starts = np.arange(0, len(passes), cut.accumulation)
    steps = np.add.reduceat(passes, starts, axis=0)
    by_step = 1 - steps.mean(1).sum() / steps.max(1).sum()
    return float((fullest / mean).mean()), float(1 - mean.sum() / fullest.sum()), float(by_step)


def row(name: str, order: np.ndarray, lengths: np.ndarray, cut: Cut) -> str:
    """One line of the table: whole steps of one epoch."""
    step = cut.micro_batch * cut.accumulation * cut.world
    order = order[: len(order) // step * step]
    laid = laid_out(order, lengths, packing=True, **asdict(cut))
    before, after = waiting(order, lengths, cut), waiting(laid, with_silent(lengths), cut)
    shape = f"{cut.micro_batch} × {cut.accumulation} × {cut.world}"
    pairs = [f"{before[0]:.2f} → {after[0]:.3f}"]
    pairs += [f"{one:.1%} → {other:.1%}" for one, other in zip(before[1:], after[1:], strict=True)]
    return f"| {name} | {shape} | {' | '.join(pairs)} |"


def seconds(documents: int, cut: Cut) -> float:
    """What it takes to lay out an epoch of so many documents of random lengths, once an epoch on every device."""
    random = np.random.default_rng(0)
    at_once = cut.micro_batch * cut.world
    lengths = random.integers(10, 512, -(-documents // at_once) * at_once)
    order = random.permutation(len(lengths))
    start = time.perf_counter()
    balanced(order, lengths, **asdict(cut))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with instruct/ and chat/ of real rows")
    options = parser.parse_args()
    print("| epoch | micro-batch × passes × devices | fullest over mean | waiting, every pass | waiting, once a step |")
    print("|---|---|---|---|---|")
    for name, (recipe, file) in ROWS.items():
        prepared = prepare_data(load_recipe(recipe, [f"data.0.path={(options.data / file).resolve()}"]))
        order = prepared.mixture.order(0)
        for cut in CUTS:
            if len(order) >= cut.micro_batch * cut.accumulation * cut.world:
                print(row(f"{name}, {len(order):,} documents", order, prepared.lengths, cut))
    for cut in (Cut(2, 1, 64), Cut(16, 1, 64)):
        print(f"\n52,002 documents for {cut}: {seconds(52_002, cut):.3f} s")


if __name__ == "__main__":
    main()
