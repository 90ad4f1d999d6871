"""Merging an adapter into a large model: peak memory and speed, beside PEFT's merge and a plain copy, in one run.

    python -m benchmarks.merge --shape llama-2-7b --folder BIG_DISK

Writes random weights of a preset's shape in bfloat16 shards and an adapter of rank 16 on all linear layers, with other
factors for each layer. Then, in turn: a copy of the shards (with fsync: what the disk can do), our merge, PEFT's
`merge_and_unload` with transformers' save, each in a process of its own. What ours writes must be what PEFT's does, but
for one rounding. Writes JSON and Markdown to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.machine import RESULTS, describe, machine, measured
from llama_ft.adapters.rows import row_parts, stored_rows
from llama_ft.files import flush_to_disk, write_json, write_text
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, stored_tensors, write_model
from llama_ft.llama.init import weight_shapes
from llama_ft.llama.shapes import PRESETS

R, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONTENDERS = ("copy", "ours", "peft")
ROUNDED = 2**-7
"""Largest relative difference of a bfloat16 value that was rounded twice (PEFT: s·B·A and the sum) from once."""


def make_base(folder: Path, shape: str) -> Path:
    """A model folder with random weights, unless it is there. Returns it."""
    base = folder / "base"
    if (base / "config.json").exists():
        return base
    config = LlamaConfig.from_dict(PRESETS[shape].config_dict())
    base.mkdir(parents=True, exist_ok=True)
    shapes = weight_shapes(config)

    def weights() -> Iterator[tuple[str, Tensor]]:
        for number, (name, size) in enumerate(shapes.items()):
            torch.manual_seed(number)
            for rows in row_parts(size):
                part = torch.empty(rows.stop - rows.start, *size[1:])
                yield name, (torch.ones_like(part) if name.endswith("norm.weight") else part.uniform_(-0.04, 0.04))

    write_model(base, shapes, torch.bfloat16, weights(), SHARD_BYTES)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    return base


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter in PEFT's layout with random factors for every linear layer of the base."""
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    torch.manual_seed(7)
    factors = {}
    for name, entry in stored_tensors(base).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS:
            out, into = entry.shape
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(R, into) / into**0.5
            factors[f"base_model.model.{module}.lora_B.weight"] = 0.02 * torch.randn(out, R)
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    said = {"r": R, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "peft_type": "LORA", "bias": "none"}
    write_json(adapter / "adapter_config.json", said | {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)})
    return adapter


def copy(base: Path, out: Path) -> None:
    """The shards, byte by byte, on the disk when it returns."""
    out.mkdir()
    for file in base.glob("*.safetensors*"):
        shutil.copyfile(file, out / file.name)
        flush_to_disk(out / file.name)


def merge_ours(base: Path, adapter: Path, out: Path) -> None:
    """As `llama-ft export` merges."""
    from llama_ft.adapters.lora_file import read_lora
    from llama_ft.adapters.merge import merge_adapter

    merge_adapter(base, read_lora(adapter), out, base_dtype=torch.bfloat16, dtype=torch.bfloat16)


def merge_peft(base: Path, adapter: Path, out: Path) -> None:
    """As PEFT's documentation merges."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="5GB")
    for file in out.iterdir():
        flush_to_disk(file)


def one(name: str, folder: Path) -> None:
    """What a child process does; the seconds of the work itself go to a file."""
    base, adapter, out = folder / "base", folder / "adapter", folder / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    began = time.perf_counter()
    if name == "copy":
        copy(base, out)
    else:
        (merge_ours if name == "ours" else merge_peft)(base, adapter, out)
    write_json(folder / f"{name}.json", {"seconds": time.perf_counter() - began})


def largest_difference(ours: Path, theirs: Path, every: int = 5) -> float:
    """Largest difference of every fifth tensor, relative to the larger of |value| and the tensor's mean |value|."""
    left, right = stored_tensors(ours), stored_tensors(theirs)
    if left.keys() != right.keys():
        raise SystemExit(f"other tensors: {sorted(left.keys() ^ right.keys())[:3]}")
    worst = 0.0
    for name in sorted(left)[::every]:
        for rows in row_parts(left[name].shape):
            a, b = stored_rows(name, left[name], rows).float(), stored_rows(name, right[name], rows).float()
            worst = max(worst, ((a - b).abs() / a.abs().clamp(min=float(a.abs().mean()))).max().item())
    return worst


