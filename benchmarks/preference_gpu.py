"""DPO at the shapes of a large LLaMA on one GPU: ours beside TRL's trainer, in one call. Not yet run on a GPU.

    python -m benchmarks.preference_gpu --shape llama-3-8b --lengths 512,256,256
    python -m benchmarks.preference_gpu --shape tiny --lengths 24,12,12 --rank 4 --device cpu    # to try it

Random weights in bfloat16 (a step's time does not depend on them), LoRA on all linear layers, the adapter switched off
as reference, pairs whose prompt, chosen and rejected answers have the lengths that are asked for. TRL stands by itself,
as DPOConfig has it (float32 weights under bf16 autocast, gradient checkpointing), and tuned, with and without
checkpointing. Every contender is a process of its own, so that memory is its own; what does not fit says so and its
row stays. Rates are medians over steps after warm-up. The first loss must be log 2: nobody has learnt anything yet.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.machine import RESULTS
from benchmarks.preference import FIRST_LOSS
from benchmarks.trl_dpo import COLUMNS
from llama_ft.data.ends import PairCollator, per_end
from llama_ft.data.render import MASKED
from llama_ft.llama.base import locate_base
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.hardware import usable_cores
from llama_ft.train.comparing import LAYOUT
from llama_ft.train.objectives.losses import dpo
from llama_ft.train.objectives.reference import without_adapter

OURS = ("ours", "ours, checkpointed")
TRL = ("trl-default", "trl-tuned", "trl-tuned-checkpointed")
BETA, LEARNING_RATE = 0.1, 1e-5
WARM_UP = 2


def write_pairs(options: argparse.Namespace, file: Path) -> None:
    """Random ids of the lengths asked for, a pair a line, for all steps."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = PRESETS[options.shape].config_dict(context=64)["vocab_size"]
    lengths = dict(zip(COLUMNS, options.lengths, strict=True))
    with file.open("w") as out:
        for _ in range(options.batch * (WARM_UP + options.steps)):
            pair = {
                name: torch.randint(vocabulary, (length,), generator=generator).tolist()
                for name, length in lengths.items()
            }
            out.write(json.dumps(pair) + "\n")


def document(pair: dict[str, list[int]]) -> dict[str, list[int]]:
    """A pair as our collator reads it."""
    prompt, masked = pair["prompt"], [MASKED] * len(pair["prompt"])
    return {
        "input_ids": prompt + pair["chosen"],
        "labels": masked + pair["chosen"],
        "rejected_ids": prompt + pair["rejected"],
        "rejected_labels": masked + pair["rejected"],
    }


def measure_ours(options: argparse.Namespace, pairs: Path) -> dict[str, Any]:
    """Our layout, model and loss, without the command around them: seconds and the loss of each step."""
    device = torch.device(options.device)
    built = argparse.Namespace(
        contender=options.contender, shape=options.shape, length=sum(options.lengths), rank=options.rank
    )
    model = gpu.build(built, device)
    optimizer = torch.optim.AdamW(
        [one for one in model.parameters() if one.requires_grad], lr=LEARNING_RATE, fused=True
    )
    rows = [document(json.loads(line)) for line in pairs.read_text().splitlines()]
    collate, steps = PairCollator(share=True), []

    def values(batch: dict[str, Any]) -> torch.Tensor:
        layout = {name: batch[name] for name in LAYOUT}
        return per_end(model(**layout, rows=batch["rows"], targets=batch["targets"]).log_probs, batch["ends"])

    for first in range(0, len(rows), options.batch):
        start, total = time.perf_counter(), 0.0
        for place in range(first, first + options.batch, options.micro_batch):
            batch = collate(rows[place : place + options.micro_batch])
            batch |= {name: batch[name].to(device) for name in ("input_ids", "position_ids", "rows", "targets")}
            with torch.no_grad(), without_adapter(model):
                reference = values(batch)
            ratios = values(batch) - reference
            loss = dpo(ratios[0::2] - ratios[1::2], "sigmoid", BETA).sum() / options.batch
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps.append({"seconds": time.perf_counter() - start, "loss": total})
    found: dict[str, Any] = {"steps": steps}
    if device.type == "cuda":
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    return found


