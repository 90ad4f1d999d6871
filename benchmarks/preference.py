"""DPO by our training command beside TRL's trainer: the same pairs in the same order, the same first weights, one run.

    python -m benchmarks.preference --peers trl --data hh_rlhf_harmless_test.jsonl.gz

LoRA of rank 16 on all linear layers of SmolLM2-135M. Every contender is a process of its own; they take turns (A B C …
A B C …). A step holds pairs of like length, as transformers' `group_by_length` draws them from a large set: in random
order half of what TRL computes would be padding. The counted steps are spread over all lengths; the first step holds
the longest pairs: it warms up, is not counted, and shows the peak memory. Nothing is printed or written of a run whose
ids, losses or gradients are not the others'. Writes JSON and Markdown to `benchmarks/results/`. Shapes of a large model
on a GPU: `benchmarks.preference_gpu`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.machine import RESULTS, describe, machine, measured
from benchmarks.pairs import Step, bfloat16_noise, choose_rows, expected_steps, write_pairs
from benchmarks.trl_dpo import VARIANTS
from llama_ft import load_recipe, prepare_data
from llama_ft.data.prepare import Prepared
from llama_ft.llama.base import locate_base
from llama_ft.plan.hardware import usable_cores
from llama_ft.recipe import Recipe
from llama_ft.recipe.run import Run
from llama_ft.train.base import open_base
from llama_ft.train.load import load_for_training

RECIPE = "zephyr/smollm2-135m-dpo"
OURS: dict[str, list[str]] = {
    "llama_ft": ["model.dtype=float32"],
    "llama_ft-bf16": ["model.dtype=bfloat16", "--compute-dtype", "bfloat16"],
}
"""Ours, and what each changes of the recipe."""
PEERS = {"trl": ["trl-default", "trl-tuned", "trl-tuned-fp32"]}
REFERENCE = "trl-tuned-fp32"
TYPES = {
    "llama_ft": "float32",
    "llama_ft-bf16": "bfloat16",
    "trl-default": "bfloat16",  # under autocast
    "trl-tuned": "bfloat16",
    "trl-tuned-fp32": "float32",
}
"""What each multiplies in."""
ALIKE = {"llama_ft": "trl-tuned-fp32", "llama_ft-bf16": "trl-tuned"}
"""Weights of the same type on both sides."""
FIRST_LOSS = 1e-5
"""How far the first loss may be from log 2, which it is before anything was learnt."""
CURVE = 1e-4
"""How far a step's loss may be from the float32 reference's, in float32."""
DEVIATIONS = 4.0
"""The same in bfloat16, in standard deviations of what rounding alone does to it; see :func:`limits_of`."""
GRADIENT = {"float32": 1e-3, "bfloat16": 5e-2}
"""How far the norm of the first step's gradient may be from the reference's, relative."""
Limits = dict[str, list[float]]


def overrides_of(options: argparse.Namespace, rows: Path, limit: int | None) -> list[str]:
    """The recipe as the benchmark runs it: no evaluation, no export, the full rate from the first step on."""
    return [
        "data=" + json.dumps([{"path": str(rows), "layout": "preference", "limit": limit}]),
        f"training.max_steps={options.steps}",
        f"training.global_batch={options.batch}",
        f"training.micro_batch={options.micro_batch}",
        "training.warmup=0.0",
        "eval_data=null",
        "export.merged=false",
        "tracking=[]",
        *options.override,
    ]


def write_adapter(recipe: Recipe, prepared: Prepared, folder: Path) -> Path:
    """The weights that our run's adapter starts with, under PEFT's names."""
    base = open_base(recipe, Run(folder), prepared.tokenizer)
    model: Any = load_for_training(base, torch.device("cpu"), "float32").model
    weights = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / "adapter.safetensors")
    return folder / "adapter.safetensors"


def run_ours(name: str, recipe: Recipe, overrides: list[str], folder: Path) -> dict[str, Any]:
    """The real command, as a user types it."""
    run = folder / "run"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"]
    launch += ["--config_file", str(recipe.launch), "-m", "llama_ft.train", RECIPE, *overrides, *OURS[name]]
    seconds, rss = measured([*launch, f"output_dir={run}", "--overwrite"], folder)
    return {"steps": steps_of(run), "seconds": seconds, "rss": rss}


def steps_of(run: Path) -> list[Step]:
    """What a run of ours wrote of each step."""
    steps: list[Step] = []
    tokens = labelled = 0
    for record in (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" in record:
            kept = {key: record[key] for key in ("seconds", "loss", "grad_norm")}
            computed = record["tokens"] - tokens
            steps.append({**kept, "computed": computed, "labelled": record["labelled_tokens"] - labelled})
            tokens, labelled = record["tokens"], record["labelled_tokens"]
    return steps


def spec_of(variant: str, recipe: Recipe, pairs: Path, adapter: Path, folder: Path) -> dict[str, Any]:
    """What `benchmarks.trl_dpo` is told of the recipe."""
    training, base = recipe.training, str(locate_base(recipe.model.base))
    return {
        **{"model": base, "tokenizer": base, "pairs": str(pairs), "adapter": str(adapter), "variant": variant},
        **{"steps": training.max_steps, "batch": training.global_batch, "micro_batch": training.micro_batch},
        **{"learning_rate": training.learning_rate, "beta": recipe.preference.beta, "seed": training.seed},
        **{"r": recipe.adapter.r, "alpha": recipe.adapter.alpha, "threads": usable_cores(), "device": "cpu"},
        "out": str(folder / "out.json"),
    }


def run_trl(spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One TRL variant over the same pairs."""
    (folder / "spec.json").write_text(json.dumps(spec))
    seconds, rss = measured([sys.executable, "-m", "benchmarks.trl_dpo", str(folder / "spec.json")], folder)
    return {**json.loads(Path(spec["out"]).read_text()), "seconds": seconds, "rss": rss}


