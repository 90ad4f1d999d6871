"""What single changes of the fast paths are worth, each taken back in turn: the figures of `benchmarks/NOTES.md`.

    python -m benchmarks.changes --data ../shared/data/instruct/alpaca_5000.json --dtype bfloat16 --rounds 8

One model in one process; every round runs it as it is and once without each change (A B C … A B C …), on the same
packed micro-batches. Instead, `--lengths` times the attention's backward alone, in both types, document by document;
`--products` the matrix products of SmolLM2-135M's shapes, with how many cores they keep busy; `--profile` shows where
the time of a pass goes, by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.model import ALL, Work, contenders
from llama_ft.llama import attention, rope
from llama_ft.plan.hardware import usable_cores


@contextmanager
def changed(module: Any, name: str, value: Any) -> Iterator[None]:
    """A name of a module with another value, for as long as this lasts."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _rotate_by_copies(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of 16-bit heads out of place in float32, and copied back."""
    if heads.dtype.itemsize < 4:
        return heads.copy_(rope.rotate(heads.float(), cos, sin))
    return rope.rotate_(heads, cos, sin)


WITHOUT: dict[str, Callable[[], Any]] = {
    "short documents' attention backward in float32": lambda: changed(attention, "WIDE_UP_TO", 0),
    "RoPE turned in place": lambda: changed(attention, "rotate_", _rotate_by_copies),
}
"""Each change by name, and what takes it back."""


def steps(options: argparse.Namespace) -> None:
    """Prints tokens/s of the whole model's forward and backward pass, as it is and without each change."""
    work = Work(options.data, options.micro_batch, 2)
    model = contenders("lora", getattr(torch, options.dtype), work, with_hf=False)[ALL]
    rates: dict[str, list[float]] = {"as it is": [], **{f"without: {name}": [] for name in WITHOUT}}
    for _ in range(options.rounds + 1):
        for name, past in rates.items():
            undo = WITHOUT.get(name.removeprefix("without: "))
            if undo is None:
                past.append(work.tokens / model.run()[0])
                continue
            with undo():
                past.append(work.tokens / model.run()[0])
    own = statistics.median(rates["as it is"][1:])
    for name, past in rates.items():
        counted = past[1:]  # the first round warms up
        middle = statistics.median(counted)
        print(f"{name:60} {middle:6.0f} tokens/s ({min(counted):.0f}–{max(counted):.0f}), {own / middle:.2f}×")


def lengths(options: argparse.Namespace) -> None:
    """Prints milliseconds of the CPU kernel's backward over one document of each length, in bfloat16 and in float32."""
    heads = attention.Heads(9, 3, 64)  # SmolLM2-135M's
    for length in (32, 64, 128, 192, 256, 320, 384, 512, 1024):
        qkv = torch.randn(length, (heads.query + 2 * heads.key_value) * heads.dim).bfloat16()
        cos, sin = torch.ones(length, 1, heads.dim // 2), torch.zeros(length, 1, heads.dim // 2)
        spans, grad = attention.Spans([0, length]), torch.randn(length, heads.query * heads.dim).bfloat16()
        seconds = []
        for wide in (0, length):
            with changed(attention, "WIDE_UP_TO", wide):
                source = qkv.clone().requires_grad_()
                out = attention._RotaryAttentionCPU.apply(source * 1.0, cos, sin, spans, heads)
                found = []
                for _ in range(options.rounds + 2):
                    start = time.perf_counter()
                    torch.autograd.grad(out, source, grad, retain_graph=True)
                    found.append(time.perf_counter() - start)
                seconds.append(statistics.median(found[2:]) * 1e3)
        print(f"{length:5} tokens: bfloat16 {seconds[0]:6.2f} ms, float32 with its casts {seconds[1]:6.2f} ms")


def products(options: argparse.Namespace) -> None:
    """Prints GFLOP/s of [M, K] · [K, N] by shape, and the cores that were busy: processor time over time."""
    dtype = getattr(torch, options.dtype)
    for rows in (500, 1000, 2000):
        for k, n in ((576, 576), (960, 576), (1536, 576), (3072, 576), (576, 960), (576, 1536), (576, 3072)):
            pairs = [(torch.randn(rows, k).to(dtype), torch.randn(k, n).to(dtype)) for _ in range(4)]
            seconds, began, used = [], time.perf_counter(), time.process_time()
            for _ in range(2 + 4 * options.rounds):
                start = time.perf_counter()
                for x, weight in pairs:
                    torch.mm(x, weight)
                seconds.append(time.perf_counter() - start)
            busy = (time.process_time() - used) / (time.perf_counter() - began)
            rate = 2 * rows * k * n * len(pairs) / statistics.median(seconds[2:]) / 1e9
            print(f"[{rows:4}, {k:4}] · [{k:4}, {n:4}]: {rate:5.0f} GFLOP/s on {busy:.1f} cores")


def profile(options: argparse.Namespace) -> None:
    """Prints the operations of one pass that take most of its time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    work = Work(options.data, options.micro_batch, 2)
    model = contenders("lora", getattr(torch, options.dtype), work, with_hf=False)[ALL]
    for _ in range(2):
        model.run()
    with profiled(activities=[ProfilerActivity.CPU]) as found:
        model.run()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=60))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.changes")
    parser.add_argument("--data", default="../shared/data/instruct/alpaca_5000.json", help="Alpaca rows")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--micro-batch", type=int, default=8, help="documents")
    parser.add_argument("--rounds", type=int, default=8, help="after one that warms up")
    other = parser.add_mutually_exclusive_group()
    for own in (lengths, products, profile):
        said = (own.__doc__ or "").splitlines()[0]
        other.add_argument(f"--{own.__name__}", dest="run", action="store_const", const=own, help=said)
    options = parser.parse_args()
    torch.set_num_threads(usable_cores())
    (options.run or steps)(options)


if __name__ == "__main__":
    main()
