"""What `llama-ft plan` says beside what the run then takes, for six recipes through the real command.

    python -m benchmarks.plan --data ../shared/data

Each recipe is planned by a process of its own just before it is run by `llama-ft train`, so that both meet the machine
in the same state. Peak memory is the trainer's own high-water mark; time is that of the whole command. Prints the
Markdown table of docs/plan.md. `--only NAME` runs some, `--rounds N` repeats each and keeps the median by time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil

LLAMA_FT = [sys.executable, "-m", "llama_ft.cli"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
ALPACA, CHAT = "instruct/alpaca_5000.json", "chat/moss_en_sharegpt.json"


def cases(data: Path) -> dict[str, tuple[str, str, list[str]]]:
    """Name -> what is special about it, recipe, overrides."""
    alpaca = [f"data.0.path={data / ALPACA}", "data.0.limit=200", "training.global_batch=16", "training.max_steps=2"]
    chat = [f"data.0.path={data / CHAT}"]
    short = ["training.max_steps=2", "export.merged=false"]
    return {
        "quickstart": ("LoRA, one pass a step", "quickstart", ["training.max_steps=8"]),
        "lora": ("LoRA on Alpaca rows, 8 documents a pass", "alpaca/smollm2-135m-lora", alpaca),
        "full": (
            "every weight trained",
            "alpaca/smollm2-135m-lora",
            [*alpaca, "adapter.method=full", "training.learning_rate=2e-5"],
        ),
        "padded": (
            "LoRA, padded passes of 4, no export",
            "alpaca/smollm2-135m-lora",
            [*alpaca, "sequence.packing=false", "training.micro_batch=4", "export.merged=false"],
        ),
        "long": (
            "LoRA, chats of up to 1,024 tokens, checkpointing, no export",
            "vicuna/smollm2-135m-lora",
            [*chat, "training.gradient_checkpointing=true", "training.global_batch=4", *short],
        ),
        "qlora": (
            "QLoRA in 4 bits, no export",
            "alpaca/smollm2-135m-lora",
            [*alpaca, "adapter.method=qlora", "export.merged=false"],
        ),
    }


def planned(recipe: str, overrides: list[str]) -> dict[str, Any]:
    """`llama-ft plan --json`."""
    command = [*LLAMA_FT, "plan", recipe, *overrides, "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise SystemExit(f"plan {recipe} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def measured(recipe: str, overrides: list[str], folder: Path) -> dict[str, Any]:
    """`llama-ft train`: seconds of the command, high-water mark of its largest process, and the run's own figures."""
    run, log = folder / "run", folder / "log"
    command = [*LLAMA_FT, "train", recipe, *overrides, f"output_dir={run}", "--overwrite"]
    start, peak = time.perf_counter(), 0
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        try:
            while process.poll() is None:
                peak = max([peak, *map(high_water, tree(process.pid))])
                time.sleep(0.1)
        finally:  # a benchmark that is stopped leaves no run behind
            for pid in tree(process.pid) if process.poll() is None else []:
                os.kill(pid, signal.SIGKILL)
    if process.returncode:
        raise SystemExit(f"{recipe} failed:\n{log.read_text()[-3000:]}")
    seconds = time.perf_counter() - start
    own = json.loads((run / "measured.json").read_text())
    return {**own, "peak_bytes": peak, "own_peak_bytes": own["peak_bytes"], "seconds": seconds}


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def high_water(pid: int) -> int:
    """Peak resident bytes of a process so far, 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def row(name: str, about: str, plans: list[dict[str, Any]], runs: list[dict[str, Any]]) -> str:
    """One line of the table: the round with the median ratio of times."""
    ratios = [run["seconds"] / plan["seconds"]["total"] for plan, run in zip(plans, runs, strict=True)]
    middle = ratios.index(statistics.median_low(ratios))
    plan, run = plans[middle], runs[middle]
    memory = (plan["memory"]["peak"], run["peak_bytes"])
    steps, tokens = plan["steps"]["total"], plan["steps"]["tokens"]
    exact = (
        "equal" if (steps, tokens) == (run["steps"], run["tokens"]) else f"{run['steps']} steps, {run['tokens']} tokens"
    )
    told = f"{plan['seconds']['total']:.0f} / {run['seconds']:.0f} s ({ratios[middle] - 1:+.0%})"
    steady = f"{plan['seconds']['training']:.0f} / {run['training_seconds']:.0f} s"
    resident = f"{memory[0] / 2**30:.2f} / {memory[1] / 2**30:.2f} GiB ({memory[1] / memory[0] - 1:+.0%})"
    return f"| {name} | {about} | {steps}, {tokens:,} | {exact} | {resident} | {told} | {steady} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with instruct/ and chat/ of real rows")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write everything as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    chosen = {name: case for name, case in cases(options.data.resolve()).items() if name in (options.only or [name])}
    print(f"{date.today()}, {platform.processor() or platform.machine()}, {psutil.cpu_count(logical=False)} cores\n")
    print("| case | | steps, tokens planned | measured | peak RSS planned / measured | whole command | steps alone |")
    print("|---|---|---|---|---|---|---|", flush=True)
    everything = {}
    for name, (about, recipe, overrides) in chosen.items():
        planned(recipe, overrides)  # fills the cache of prepared data, which a plan of a run that is started has filled
        plans, runs = [], []
        for _ in range(options.rounds):
            plans.append(planned(recipe, overrides))
            with tempfile.TemporaryDirectory() as folder:
                runs.append(measured(recipe, overrides, Path(folder)))
        print(row(name, about, plans, runs), flush=True)
        everything[name] = {"plans": plans, "runs": runs}
        if options.out:
            options.out.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