def same_order(name: str) -> bool:
    """Whether a contender takes the pairs as they come; of others only the first step can be compared."""
    return not VARIANTS.get(name, {}).get("shuffled", False)


def losses_apart(name: str, steps: list[Step], reference: list[Step]) -> list[float]:
    """How far each loss that can be compared is from the reference's."""
    compared = zip(steps, reference, strict=True) if same_order(name) else [(steps[0], reference[0])]
    return [abs(one["loss"] - other["loss"]) for one, other in compared]


def gradient_apart(steps: list[Step], reference: list[Step]) -> float:
    """How far the first gradient's norm is from the reference's, relative."""
    return abs(steps[0]["grad_norm"] / reference[0]["grad_norm"] - 1)


def limits_of(expected: list[Step], batch: int, beta: float, noise: float) -> Limits:
    """How far each step's loss may be from the float32 reference's, by the type that is computed in.

    noise: standard deviation, in nats, of what bfloat16 does to a token's log-probability. Policy and reference round
    apart from one another as soon as the adapter is not zero, so a margin's mean over `batch` pairs with T labelled
    tokens in all has the deviation noise · √(2T) / batch. The loss has β / 2 of that, which is its slope at log 2.
    """
    rounded = [beta / 2 * noise * math.sqrt(2 * step["labelled"]) / batch for step in expected]
    return {"float32": [CURVE] * len(expected), "bfloat16": [DEVIATIONS * one for one in rounded]}


def faults(name: str, steps: list[Step], expected: list[Step], reference: list[Step], limits: Limits) -> list[str]:
    """The gates that a run does not pass, in words: its row would not be honest."""
    if len(steps) != len(expected):
        return [f"{name} took {len(steps)} steps of {len(expected)}"]
    found = []
    if abs(steps[0]["loss"] - math.log(2)) > FIRST_LOSS:
        found.append(f"{name}: the first loss is {steps[0]['loss']}, not log 2")
    for number, (one, other) in enumerate(zip(steps, expected, strict=True), 1):
        if number > 1 and not same_order(name):
            break
        if one["labelled"] != other["labelled"]:
            found.append(f"{name}: {one['labelled']} labelled tokens in step {number}, not {other['labelled']}")
        if "rows" in one and sorted(one["rows"]) != other["rows"]:
            found.append(f"{name}: other ids in step {number}")
    everything = sorted(row for other in expected for row in other["rows"])
    if "rows" in steps[0] and sorted(row for one in steps for row in one["rows"]) != everything:
        found.append(f"{name}: other ids in all")
    gradient = gradient_apart(steps, reference)
    for number, (apart, limit) in enumerate(
        zip(losses_apart(name, steps, reference), limits[TYPES[name]], strict=False), 1
    ):
        if apart > limit:
            found.append(f"{name}: the loss of step {number} is {apart:.1e} from the reference's, allowed {limit:.1e}")
    if gradient > GRADIENT[TYPES[name]]:
        found.append(f"{name}: the first gradient's norm is {gradient:.1e} from the reference's")
    return found


def check(round_: dict[str, list[Step]], expected: list[Step], reference: list[Step], limits: Limits) -> None:
    """Ends the benchmark after a round that does not pass the gates."""
    broken = [fault for name, steps in round_.items() for fault in faults(name, steps, expected, reference, limits)]
    if broken:
        raise SystemExit("\n".join(["the rows would not be honest:", *broken]))


