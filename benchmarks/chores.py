"""W5: everything around the steps: from the command to the first step, from rows to ids, from an adapter to a model.

    python -m benchmarks.run --workload W5 --peers ours,trl-tuned,hf,litgpt,llamafactory,torchtune

Start-up: seconds from a process's start until its first optimizer step begins, on the documents of W1; ours reads the
recipe, asks every guard and opens its prepared data in that time, the others are given ids. Preparation: 52,002 rows
in Alpaca's layout to ids and labels, ours cold and warm beside TRL's own preparation, with as many processes as cores.
Export: an adapter on SmolLM2's shape to a merged model on the disk, ours beside PEFT's merge (`benchmarks.merge`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import merge
from benchmarks.contenders import CONTENDERS
from benchmarks.data import measure, write_rows
from benchmarks.run import ROOT, Failed, run_once, spec_of
from benchmarks.venvs import python_of
from benchmarks.workloads import WORKLOADS, prepare_job
from llama_ft import load_recipe, prepare_data
from llama_ft.data.render import MASKED
from llama_ft.llama.base import locate_base
from llama_ft.paths import cache_dir
from llama_ft.plan.hardware import usable_cores

RECIPE = WORKLOADS["W1"].recipe
SHAPE = "smollm2-135m"
Figures = dict[str, list[float] | str]


def start_up(options: argparse.Namespace, folder: Path) -> Figures:
    """Seconds until the first step of each contender, by round; or why there is none."""
    job = prepare_job(WORKLOADS["W1"], Path(options.data), 2, options.dtype, folder)
    found: Figures = {}
    for number in range(options.rounds):
        for name in options.peers.split(","):
            past = found.setdefault(name, [])
            if isinstance(past, str):
                continue
            spec = spec_of(CONTENDERS[name], job, 1, options.dtype, folder, gradients=False)
            try:
                past.append(run_once(CONTENDERS[name], spec, job, folder)["ready_seconds"])
                print(f"round {number + 1} start-up {name}: {past[-1]:.1f} s", file=sys.stderr, flush=True)
            except Failed as failure:
                found[name] = str(failure)
    return found


def as_prompts(rows: Path, file: Path) -> None:
    """Rows as the prompts and completions that TRL is given: what our own preparation made of them, as text again."""
    prepared = prepare_data(load_recipe(RECIPE, [f"data.0.path={rows}", "eval_data=null"]))
    decode = prepared.tokenizer.decode
    with file.open("w", encoding="utf-8") as out:
        for row in prepared.train:
            ids = row["input_ids"]
            start = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
            text = {"prompt": decode(ids[:start]), "completion": decode(ids[start:], skip_special_tokens=True)}
            out.write(json.dumps(text) + "\n")


def preparation(options: argparse.Namespace, folder: Path) -> Figures:
    """Seconds from rows to ids and labels, by round."""
    rows, prompts = folder / "rows.jsonl", folder / "prompts.jsonl"
    write_rows(Path(options.data) / WORKLOADS["W1"].data, rows, options.rows)
    as_prompts(rows, prompts)
    found: dict[str, list[float]] = {"ours, cold": [], "ours, warm": [], "trl": []}
    theirs = [str(python_of("trl")), "-m", "benchmarks.peers.trl_prepare", str(locate_base("smollm2-135m"))]
    for number in range(options.rounds):
        cache = folder / f"cache-{number}"
        cache.mkdir()
        (cache / "models").symlink_to(cache_dir("models"))
        for what in ("cold", "warm"):
            found[f"ours, {what}"].append(measure(what, rows, options.rows, cache)["seconds"])
        shutil.rmtree(cache)
        # A cache of datasets' own in a folder that is new in every round: the second one would only open it.
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / f"datasets-{number}")}
        line = [*theirs, str(prompts), str(usable_cores())]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, check=True)
        found["trl"].append(json.loads(done.stdout.splitlines()[-1])["seconds"])
        said = ", ".join(f"{name} {seconds[-1]:.1f} s" for name, seconds in found.items())
        print(f"round {number + 1} preparation: {said}", file=sys.stderr, flush=True)
    return {**found}


def compare(options: argparse.Namespace, folder: Path) -> tuple[str, dict[str, Any]]:
    """All three chores. Returns the Markdown and what was measured."""
    (folder / "start").mkdir()
    found = {"start-up": start_up(options, folder / "start"), "preparation": preparation(options, folder)}
    arguments = ["--shape", SHAPE, "--folder", str(folder), "--rounds", str(options.rounds), "--no-write"]
    text, merged = merge.compare(merge.parse(arguments))
    return f"{table(found, options)}\n**Export.** {text}", {**found, "export": merged}


def table(found: dict[str, Figures], options: argparse.Namespace) -> str:
    """Markdown of the first two chores."""
    heads = {
        "start-up": ("**Start-up**, seconds until the first step begins, documents of W1.", "ours"),
        "preparation": (f"**Preparation**, seconds for {options.rows:,} rows of Alpaca's layout.", "ours, cold"),
    }
    lines = []
    for chore, (head, first) in heads.items():
        lines += [f"{head} {options.rounds} rounds in turn.", "", "| | s (min–max) | this / ours |", "|---|---|---|"]
        ours = found[chore].get(first)
        for name, seconds in found[chore].items():
            if isinstance(seconds, str):
                lines.append(f"| {name} | {seconds} | |")
                continue
            middle = statistics.median(seconds)
            ratio = middle / statistics.median(ours) if isinstance(ours, list) and ours else None
            said = "–" if ratio is None else f"{ratio:.1f}×" if ratio >= 0.1 else f"{ratio:.2g}×"
            lines.append(f"| {name} | {middle:.1f} ({min(seconds):.1f}–{max(seconds):.1f}) | {said} |")
        lines.append("")
    return "\n".join(lines)
