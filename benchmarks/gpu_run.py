"""All contenders on one GPU, in one call of a few minutes, on a machine that may have no network.

    python -m benchmarks.gpu_run --out OUT --minutes 9 --site BASE --site unsloth=FOLDER
    python -m benchmarks.gpu_run --out OUT --device cpu --shape tiny --contenders ours,hf    # to try it on a CPU

Random weights of a real shape in bfloat16 and random documents of realistic lengths: neither a step's time nor what the
gates compare depends on what they say. Every run is a process of its own (benchmarks.peers), whose libraries come from
the folder that `--site` names for it; A-B-A-B as far as the minutes go. What a run found is written at once, so that a
call that is cut off keeps it. Workloads:

| | documents | what | seconds planned on an H100 |
|---|---|---|---|
| | | weights, documents, GEMM rate, float32 eager reference of the first steps | 70 |
| W1 | Alpaca-like, 60–512 tokens, rows of like length, 2 × 8 a step | LoRA | 30 a run, 7 runs |
| W2 | chats, packed into rows of 2,048, 2 × 2 a step | LoRA | 30 a run, 4 runs |
| W3 | as W2 | QLoRA, NF4 with double quantisation | 40 a run, 3 runs |
| W4 | pairs of 512 + 256 + 256 tokens, 2 × 4 a step | DPO with LoRA (benchmarks.preference_gpu) | 40 a run, 2 runs |
| W6 | one document a step, ever longer | QLoRA with checkpointing in 24 GiB: the longest that fits | 50 a run |

That is more than nine minutes: `JOBS` stands in the order of importance, and a run that would not end in time is left
out and said to be. While one run trains, the process of the next imports its libraries and waits. Where time would not
do, `--layers N` cuts the model, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_data import LORA_RANK
from benchmarks.gpu_judge import WARM_UP, Job, judge, table

MODULES = {"ours": "ours_gpu", "trl": "trl", "liger": "trl", "hf": "hf", "unsloth": "unsloth", "axolotl": "axolotl"}
"""Which harness a contender's name belongs to, by what stands before the first hyphen."""
PREPARE = "prepare"


JOBS = (
    *(Job("W1", name) for name in ("ours", "unsloth", "trl-tuned", "hf")),
    *(Job("W2", name) for name in ("ours", "unsloth")),
    *(Job("W1", name, round=2) for name in ("ours", "unsloth", "trl-tuned")),
    *(Job("W3", name, 40) for name in ("ours", "unsloth")),
    *(Job("W2", name, round=2) for name in ("ours", "unsloth")),
    *(Job("W6", name, 50) for name in ("ours-checkpointed", "unsloth-checkpointed")),
    *(Job("W4", name, 40) for name in ("ours", "trl-tuned")),
    *(Job("W2", name) for name in ("trl-tuned",)),
    *(Job("W6", name, 50) for name in ("trl-checkpointed",)),
    *(Job("W3", name, 40) for name in ("hf",)),
    *(Job("W1", name) for name in ("liger", "unsloth-checkpointed", "trl-default", "axolotl")),
)


@dataclass
class Plan:
    """Which run is next, by what is left of the time and by how long runs have taken here."""

    jobs: list[Job]
    left_out: list[Job] = field(default_factory=list)
    failed: set[tuple[str, str]] = field(default_factory=set)
    """Kinds that need no second round."""
    seen: dict[tuple[str, str], float] = field(default_factory=dict)
    pace: list[float] = field(default_factory=list)
    """Seconds taken by seconds expected, of every run that came through."""

    def expected(self, job: Job) -> float:
        """Seconds: those of its own kind, else the table's at the pace of this machine."""
        if job.kind in self.seen:
            return self.seen[job.kind]
        return job.seconds * (statistics.median(self.pace) if len(self.pace) > 1 else 1.0)

    def limit(self, job: Job, left: float) -> float:
        """Seconds after which a run is stopped: one that hangs must not take the others' time."""
        return max(1.0, min(left, max(45.0, 2.5 * self.expected(job))))

    def next(self, left: float) -> Job | None:
        """The most important run that ends within `left` seconds; those passed over are left out for good."""
        while self.jobs:
            job = self.jobs.pop(0)
            if job.kind in self.failed:
                continue
            if self.expected(job) <= left:
                return job
            self.left_out.append(job)
        return None

    def took(self, job: Job, seconds: float, *, well: bool) -> None:
        """What a run was found to take."""
        if well:
            self.seen[job.kind] = seconds
            self.pace.append(seconds / job.seconds)
        else:
            self.failed.add(job.kind)