def changed(base: Path, merged: Path) -> bool:
    """Whether the adapter moved what it sits on, and nothing else."""
    left, right = stored_tensors(base), stored_tensors(merged)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"):
        rows = row_parts(left[name].shape)[0]
        same = torch.equal(stored_rows(name, left[name], rows), stored_rows(name, right[name], rows))
        if same is (TARGETS[0] in name):
            return False
    return True


def compare(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Runs all in turn. Returns the Markdown and what was measured; SystemExit where the merges differ."""
    folder = options.folder / f"merge-{options.shape}"
    base = make_base(folder, options.shape)
    make_adapter(base, folder)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(1, options.rounds + 1):
        for name in CONTENDERS:
            _, rss = measured(
                [sys.executable, "-m", "benchmarks.merge", "--one", name, "--folder", str(folder)], folder
            )
            seconds = json.loads((folder / f"{name}.json").read_text())["seconds"]
            runs[name].append({"seconds": seconds, "rss": rss})
            print(f"round {number} {name}: {seconds:.1f} s, {rss:.2f} GiB", file=sys.stderr, flush=True)
            shutil.rmtree(folder / "out-copy", ignore_errors=True)
        apart = largest_difference(folder / "out-ours", folder / "out-peft")
        if apart > ROUNDED or not changed(base, folder / "out-ours"):
            raise SystemExit(f"what was merged is not the same: {apart:.2e}")
        for name in ("ours", "peft"):
            shutil.rmtree(folder / f"out-{name}")
    if not options.keep:
        shutil.rmtree(folder)
    rows = {
        name: {
            "seconds": statistics.median(run["seconds"] for run in done),
            "spread": [min(run["seconds"] for run in done), max(run["seconds"] for run in done)],
            "gb_per_second": size / 1e9 / statistics.median(run["seconds"] for run in done),
            "rss_gib": max(run["rss"] for run in done),
        }
        for name, done in runs.items()
    }
    ours = rows["ours"]
    lines = ["| | s (min–max) | GB/s written | speed, ours / this | peak RSS, GiB |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['seconds']:.1f} ({row['spread'][0]:.1f}–{row['spread'][1]:.1f}) "
            f"| {row['gb_per_second']:.2f} | {row['seconds'] / ours['seconds']:.2f}× | {row['rss_gib']:.2f} |"
        )
    text = (
        f"{options.shape} in bfloat16, {size / 1e9:.1f} GB in shards, LoRA of rank {R} on all linear layers, "
        f"{options.rounds} rounds in turn; ours and PEFT's weights at most {apart:.1e} apart (rounded once, and twice)."
    )
    return f"{text}\n\n{chr(10).join(lines)}\n", {"bytes": size, "rows": rows, "runs": runs, "apart": apart}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.merge")
    parser.add_argument(
        "--shape",
        default="llama-2-7b",
        choices=sorted(PRESETS),
        metavar="NAME",
        help="a preset's name: llama-ft models",
    )
    parser.add_argument("--folder", type=Path, required=True, help="where three times the model's bytes are free")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="leave base and adapter there")
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.folder = options.folder.absolute()
    return options


def main() -> None:
    """See the module's docstring."""
    options = parse()
    if options.one:
        one(options.one, options.folder)
        return
    about = machine()
    text, data = compare(options)
    text = f"`python -m benchmarks.merge --shape {options.shape}`\n\n{describe(about)}.\n\n{text}"
    print(text)
    if not options.no_write:
        stem = f"merge-{options.shape}-{about['date']}"
        write_text(RESULTS / f"{stem}.md", text)
        write_json(RESULTS / f"{stem}.json", {"machine": about, **data})


if __name__ == "__main__":
    main()
