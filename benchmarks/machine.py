"""What all benchmarks share: where results go, what they depend on, and a command's time and memory."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from contextlib import suppress
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

    from llama_ft.llama.load import gemm_rate

    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    torch.set_num_threads(psutil.cpu_count(logical=False) or 1)
    return {
        "cpu": cpu.split(":")[-1].strip() or platform.processor(),
        "cores": psutil.cpu_count(logical=False),
        "gemm_gflops": {name: round(gemm_rate(getattr(torch, name)) / 1e9) for name in ("float32", "bfloat16")},
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "date": date.today().isoformat(),
    }


def describe(about: dict[str, Any]) -> str:
    """One line: processor, its matrix rates, versions, date."""
    gemm = about["gemm_gflops"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    rates = f"GEMM {gemm['float32']} GFLOP/s float32 and {gemm['bfloat16']} bfloat16"
    return f"{about['cpu']}, {about['cores']} cores, {rates}; {versions}; {about['date']}"


class Memory(threading.Thread):
    """The largest sum of the resident memory of processes that start below this one, looked at five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.peak = threading.Event(), 0
        self.others = {process.pid for process in psutil.Process().children(recursive=True)}

    def run(self) -> None:
        while not self.done.wait(0.2):
            held = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.pid in self.others:
                        continue
                    held += process.memory_info().rss
            self.peak = max(self.peak, held)

    def __enter__(self) -> Memory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.join()


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Runs a command; (seconds, peak resident GiB of its process tree). SystemExit with its last words if it fails."""
    log = folder / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, highest = time.perf_counter(), 0
    with Memory() as memory, log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            # A short peak between two looks is in the kernel's own mark; not rusage, which counts what this process
            # held when it forked.
            highest = max(highest, _high_water(process.pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command[:6]} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start, max(highest / 2**20, memory.peak / 2**30)


def _high_water(pid: int) -> int:
    """Peak resident KiB of a process so far (VmHWM), 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
