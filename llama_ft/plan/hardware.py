"""What a plan is made for: a machine named on the command line, or the one that plans. No torch.

Rates are the vendor's, for bfloat16 products with float32 accumulation and *dense* matrices: data sheets often print
the figure with 2:4 sparsity, which is twice as high and which no training here reaches. Memory is what the driver
shows.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass

import psutil

from llama_ft.errors import UserError, did_you_mean

MIB, GIB = 2**20, 2**30
MARGIN = 0.05
"""Share of a GPU's memory that a plan leaves free: blocks that do not fit into the allocator's holes."""


@dataclass(frozen=True)
class Card:
    """One GPU. `memory`: bytes; `flops`: dense bfloat16 FLOP/s; `bandwidth`: bytes/s; `source`: where both stand."""

    name: str
    memory: int
    flops: float
    bandwidth: float
    source: str


def _card(name: str, mib: int, tera: float, giga: float, source: str) -> Card:
    return Card(name, mib * MIB, tera * 1e12, giga * 1e9, source)


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _card("RTX-3090", 24_576, 71.0, 936, "NVIDIA GA102 whitepaper, FP16/BF16 with FP32 accumulate"),
        _card("RTX-4090", 24_564, 165.2, 1008, "NVIDIA Ada whitepaper, FP16/BF16 with FP32 accumulate"),
        _card("RTX-5090", 32_607, 209.5, 1792, "NVIDIA RTX Blackwell whitepaper, FP16/BF16 with FP32 accumulate"),
        _card("A10G-24GB", 23_028, 70.0, 600, "NVIDIA A10G data sheet (140 with sparsity)"),
        _card("L4-24GB", 23_034, 121.0, 300, "NVIDIA L4 data sheet (242 with sparsity)"),
        _card("L40S-48GB", 46_068, 362.05, 864, "NVIDIA L40S data sheet (733 with sparsity)"),
        _card("A100-40GB", 40_960, 312.0, 1555, "NVIDIA A100 data sheet (624 with sparsity)"),
        _card("A100-80GB", 81_920, 312.0, 2039, "NVIDIA A100 data sheet, SXM (624 with sparsity)"),
        _card("H100-80GB", 81_559, 989.4, 3350, "NVIDIA H100 data sheet, SXM (1,979 with sparsity)"),
        _card("H200-141GB", 143_771, 989.4, 4800, "NVIDIA H200 data sheet, SXM (1,979 with sparsity)"),
        _card("B200-180GB", 183_359, 2250.0, 7700, "NVIDIA HGX B200 data sheet (4,500 with sparsity)"),
    )
}
"""The cards that `--hardware` knows, and the rows of `--sweep`."""


@dataclass(frozen=True)
class Hardware:
    """`devices` of one kind. `memory`: bytes of each, None where unknown; `card`: None for a CPU or bare memory."""

    name: str
    devices: int
    memory: int | None
    card: Card | None = None
    on_gpu: bool = True

    @property
    def usable(self) -> int | None:
        """Bytes of a device that a plan may fill. On a CPU what the other processes hold now is left to them."""
        if self.memory is None or not self.on_gpu:
            return self.memory
        return int(self.memory * (1 - MARGIN))


_COUNT = re.compile(r"(?:(\d{1,6})\s*[x*×]\s*)?(.+)", re.DOTALL)
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(gib|gb|g)", re.IGNORECASE)


def parse_hardware(text: str) -> Hardware:
    """`8xH100-80GB`, `rtx 4090`, `2x24GiB`, `cpu`. UserError with the nearest name for anything else."""
    count, name = _COUNT.fullmatch(text.strip() or "?").groups()  # type: ignore[union-attr]  # matches any text
    devices = int(count or 1)
    if not devices:
        raise UserError("no device is not enough", key="--hardware", hint="write 1x or more")
    memory = _MEMORY.fullmatch(name.strip())
    if memory is not None:
        size = float(memory[1]) * (1e9 if memory[2].lower() == "gb" else GIB)
        return Hardware(text.strip(), devices, int(size))
    if _plain(name) == "cpu":
        return this_cpu()
    found = [card for card in CARDS.values() if _plain(name) in _spellings(card)]
    if len(found) == 1:
        return Hardware(
            f"{devices}x{found[0].name}" if devices > 1 else found[0].name, devices, found[0].memory, found[0]
        )
    if found:
        hint = f"which one: {' or '.join(card.name for card in found)}?"
        raise UserError(f"'{name.strip()[:60]}' is more than one card", key="--hardware", hint=hint)
    names = [*CARDS, "24GiB", "cpu"]
    hint = did_you_mean(name.strip()[:60].upper(), names, kind="hardware")
    if "'" not in hint:
        hint = f"known: {', '.join(names)}; a count stands before it, as in 8xH100-80GB"
    raise UserError(f"no such hardware '{text.strip()[:60]}'", key="--hardware", hint=hint)


def _plain(name: str) -> str:
    """`NVIDIA GeForce RTX 4090`, `rtx-4090` and `4090` are the same card."""
    text = re.sub(r"nvidia|geforce|tesla|rtx|sxm\d?|pcie|hbm\d?e?|(?<=\d)g(i?b)?$", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", text)


def _spellings(card: Card) -> set[str]:
    """The card's name with and without its memory."""
    return {_plain(card.name), _plain(card.name.partition("-")[0]) or _plain(card.name)}


def this_cpu() -> Hardware:
    """The machine that plans: its main memory, less what other processes hold at this moment."""
    memory = psutil.virtual_memory()
    return Hardware(f"this CPU ({processor()}, {usable_cores()} cores)", 1, memory.available, None, on_gpu=False)


def usable_cores() -> int:
    """Physical cores this process may run on: a container, Slurm or `taskset` may have left it some of them only."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    allowed = getattr(os, "sched_getaffinity", None)  # Linux has it, macOS and Windows do not
    return physical if allowed is None else min(physical, len(allowed(0)))


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (read line by line)
            named = next((line.partition(":")[2] for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return " ".join(named.replace("(R)", "").split()) or platform.processor() or platform.machine()


def these_gpus() -> Hardware | None:
    """The GPUs of this machine by `nvidia-smi`, None without one. A card that is not known has memory but no rate."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, check=False, capture_output=True, text=True)
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    if done.returncode or not rows:
        return None
    name, memory = rows[0][0].strip(), min(int(float(row[2])) for row in rows) * MIB
    near = [card for card in CARDS.values() if _plain(card.name.partition("-")[0]) in _plain(name)]
    card = min(near, key=lambda one: abs(one.memory - memory), default=None)
    return Hardware(f"{len(rows)}x{name}" if len(rows) > 1 else name, len(rows), memory, card)
