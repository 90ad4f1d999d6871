"""How fast this machine's CPU is, measured in a process of its own: a plan itself never imports torch.

`python -m llama_ft.plan.probe '{"products": [[out, in, count], …], "tokens": 512, "types": ["float32"]}'` prints one
line of JSON.

G, the rate of matrix products, is ΣFLOP / Σtime over the model's own matrix shapes, the head among them, in all three
orientations (x·Wᵀ forward, g·W and gᵀ·x backward). The mean counts, not the fastest: what slows the probe will slow the
training as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from llama_ft.errors import MachineFault
from llama_ft.llama.shapes import Shape

TOKENS = 512
"""Rows of the measured products: a pass of a CPU's usual size."""
HEAD_ROWS = 8192
"""Rows of the head that are measured: so wide a product runs at the rate of the whole head."""
REPEATS = 2
WORK = 30e9
"""FLOP of one round over all products, each once: a model of billions is measured with fewer rows."""
CLEARLY_FASTER = 1.15
"""llama_ft.llama.load.choose_compute_dtype: bfloat16 is taken only where it is this much faster than float32."""
COPIED = 64 * 2**20
"""Bytes that are copied to measure the memory's rate."""


@dataclass(frozen=True)
class Rates:
    """`flops`: FLOP/s by type; `bandwidth`: bytes read and written per second by a copy; `imported`: seconds that
    `import torch` took; `threads` that torch used."""

    flops: dict[str, float]
    bandwidth: float
    imported: float
    threads: int

    def shared(self, processes: int) -> Rates:
        """What each of so many processes has of it, measured by one that had all."""
        flops = {name: rate / processes for name, rate in self.flops.items()}
        threads = max(1, self.threads // processes)
        return Rates(flops, self.bandwidth / processes, self.imported, threads)

    def chosen(self, dtype: str) -> str:
        """The type that a CPU holds and multiplies weights of `dtype` in, as training chooses it."""
        if dtype != "bfloat16":
            return "float32"
        return "bfloat16" if self.flops["bfloat16"] > CLEARLY_FASTER * self.flops["float32"] else "float32"


def spec(shape: Shape, dtype: str) -> dict[str, Any]:
    """What is to be measured for a model whose weights are rounded to `dtype`: its products, how often each occurs, and
    the types that training chooses from."""
    products = [[float(out), float(into), float(shape.layers)] for out, into in shape.projections.values()]
    rows = min(HEAD_ROWS, shape.vocabulary)
    products.append([rows, shape.hidden, shape.vocabulary / rows])
    work = 6.0 * sum(out * into for out, into, _ in products)
    types = ["float32", "bfloat16"] if dtype == "bfloat16" else ["float32"]
    return {"products": products, "tokens": max(32, min(TOKENS, int(WORK / work))), "types": types}


def rates_here(shape: Shape, dtype: str) -> Rates:
    """Measures in another process. MachineFault when that process fails."""
    command = [sys.executable, "-m", "llama_ft.plan.probe", json.dumps(spec(shape, dtype))]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise MachineFault(f"this machine's speed could not be measured: {reason}", hint="is torch installed?")
    return Rates(**json.loads(done.stdout.splitlines()[-1]))


def measure(asked: dict[str, Any]) -> Rates:
    """Measures in this process."""
    start = time.perf_counter()
    import torch

    imported = time.perf_counter() - start
    tokens = int(asked["tokens"])
    found: dict[str, float] = {}
    for name in asked["types"]:
        dtype = getattr(torch, name)
        work = spent = 0.0
        for out, into, count in asked["products"]:
            x, grad = torch.randn(tokens, int(into)).to(dtype), torch.randn(tokens, int(out)).to(dtype)
            weight = torch.randn(int(out), int(into)).to(dtype)
            for left, right in ((x, weight.t()), (grad, weight), (grad.t(), x)):
                spent += count * _seconds(lambda left=left, right=right: torch.mm(left, right))
                work += count * 2.0 * tokens * out * into
        found[name] = work / spent
    block = torch.ones(COPIED // 4)
    other = torch.empty_like(block)
    bandwidth = 2 * COPIED / _seconds(lambda: other.copy_(block))
    return Rates(found, bandwidth, imported, torch.get_num_threads())


def _seconds(work: Any) -> float:
    """The mean of some runs after one that warms up."""
    work()
    start = time.perf_counter()
    for _ in range(REPEATS):
        work()
    return (time.perf_counter() - start) / REPEATS


if __name__ == "__main__":
    print(json.dumps(asdict(measure(json.loads(sys.argv[1])))))