def summary(name: str, runs: list[dict[str, Any]], batch: int, reference: list[Step]) -> dict[str, Any]:
    """Medians over rounds of pairs/s (all steps but the first of each), their spread, and the largest peak."""
    counted = [run["steps"][1:] for run in runs]
    rates = [batch * len(steps) / sum(step["seconds"] for step in steps) for steps in counted]
    return {
        "type": TYPES[name],
        "pairs_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "tokens_per_pair": sum(step["computed"] for step in counted[0]) / (batch * len(counted[0])),
        "rss_gib": max(run["rss"] for run in runs),
        "warm_up_seconds": statistics.median(run["steps"][0]["seconds"] for run in runs),
        "losses": [step["loss"] for step in runs[0]["steps"]],
        "loss_gap": max(max(losses_apart(name, run["steps"], reference)) for run in runs) if same_order(name) else None,
        "gradient_gap": max(gradient_apart(run["steps"], reference) for run in runs),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: rates, ratio of ours to each, peak memory, and what is apart from the float32 reference."""
    ours = rows["llama_ft"]
    lines = [
        "| | pairs/s (min–max) | ours / this | tokens computed a pair | peak RSS, GiB | ours / this "
        "| max \\|Δ loss\\| | Δ first gradient's norm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        gap = "other order" if row["loss_gap"] is None else f"{row['loss_gap']:.1e}"
        lines.append(
            f"| {name} | {row['pairs_per_second']:.3f} ({row['spread'][0]:.3f}–{row['spread'][1]:.3f}) "
            f"| {ours['pairs_per_second'] / row['pairs_per_second']:.2f}× | {row['tokens_per_pair']:.0f} "
            f"| {row['rss_gib']:.2f} | {ours['rss_gib'] / row['rss_gib']:.2f} | {gap} | {row['gradient_gap']:.1e} |"
        )
    alike = [
        f"{rows[own]['pairs_per_second'] / rows[peer]['pairs_per_second']:.2f}× the pairs of {peer} at "
        f"{rows[own]['rss_gib'] / rows[peer]['rss_gib']:.2f} of its memory ({own})"
        for own, peer in ALIKE.items()
        if own in rows and peer in rows
    ]
    return "\n".join([*lines, "", f"With weights of the same type: {'; '.join(alike)}."])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.preference")
    parser.add_argument("--peers", default="trl", help="comma-separated; known: " + ", ".join(PEERS))
    parser.add_argument("--data", default="../shared/data/preference/hh_rlhf_harmless_test.jsonl.gz", help="pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per process, the first one uncounted")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs a pass; trl-default takes its own eight")
    parser.add_argument("--pool", type=int, default=384, help="rows that the steps are drawn from")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="for the recipe")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args(arguments)


def compare(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Runs ours and the peers in turn. Returns the Markdown and everything measured; SystemExit where a gate fails."""
    peers = [variant for peer in options.peers.split(",") if peer for variant in PEERS[peer]]
    contenders = [name for name in (*OURS, *peers) if name not in options.without]
    if not {"llama_ft", REFERENCE} <= {*contenders}:
        raise SystemExit(f"nothing is compared without llama_ft and {REFERENCE}, which says what is right")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = load_recipe(RECIPE, overrides_of(options, Path(options.data).resolve(), options.pool))
        overrides = overrides_of(options, choose_rows(pool, folder), None)
        recipe = load_recipe(RECIPE, overrides)
        prepared = prepare_data(recipe)
        pairs, adapter = write_pairs(prepared, folder), write_adapter(recipe, prepared, folder)
        found, expected = sha256(pairs.read_bytes()).hexdigest(), expected_steps(pairs, options.batch)
        noise = bfloat16_noise(locate_base(recipe.model.base), pairs)
        limits = limits_of(expected, options.batch, float(recipe.preference.beta), noise)
        for number in range(1, options.rounds + 1):
            for contender in contenders:
                if contender in OURS:
                    result = run_ours(contender, recipe, overrides, folder)
                else:
                    result = run_trl(spec_of(contender, recipe, pairs, adapter, folder), folder)
                runs[contender].append(result)
                rate = options.batch * (options.steps - 1) / sum(step["seconds"] for step in result["steps"][1:])
                line = f"round {number} {contender}: {rate:.3f} pairs/s, {result['rss']:.2f} GiB"
                print(line, file=sys.stderr, flush=True)
            reference = runs[REFERENCE][0]["steps"]
            check({own: done[-1]["steps"] for own, done in runs.items()}, expected, reference, limits)
    rows = {own: summary(own, done, options.batch, reference) for own, done in runs.items()}
    text = (
        f"DPO, LoRA, {options.rounds} rounds in turn, each contender a process of its own; {options.steps} steps of "
        f"{options.batch} pairs of like length, the first one uncounted and of the longest; pairs sha256 {found[:12]}. "
        f"bfloat16 moves a token's log-probability by {noise:.3f} nats (standard deviation, transformers' LLaMA), and "
        f"losses may be {DEVIATIONS:g} times what follows from that apart: at most {max(limits['bfloat16']):.3f}."
        f"\n\n{table(rows)}\n"
    )
    return text, {"pairs": found, "noise": noise, "limits": limits, "rows": rows, "runs": runs}


def write(options: argparse.Namespace, command: str, stem: str) -> None:
    """Compares, prints the table, and unless asked not to, writes it with everything measured to `results/`."""
    about = machine()
    text, data = compare(options)
    text = f"`{command}`\n\n{describe(about)}.\n\n{text}"
    print(text)
    if not options.no_write:
        file = RESULTS / f"{stem}-{about['date']}"
        file.with_suffix(".md").write_text(text)
        file.with_suffix(".json").write_text(json.dumps({"machine": about, **data}, indent=1))


def main() -> None:
    """See the module's docstring."""
    write(parse(), f"python -m benchmarks.preference {' '.join(sys.argv[1:])}", "preference-cpu")


if __name__ == "__main__":
    main()
