"""Ours beside every peer, on the same documents, in one honest run.

    python -m benchmarks.run --workload W1 --peers ours,trl-default,trl-tuned,hf,litgpt,llamafactory,torchtune

Every contender is a process of its own, in an environment of its own, by exact pins; they take turns (A B C … A B C …),
so that a drift of the machine's speed meets all of them. Ids and labels are given, in steps of like length or in full
rows; the first step of each process holds the longest, warms up and is not counted. No row without its gates
(:mod:`benchmarks.gates`): the same documents by hash, the first loss and the first gradient of transformers' own LLaMA.
A contender that cannot run says why, and its row stays. Writes JSON, Markdown and a picture to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gates, preference, tables
from benchmarks.contenders import CONTENDERS, OURS, Contender
from benchmarks.machine import RESULTS, Memory, describe, machine
from benchmarks.model import Gemm, Shares, flop_per_token
from benchmarks.peers.common import Spec, Step
from benchmarks.venvs import NoEnvironment
from benchmarks.workloads import WORKLOADS, Job, prepare_job
from llama_ft.llama.base import locate_base
from llama_ft.llama.load import choose_compute_dtype, load_config
from llama_ft.plan.hardware import usable_cores

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
PAIRS = "preference/hh_rlhf_harmless_test.jsonl.gz"
LIMIT = 1800.0
"""Seconds after which a contender's process is ended."""


class Failed(RuntimeError):
    """A contender that did not come to its end; says why."""


def run_once(contender: Contender, spec: Spec, job: Job, folder: Path) -> dict[str, Any]:
    """One process of a contender: its answer, with `seconds` and `rss_gib` of its whole tree. Failed: it says why."""
    spec.write(folder / "spec.json")
    answer = Path(spec.out)
    answer.unlink(missing_ok=True)
    try:
        command = contender.command(folder / "spec.json", job.recipe)
    except (NoEnvironment, OSError) as error:
        raise Failed(str(error)) from error
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(spec.threads)}
    start, log = time.perf_counter(), folder / "log"
    with Memory() as memory, log.open("w") as out:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise Failed(f"not done after {LIMIT:.0f} s") from error
    if done.returncode or not answer.exists():
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(lines[-1].strip()[:300] if lines else f"ended with status {done.returncode}")
    found: dict[str, Any] = json.loads(answer.read_text())
    return {**found, "seconds": time.perf_counter() - start, "rss_gib": memory.peak / 2**30}


def spec_of(contender: Contender, job: Job, steps: int, dtype: str, folder: Path, *, gradients: bool) -> Spec:
    """What a contender is told."""
    workload, training = job.workload, job.recipe.training
    return Spec(
        contender=contender.name,
        model=str(locate_base(job.recipe.model.base)),
        documents=str(job.documents),
        packed=workload.packed,
        max_length=workload.max_length,
        method=workload.method,
        adapter=str(job.adapter) if job.adapter else None,
        r=job.recipe.adapter.r,
        alpha=int(job.recipe.adapter.alpha),
        dtype=dtype,
        steps=steps,
        micro_batch=workload.micro_batch,
        accumulation=workload.accumulation,
        learning_rate=training.learning_rate,
        seed=training.seed,
        threads=usable_cores(),
        gradients=str(folder / "gradients.safetensors") if gradients else None,
        out=str(folder / "out.json"),
        recipe=workload.recipe,
        overrides=job.overrides,
    )


