"""Our training command beside TRL's trainer: same rows, same ids, same order, same machine, one run.

    python -m benchmarks.train --peers trl --data ../shared/data/instruct/alpaca_5000.json

Every contender is a process of its own; they take turns (A B C … A B C …), so that a drift of the machine's speed
meets all of them. The first step of each process is warm-up and not counted. Writes JSON and Markdown to
`benchmarks/results/` and prints the table.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.trl_sft import VARIANTS
from llama_ft import load_recipe, prepare_data
from llama_ft.data.order import document_order
from llama_ft.llama.base import locate_base
from llama_ft.llama.load import gemm_rate
from llama_ft.recipe import Recipe

RECIPE = "alpaca/smollm2-135m-lora"
MICRO_BATCH = 8
OURS = "llama_ft"
REFERENCE = "trl-fp32"
PEERS = {"trl": ["trl-default", "trl-tuned", "trl-tuned-fp32"]}
RESULTS = Path(__file__).parent / "results"


def overrides_of(options: argparse.Namespace) -> list[str]:
    """The recipe as the benchmark runs it: no evaluation and no export inside the measured time."""
    return [
        f"data.0.path={Path(options.data).resolve()}",
        f"data.0.limit={options.limit}",
        f"training.max_steps={options.steps}",
        f"training.global_batch={options.global_batch}",
        f"training.micro_batch={MICRO_BATCH}",
        "eval_data=null",
        "export.merged=false",
        "tracking=[]",
        *(["adapter.method=full"] if options.method == "full" else []),
        *options.override,
    ]


def write_documents(recipe: Recipe, folder: Path) -> tuple[Path, str]:
    """The prepared documents in the order of the first epoch, as jsonl; and their sha256."""
    train = prepare_data(recipe).train
    order = document_order(len(train), recipe.training.seed, 0)
    file = folder / "documents.jsonl"
    with file.open("w") as out:
        for index in order:
            row = train[int(index)]
            out.write(json.dumps({"input_ids": row["input_ids"], "labels": row["labels"]}) + "\n")
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def measured(command: list[str], folder: Path) -> tuple[float, float]:
    """Runs a command; (seconds, peak resident GiB of its largest process). Stops the benchmark if it fails."""
    log = folder / "log"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    start, peaks = time.perf_counter(), {0: 0}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        while process.poll() is None:
            # Not rusage, which counts what this process held when it forked; the kernel's own mark only ever rises.
            for pid in (process.pid, *(child.pid for child in _children(process.pid))):
                peaks[pid] = max(peaks.get(pid, 0), _high_water(pid))
            time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command[:6]} failed:\n{log.read_text()[-3000:]}")
    return time.perf_counter() - start, max(peaks.values()) / 2**20


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _high_water(pid: int) -> int:
    """Peak resident KiB of a process so far (VmHWM), 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def run_ours(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The real command, as a user types it."""
    run = folder / "run"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "-m", "llama_ft.train", RECIPE]
    seconds, rss = measured([*launch, *overrides_of(options), f"output_dir={run}", "--overwrite"], folder)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, tokens, labelled = [], 0, 0
    for record in records:
        if "loss" not in record:
            continue
        steps.append(
            {
                "seconds": record["seconds"],
                "tokens": record["tokens"] - tokens,
                "labelled": record["labelled_tokens"] - labelled,
                "loss": record["loss"],
            }
        )
        tokens, labelled = record["tokens"], record["labelled_tokens"]
    return {"steps": steps, "seconds": seconds, "rss": rss}


def run_trl(variant: str, recipe: Recipe, documents: Path, folder: Path, threads: int) -> dict[str, Any]:
    """One TRL variant over the same documents."""
    training, adapter = recipe.training, recipe.adapter
    spec = {
        "model": str(locate_base(recipe.model.base)),
        "documents": str(documents),
        "variant": variant,
        "steps": training.max_steps,
        "micro_batch": MICRO_BATCH,
        "accumulation": training.global_batch // MICRO_BATCH,
        "learning_rate": training.learning_rate,
        "warmup": training.warmup,
        "seed": training.seed,
        "method": adapter.method,
        "r": adapter.r,
        "alpha": adapter.alpha,
        "threads": threads,
        "out": str(folder / "out.json"),
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    seconds, rss = measured([sys.executable, "-m", "benchmarks.trl_sft", str(folder / "spec.json")], folder)
    return {**json.loads((folder / "out.json").read_text()), "seconds": seconds, "rss": rss}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds of tokens/s (all steps but the first of each), their spread, and the largest peak."""
    rates, labelled = [], []
    for run in runs:
        counted = run["steps"][1:]
        seconds = sum(step["seconds"] for step in counted)
        rates.append(sum(step["tokens"] for step in counted) / seconds)
        labelled.append(sum(step["labelled"] for step in counted) / seconds)
    return {
        "tokens_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "labelled_per_second": statistics.median(labelled),
        "rss_gib": max(run["rss"] for run in runs),
        "losses": [step["loss"] for step in runs[0]["steps"]],
    }


def loss_gap(a: list[float], b: list[float]) -> float:
    """Largest difference step by step."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: rates, ratio of ours to each, peak memory, and the loss beside the float32 reference."""
    ours = rows[OURS]
    lines = [
        "| | non-pad tokens/s (min–max) | labelled tokens/s | ours / this | peak RSS, GiB | ours / this "
        "| max \\|Δ loss\\| to fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gap = "other order" if row["loss_gap"] is None else f"{row['loss_gap']:.1e}"
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} ({row['spread'][0]:.0f}–{row['spread'][1]:.0f}) "
            f"| {row['labelled_per_second']:.0f} | {ours['tokens_per_second'] / row['tokens_per_second']:.2f}× "
            f"| {row['rss_gib']:.2f} | {ours['rss_gib'] / row['rss_gib']:.2f} | {gap} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    import torch

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


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.train")
    parser.add_argument("--peers", default="trl", help="comma-separated; known: " + ", ".join(PEERS))
    parser.add_argument("--data", default="../shared/data/instruct/alpaca_5000.json", help="Alpaca rows")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per process, the first one uncounted")
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for our recipe")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace, about: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Runs ours and the peers in turn. Returns the Markdown and everything measured."""
    recipe = load_recipe(RECIPE, overrides_of(options))
    variants = [variant for peer in options.peers.split(",") if peer for variant in PEERS[peer]]
    contenders = [OURS, *variants]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents, digest = write_documents(recipe, folder)
        reference = run_trl(REFERENCE, recipe, documents, folder, about["cores"])
        for round_number in range(options.rounds):
            for contender in contenders:
                if contender == OURS:
                    result = run_ours(options, folder)
                else:
                    result = run_trl(contender, recipe, documents, folder, about["cores"])
                runs[contender].append(result)
                rate = summary([result])["tokens_per_second"]
                line = f"round {round_number + 1} {contender}: {rate:.0f} tokens/s, {result['rss']:.2f} GiB"
                print(line, file=sys.stderr, flush=True)
    rows = {name: summary(results) for name, results in runs.items()}
    expected = [step["loss"] for step in reference["steps"]]
    for name, row in rows.items():
        regrouped = VARIANTS.get(name, {}).get("grouped", False)
        row["loss_gap"] = None if regrouped else loss_gap(row["losses"], expected)
    text = (
        f"The training command beside TRL's trainer, {options.method}: {options.rounds} rounds in turn, each a process "
        f"of its own, documents sha256 {digest[:12]}.\n\n{table(rows)}\n"
    )
    return text, {"documents": digest, "rows": rows, "runs": runs}


def main() -> None:
    """See the module's docstring."""
    options, about = parse(), machine()
    text, data = compare(options, about)
    text = f"`python -m benchmarks.train {' '.join(sys.argv[1:])}`\n\n{describe(about)}.\n\n{text}"
    print(text)
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        stem = f"train-{options.method}-cpu-{about['date']}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps({"machine": about, **data}, indent=1))


if __name__ == "__main__":
    main()
