"""Weak scaling of the real command on a CPU: one process on one core, and two on two cores with twice the documents.

    python -m benchmarks.scaling --configs cpu_ddp_2 cpu_fsdp2_2 --steps 12

`accelerate launch -m llama_ft.train` with cpu.yaml on one core and a global batch B, then with each of the configs on
two cores and 2B: the same work for each core. Rates are the trainer's own tokens a second, the median over the steps
but the first two. Every run is in a network namespace of its own where the machine allows one; two runs of different
length, the kernel's count of bytes that the loopback carried, and their difference give the bytes a step, which stand
beside the plan's. Prints a Markdown table and writes results/scaling-cpu-<date>.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.exchange import free_port, namespaces_allowed
from llama_ft.plan.hardware import processor
from llama_ft.train.lock import versions

RESULTS = Path(__file__).parent / "results"
SHORT, WARM = 3, 2
"""Steps of the run that is taken off another, and steps that no rate counts."""
ALONE = "cpu"
INSIDE = 'ip link set lo up; "$@"; status=$?; awk \'$1 == "lo:" {print "carried", $10}\' /proc/net/dev; exit $status'


def overrides_of(options: argparse.Namespace, processes: int) -> list[str]:
    """The recipe's changes: a share of `--batch` documents for each process, and nothing but training."""
    return [
        f"training.global_batch={options.batch * processes}",
        f"training.micro_batch={options.micro_batch}",
        "eval_data=null",
        "export.merged=false",
        "training.save_every=1000",
        "tracking=[]",
        *options.override,
    ]


def train(config: str, processes: int, steps: int, cores: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Runs so many steps: the lines of metrics.jsonl, and the bytes that the loopback carried, None without a
    namespace."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
        launch += ["--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        launch += ["--config_file", f"accelerate_configs/{config}.yaml"]
        launch += ["--main_process_port", str(free_port())] if processes > 1 else []
        launch += ["-m", "llama_ft.train", options.recipe, *overrides_of(options, processes)]
        launch += [f"training.max_steps={steps}", f"output_dir={folder}/run"]
        inside = ["unshare", "-n", "sh", "-c", INSIDE, "sh"] if namespaces_allowed() else []
        command = [*inside, "taskset", "-c", ",".join(map(str, cores)), *launch]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        if done.returncode:
            first = [line for line in done.stderr.splitlines() if line.startswith("[rank0]")] or [done.stderr[-3000:]]
            raise SystemExit("\n".join([f"{config} failed:", done.stdout[-2000:], *first]))
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        engine = next((line for line in done.stdout.splitlines() if line.startswith("engine: ")), "")
        carried = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("carried ")]
    steps_of = [record for record in map(json.loads, lines) if "loss" in record]
    return {"steps": steps_of, "carried": carried[-1] if carried else None, "engine": engine}


def planned(config: str, processes: int, options: argparse.Namespace) -> int:
    """Bytes a process sends in a step, by `llama-ft plan`."""
    command = [sys.executable, "-m", "llama_ft.cli", "plan", options.recipe, *overrides_of(options, processes)]
    command += [f"launch=accelerate_configs/{config}.yaml", "--json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["exchange"]["sent"]


def measure(config: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything of one config: rounds of the whole run, and one short run to take its bytes off."""
    processes = 1 if config == ALONE else 2
    cores = options.cores[:processes]
    short = train(config, processes, SHORT, cores, options)
    runs = [train(config, processes, options.steps, cores, options) for _ in range(options.rounds)]
    rates = [statistics.median(step["tokens_per_second"] for step in run["steps"][WARM:]) for run in runs]
    row = {
        "config": config,
        "processes": processes,
        "engine": runs[0]["engine"].removeprefix("engine: "),
        "documents": options.batch * processes,
        "passes": options.batch // options.micro_batch,
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "planned_bytes": planned(config, processes, options),
        "sent_bytes": None,
        "losses": [step["loss"] for step in runs[0]["steps"]],
    }
    if short["carried"] is not None and runs[0]["carried"] is not None:
        more = options.steps - SHORT
        row["sent_bytes"] = round((runs[0]["carried"] - short["carried"]) / more / processes)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; rates beside those of one process."""
    head = "| config | engine | documents a step | tokens/s (min–max) | a core, of one | MB a process and step | plan |"
    lines = [head, "|---|---|---|---|---|---|---|"]
    alone = next((row["tokens_per_second"] for row in rows if row["config"] == ALONE), None)
    for row in rows:
        low, high = row["spread"]
        share = "" if alone is None else f"{row['tokens_per_second'] / row['processes'] / alone:.0%}"
        sent = "-" if row["sent_bytes"] is None or row["processes"] == 1 else f"{row['sent_bytes'] / 1e6:.2f}"
        plan = f"{row['planned_bytes'] / 1e6:.2f}" if row["processes"] > 1 else "-"
        rate = f"{row['tokens_per_second']:.0f} ({low:.0f}–{high:.0f})"
        lines.append(f"| {row['config']} | {row['engine']} | {row['documents']} | {rate} | {share} | {sent} | {plan} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """The processor, the versions that compute, and today's date."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed")
    found = versions(packages)
    return {
        "cpu": processor(),
        "versions": {name: found[name] for name in packages},
        "date": date.today().isoformat(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.scaling")
    parser.add_argument("--configs", nargs="+", default=["cpu_ddp_2", "cpu_fsdp2_2"], help="names of launch configs")
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--batch", type=int, default=8, help="documents a step of each process")
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cores", type=lambda text: [int(core) for core in text.split(",")], default=[0, 1])
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def main() -> None:
    """See the module's docstring."""
    options, about = parse(), machine()
    if options.steps <= SHORT:
        raise SystemExit(f"--steps must be more than {SHORT}")
    rows = []
    for config in [ALONE, *options.configs]:
        rows.append(measure(config, options))
        print(f"{config}: {rows[-1]['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    packages = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    text = (
        f"`python -m benchmarks.scaling {' '.join(sys.argv[1:])}`\n\n{about['cpu']}, one core a process; {packages}; "
        f"{about['date']}. {options.recipe}, {options.batch} documents a process and step in passes of "
        f"{options.micro_batch}, {options.rounds} × {options.steps} steps.\n\n{table(rows)}\n"
    )
    print(text)
    if not options.no_write:
        stem = f"scaling-cpu-{about['date']}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