class Runs:
    """The processes: one that trains, and one that waits behind its gate with its libraries imported."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work = options, work
        self.sites = dict(site.split("=", 1) if "=" in site else ("", site) for site in options.site)

    def start(self, job: Job) -> subprocess.Popen[bytes]:
        """The process of a run, which imports and waits for :meth:`run`."""
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(self.work / "hf-home"),
            "TOKENIZERS_PARALLELISM": "false",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "PYTHONUNBUFFERED": "1",
        }
        site = self.sites.get(job.contender.split("-")[0], self.sites.get(""))
        if site:  # alone: another contender's transformers would be another model
            environment["PYTHONPATH"] = site
        o = self.options
        command = [sys.executable, "-m", "benchmarks.gpu_work", job.workload, job.contender, "--work", str(self.work)]
        command += ["--name", job.name, "--shape", o.shape, "--device", o.device, "--layers", str(o.layers)]
        command += ["--dtype", o.dtype, "--steps", str(o.steps), "--memory-gib", str(o.memory_gib)]
        command += ["--workloads", o.workloads]
        command += ["--gradients"] if job.round == 1 and job.workload in ("W1", "W2") else []
        with (self.work / f"{job.name}.log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def run(self, job: Job, process: subprocess.Popen[bytes], limit: float) -> dict[str, Any]:
        """Opens the gate and waits; what the run wrote, or why there is nothing."""
        (self.work / f"{job.name}.gate").touch()
        begun, why = time.monotonic(), None
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:.0f} s"
            stop(process)
        seconds = time.monotonic() - begun
        answer, log = self.work / f"{job.name}.json", self.work / f"{job.name}.log"
        found: dict[str, Any] = json.loads(answer.read_text()) if answer.exists() else {}
        lines = log.read_text(errors="replace").strip().splitlines()
        if why is None and process.returncode:
            why = (lines or ["no message"])[-1][:200]
        if why is not None and not (job.workload == "W6" and found.get("steps")):
            found.setdefault("reason", why)
        return found | {"wall_seconds": seconds, "log": lines[-60:]}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends a process of ours and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(out: Path, options: argparse.Namespace, about: dict[str, Any], rows: list[dict[str, Any]], plan: Plan) -> str:
    """Everything so far, as JSON and as Markdown."""
    shape = options.shape + (f" cut to {options.layers} layers" if options.layers else "")
    gemm = f"; GEMM {about['gemm_flops'] / 1e12:.3g} TFLOP/s" if about.get("gemm_flops") else ""
    text = (
        f"`python -m benchmarks.gpu_run` on {about.get('device', options.device)}, {time.strftime('%Y-%m-%d')}: "
        f"{shape}, {options.dtype}, LoRA r {LORA_RANK} on all linear layers, random weights{gemm}.\n\n"
        f"{table(rows, plan.left_out)}"
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.md").write_text(text)
    left_out = [job.name for job in plan.left_out]
    data = {"about": about, "rows": rows, "left_out": left_out, "shape": shape, "dtype": options.dtype}
    (out / "gpu.json").write_text(json.dumps(data, indent=1))
    return text


def what_was_prepared(found: dict[str, Any], work: Path) -> tuple[dict[str, Any], list[str]]:
    """What the preparation answered, and its log."""
    answer = work / "prepared.json"
    about = json.loads(answer.read_text()) if answer.exists() else {}
    about["prepare_seconds"] = found["wall_seconds"]
    if "reason" in found:
        about["prepare"] = found["reason"]
    return about, [f"== {PREPARE}: {found['wall_seconds']:.1f} s", *found["log"]]


def compare(options: argparse.Namespace) -> str:
    """The whole call; see the module's docstring. Returns the Markdown."""
    ends = time.monotonic() + 60 * options.minutes
    work, out = Path(options.work).resolve(), Path(options.out).resolve()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    asked = options.contenders.split(",") if options.contenders else None
    workloads = options.workloads.split(",")
    jobs = [j for j in JOBS if j.workload in workloads and (asked is None or j.contender in asked)]
    jobs = [j for j in jobs if j.round <= options.rounds]
    plan, runs, rows = Plan(jobs), Runs(options, work), []
    prepare = Job("W0", PREPARE, 70)
    process = runs.start(prepare)
    job = plan.next(ends - time.monotonic() - prepare.seconds)
    waiting = runs.start(job) if job else None
    found = runs.run(prepare, process, min(200.0, ends - time.monotonic()))
    about, log = what_was_prepared(found, work)
    if not (work / "ready").exists():
        if waiting:
            stop(waiting)
        (out / "log.txt").write_text("\n".join(log))
        raise SystemExit(f"no weights were written: {found.get('reason')}\n" + "\n".join(log[-20:]))
    try:
        while job is not None and waiting is not None:
            left = ends - time.monotonic()
            process, now = waiting, job
            # The next one is chosen before this one ends, by what this one is expected to take.
            job = plan.next(left - plan.expected(now))
            waiting = runs.start(job) if job else None
            found = runs.run(now, process, plan.limit(now, left - 5))
            row = judge(now, found, work, about, options.dtype)
            plan.took(now, found["wall_seconds"], well="reason" not in row)
            rows.append(row)
            log += [f"== {now.name}: {found['wall_seconds']:.1f} s", *found["log"]]
            (out / "log.txt").write_text("\n".join(log))
            text = write(out, options, about, rows, plan)
            shown = {name: value for name, value in row.items() if name not in ("rates", "weights", "versions")}
            print(f"{ends - time.monotonic():.0f} s left", now.name, shown, flush=True)
            late = waiting is not None and job is not None and plan.expected(job) > ends - time.monotonic()
            if waiting is not None and job is not None and (late or job.kind in plan.failed):
                stop(waiting)
                plan.left_out += [job] if late else []
                job = plan.next(ends - time.monotonic())
                waiting = runs.start(job) if job else None
    finally:
        for one in (process, waiting):
            if one is not None and one.poll() is None:
                stop(one)
    text = write(out, options, about, rows, plan)
    print(text)
    return text


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_run")
    parser.add_argument("--out", required=True, help="folder for gpu.json, gpu.md and log.txt")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--shape", default="llama-3-8b", help="a name of `llama-ft models`")
    parser.add_argument("--layers", type=int, default=0, help="cut the shape to so many; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--steps", type=int, default=12, help=f"of a run, {WARM_UP} of them to warm up")
    parser.add_argument("--rounds", type=int, default=2, help="at most so many of a run")
    parser.add_argument("--memory-gib", type=float, default=24, help="of W6")
    parser.add_argument("--workloads", default="W1,W2,W3,W4,W6")
    parser.add_argument("--contenders", default="", help="separated by commas; all unless given")
    parser.add_argument("--site", action="append", default=[], help="FOLDER of packages for all, or NAME=FOLDER")
    parser.add_argument(
        "--work", default="", help="where weights are written, 20 GB for 8B; main memory if it has them"
    )
    options = parser.parse_args(arguments)
    if not options.work:
        roomy = Path("/dev/shm").is_dir() and shutil.disk_usage("/dev/shm").free > 24 * 2**30
        options.work = str(Path("/dev/shm" if roomy else tempfile.gettempdir()) / f"llama-ft-gpu-{os.getpid()}")
    return options


if __name__ == "__main__":
    compare(parse())