def measure_trl(options: argparse.Namespace, pairs: Path, out: Path) -> dict[str, Any]:
    """TRL's own trainer at the same shape."""
    from benchmarks import trl_dpo

    spec = {
        **{"config": PRESETS[options.shape].config_dict(context=max(sum(options.lengths), 64))},
        **{
            "tokenizer": str(locate_base(options.tokenizer, weights=False)),
            "pairs": str(pairs),
            "adapter": None,
            "out": str(out),
        },
        **{"variant": options.contender, "steps": WARM_UP + options.steps, "batch": options.batch, "seed": 0},
        **{"micro_batch": options.micro_batch, "learning_rate": LEARNING_RATE, "beta": BETA, "device": options.device},
        **{"r": options.rank, "alpha": 2 * options.rank, "threads": usable_cores()},
    }
    trl_dpo.main(spec)
    return json.loads(out.read_text())


def summary(found: dict[str, Any], batch: int) -> dict[str, Any]:
    """Pairs a second over the steps behind the warm-up, the first loss, and memory in GiB."""
    seconds = statistics.median(step["seconds"] for step in found["steps"][WARM_UP:])
    memory: dict[str, Any] = {name: found[name] / 2**30 for name in ("allocated", "reserved") if name in found}
    return {"pairs_per_second": batch / seconds, "loss": found["steps"][0]["loss"], **memory}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; every row beside the fastest of ours."""
    ours = max((rows[name].get("pairs_per_second", 0.0) for name in OURS if name in rows), default=0.0)
    lines = ["| | pairs/s | best of ours / this | allocated / reserved GiB | first loss |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} | | | |")
            continue
        memory = f"{row['allocated']:.1f} / {row['reserved']:.1f}" if "allocated" in row else "–"
        rate = row["pairs_per_second"]
        lines.append(f"| {name} | {rate:.3f} | {ours / rate:.2f}× | {memory} | {row['loss']:.6f} |")
    return "\n".join(lines)


def run(name: str, options: argparse.Namespace, arguments: list[str], folder: Path) -> dict[str, Any]:
    """One contender in a process of its own; `error` where it did not come through, or learnt before it began."""
    out = folder / "found.json"
    out.unlink(missing_ok=True)
    flags = [*arguments, "--contender", name, "--pairs", str(folder / "pairs.jsonl"), "--found", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.preference_gpu", *flags], check=False, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": "out of memory" if "OutOfMemory" in done.stderr else last[:120]}
    row = summary(json.loads(out.read_text()), options.batch)
    if abs(row["loss"] - math.log(2)) > FIRST_LOSS:
        return {"error": f"the first loss is {row['loss']}, not log 2"}
    return row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring. SystemExit for a GPU that is not there."""
    parser = argparse.ArgumentParser(prog="benchmarks.preference_gpu")
    parser.add_argument("--shape", default="llama-3-8b", choices=sorted(PRESETS), metavar="PRESET")
    parser.add_argument("--lengths", default="512,256,256", help="tokens of prompt, chosen and rejected answer")
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs a pass; trl-default takes its own eight")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help=f"behind {WARM_UP} that warm up")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="whose padding TRL takes: a name or a folder")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--contenders", default="; ".join((*OURS, *TRL)), help="separated by semicolons")
    parser.add_argument("--no-write", action="store_true", help="print only")
    for hidden in ("--contender", "--pairs", "--found"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.lengths = [int(length) for length in options.lengths.split(",")]
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu with --shape tiny tries the benchmark itself")
    return options


def main() -> None:
    """See the module's docstring."""
    options = parse()
    if options.contender:
        pairs, out = Path(options.pairs), Path(options.found)
        ours = options.contender in OURS
        found = measure_ours(options, pairs) if ours else measure_trl(options, pairs, out)
        out.write_text(json.dumps(found))
        return
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write_pairs(options, folder / "pairs.jsonl")
        for name in options.contenders.split("; "):
            rows[name] = run(name, options, sys.argv[1:], folder)
            print(name, rows[name], file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    work = f"{options.batch} pairs of {' + '.join(map(str, options.lengths))} tokens a step"
    text = (
        f"`python -m benchmarks.preference_gpu {' '.join(sys.argv[1:])}`\n\n{device}, torch {torch.__version__}; "
        f"{time.strftime('%Y-%m-%d')}. {options.shape}, {work}.\n\n{table(rows)}\n"
    )
    print(text)
    if not options.no_write:
        stem = f"preference-{options.shape}-{device.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}"
        Path(RESULTS / f"{stem}.md").write_text(text)
        Path(RESULTS / f"{stem}.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