def turn(
    contender: Contender, job: Job, options: argparse.Namespace, reference: gates.Reference | None, folder: Path
) -> dict[str, Any]:
    """A contender's turn in a round, its answer with `faults`; `reference`: asks for the first gradient too."""
    first = reference is not None
    spec = spec_of(contender, job, options.steps, options.dtype, folder, gradients=first)
    result = run_once(contender, spec, job, folder)
    steps = [Step(**step) for step in result["steps"]]
    if reference is not None:
        assert spec.gradients is not None
        result["cosine"] = gates.cosine(Path(spec.gradients), reference.gradients)
        result["loss_gap"] = abs((steps[0].loss or float("nan")) - reference.loss)
        result["faults"] = gates.faults(
            *(steps, job.expected, reference, options.dtype, result["cosine"]), in_order=contender.in_order
        )
        Path(spec.gradients).unlink()
    for step in result["steps"]:
        del step["documents"]  # they were compared; the job's digest names them all
    return result


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs all contenders in turn. Everything measured, by contender: `runs`, or `error` of one that cannot run."""
    workload = WORKLOADS[options.workload]
    job = prepare_job(workload, Path(options.data), options.steps, options.dtype, folder)
    names = options.peers.split(",")
    first = spec_of(CONTENDERS[names[0]], job, options.steps, options.dtype, folder, gradients=False)
    reference = gates.reference_of(first, workload.documents, folder)
    tokens = sum(step.tokens for step in job.expected)
    labelled = sum(step.labelled for step in job.expected) / tokens
    lengths = [len(json.loads(line)["input_ids"]) for line in job.documents.read_text().splitlines()]
    config = load_config(locate_base(job.recipe.model.base))
    at_once = tokens // (options.steps * workload.accumulation)
    gemm = Gemm(config, at_once, int(at_once * labelled), getattr(torch, options.dtype))
    rows: dict[str, dict[str, Any]] = {name: {"runs": []} for name in names}
    rates = []
    for number in range(options.rounds):
        rates.append(gemm.rate())
        for name, row in rows.items():
            if "error" in row:
                continue
            try:
                result = turn(CONTENDERS[name], job, options, None if row["runs"] else reference, folder)
            except Failed as failure:
                row["error"] = str(failure)
                print(f"round {number + 1} {name}: {failure}", file=sys.stderr, flush=True)
                continue
            row["runs"].append(result)
            said = f"{tables.rate_of(result):.0f} tokens/s, {result['rss_gib']:.2f} GiB"
            print(f"round {number + 1} {name}: {said}", file=sys.stderr, flush=True)
            for fault in result.get("faults", []):
                print(f"    {fault}", file=sys.stderr, flush=True)
    shares = Shares(sum(length**2 for length in lengths) / sum(lengths), labelled)
    adapter = None if workload.method == "full" else _adapter_weights(job)
    return {
        "workload": asdict(workload),
        "documents": job.sha256,
        "expected": [{"tokens": step.tokens, "labelled": step.labelled} for step in job.expected],
        "reference": {"loss": reference.loss, "noise": reference.noise, "allowed": reference.allowed(options.dtype)},
        "gemm": rates,
        "flop_per_token": flop_per_token(config, shares, adapter),
        "rows": rows,
    }


def _adapter_weights(job: Job) -> int:
    from safetensors.torch import load_file

    assert job.adapter is not None
    return sum(weight.numel() for weight in load_file(job.adapter).values())


def pairs(options: argparse.Namespace, command: str) -> None:
    """W4: pairs have a harness and gates of their own, see :mod:`benchmarks.preference`."""
    kept = {"ours": preference.OURS, **{name: [name, f"{name}-fp32"] for name in ("trl-default", "trl-tuned")}}
    known = [one for name in options.peers.split(",") for one in kept.get(name, [])]
    left_out = [name for name in (*preference.OURS, *preference.PEERS["trl"]) if name not in known]
    arguments = ["--rounds", str(options.rounds), "--steps", str(options.steps), "--data"]
    arguments += [str(Path(options.data) / PAIRS), *(["--without", *left_out] if left_out else [])]
    preference.write(preference.parse([*arguments, *(["--no-write"] if options.no_write else [])]), command, "w4-cpu")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--workload", choices=[*WORKLOADS, "W4", "W5"], required=True)
    parser.add_argument("--peers", default="ours,trl-tuned", help="comma-separated: " + ", ".join(CONTENDERS))
    parser.add_argument("--data", default="../shared/data", help="folder of the real rows that the workloads name")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of each process, the first one uncounted")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of frozen weights")
    parser.add_argument("--rows", type=int, default=52_002, help="W5: rows that are prepared (Alpaca's number)")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.peers.split(",") if name not in CONTENDERS]
    if unknown:
        parser.error(f"no peer is called {unknown[0]}; there are {', '.join(CONTENDERS)}")
    if options.peers.split(",")[0] != OURS:
        parser.error("--peers begins with ours: what the others are compared with")
    if options.dtype == "auto":
        full = options.workload in WORKLOADS and WORKLOADS[options.workload].method == "full"
        # Full tuning in 16-bit weights loses its small updates: it is another training, and nobody is asked for it.
        chosen = torch.float32 if full else choose_compute_dtype(torch.bfloat16, CPU)
        options.dtype = str(chosen).removeprefix("torch.")
    return options


def main() -> None:
    """See the module's docstring."""
    options = parse()
    command = f"python -m benchmarks.run {' '.join(sys.argv[1:])}"
    torch.set_num_threads(usable_cores())
    if options.workload == "W4":
        pairs(options, command)
        return
    about = machine()
    found: dict[str, Any] = {"command": command, "machine": about, "dtype": options.dtype, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name:
        if options.workload == "W5":
            from benchmarks import chores

            text, figures = chores.compare(options, Path(name))
            text = f"`{command}`\n\n{describe(about)}.\n\n{text}"
            found |= figures
        else:
            found |= compare(options, Path(name))
            text = tables.markdown(found)
    print(text)
    if options.no_write:
        return
    stem = RESULTS / f"{options.workload.lower()}-cpu-{about['date']}"
    stem.with_suffix(".json").write_text(json.dumps(found, indent=1))
    stem.with_suffix(".md").write_text(text)
    if options.workload in WORKLOADS:
        tables.plot(found, stem.with_suffix(".png"))


if __name__ == "__main__":
    main()
