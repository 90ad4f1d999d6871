"""One process of `benchmarks.gpu_run`: the preparation, or one contender's run. Not meant to be started by hand.

    python -m benchmarks.gpu_work W1 ours --work FOLDER --name W1-ours-1 --shape llama-3-8b --device cuda …

A run imports what it will need, waits for FOLDER/NAME.gate, trains through its harness in benchmarks.peers and writes
FOLDER/NAME.json. The preparation (W0) writes FOLDER/model, the adapter's first weights and the documents, and answers
with the rate of matrix products and the loss and gradients of the first steps in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.gpu_data import (
    CONTEXT,
    LINEAR,
    LORA_RANK,
    PAIR,
    WORKLOADS,
    reference,
    shape_of,
    small,
    tensors,
    write_adapter,
    write_documents,
    write_model,
)
from benchmarks.peers.common import MASKED, Clock, Spec
from llama_ft.llama.shapes import PRESETS

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "liger_kernel", "unsloth", "triton")

IMPORTS = {"ours_gpu": ("transformers", "peft", "llama_ft.adapters.lora"), "hf": ("transformers", "peft")}
IMPORTS["trl"] = ("transformers", "peft", "trl", "datasets")
"""What a harness will import, and may as well before its gate opens."""


def prepare(options: argparse.Namespace) -> None:
    """See the module's docstring. What is found first is written first, in case the rest does not come through."""
    import torch

    from benchmarks.model import Gemm, Shares, flop_per_token

    work, shape, begun = Path(options.work), shape_of(options), time.monotonic()
    write_model(shape, work / "model", options.device)
    write_adapter(shape, work / "adapter.safetensors")
    asked = [name for name in options.workloads.split(",") if name != "W4"]  # whose pairs are its own
    specs = {name: write_documents(options, name, shape) for name in asked}
    (work / "ready").touch()
    found: dict[str, Any] = {"write_seconds": time.monotonic() - begun, "python": sys.version.split()[0]}
    found["device"] = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    found["versions"] = versions()

    from transformers import LlamaConfig

    config = LlamaConfig(**shape.config_dict(context=CONTEXT))
    adapter = sum(LORA_RANK * sum(size) for name, size in tensors(shape) if name.split(".")[-2] in LINEAR)
    for name, spec in specs.items():
        documents = [document for row in spec.rows() for document in row]
        lengths = [len(document["input_ids"]) for document in documents]
        labelled = sum(label != MASKED for document in documents for label in document["labels"][1:]) / sum(lengths)
        mean = sum(length**2 for length in lengths) / sum(lengths)
        flop = flop_per_token(config, Shares(mean_length=mean, labelled=labelled), adapter)
        found[name] = {"flop_per_token": flop, "mean_length": mean, "labelled": labelled, "tokens": sum(lengths)}
    tokens = 4096 // small(options)
    dtype = getattr(torch, options.dtype)
    gemm = Gemm(config, tokens, tokens // 2, dtype, copies=1, device=torch.device(options.device))
    rates = sorted(gemm.rate() for _ in range(6))
    found["gemm_flops"] = rates[len(rates) // 2]
    del gemm
    (work / "prepared.json").write_text(json.dumps(found))
    for name in (name for name in ("W1", "W2") if name in asked):
        if options.device == "cuda":
            torch.cuda.empty_cache()
        found[name]["loss"] = reference(specs[name], work / f"{name}-reference.safetensors")
        (work / "prepared.json").write_text(json.dumps(found))
    print(json.dumps(found), time.monotonic() - begun, "seconds")


def versions() -> dict[str, str]:
    """Of the libraries that this process can import."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Saving(Clock):
    """A clock whose answer is there after every step: the last step of W6 ends its process."""

    def end_step(self, loss: float | None = None) -> None:
        super().end_step(loss)
        if self.spec.contender.endswith("-checkpointed"):
            self.write()


def harness(contender: str) -> str:
    """The module of a contender. SystemExit where there is none."""
    from benchmarks.gpu_run import MODULES

    name = f"benchmarks.peers.{MODULES.get(contender.partition('-')[0], contender)}"
    if find_spec(name) is None:
        raise SystemExit(f"there is no {name} here")
    return name


def wait(options: argparse.Namespace) -> None:
    """Until the run before this one has ended."""
    gate = Path(options.work) / f"{options.name}.gate"
    while not gate.exists():
        time.sleep(0.05)


def preferences(options: argparse.Namespace) -> None:
    """W4: benchmarks.preference_gpu's two sides, without its process around them."""
    from benchmarks import preference_gpu
    from benchmarks.peers.ours_gpu import fit_varlen

    about, work = WORKLOADS["W4"], Path(options.work)
    PRESETS[options.shape] = shape_of(options)
    fit_varlen()
    flags = ["--shape", options.shape, "--lengths", ",".join(str(length // small(options)) for length in PAIR)]
    flags += ["--batch", str(about.micro_batch * about.accumulation), "--micro-batch", str(about.micro_batch)]
    flags += ["--rank", str(LORA_RANK), "--steps", "5", "--device", options.device, "--tokenizer", str(work / "model")]
    wait(options)
    asked = preference_gpu.parse([*flags, "--contender", options.contender])
    pairs, out = work / "pairs.jsonl", work / f"{options.name}.json"
    preference_gpu.write_pairs(asked, pairs)
    if options.contender in preference_gpu.OURS:
        found = preference_gpu.measure_ours(asked, pairs)
    else:
        found = preference_gpu.measure_trl(asked, pairs, out)
    out.write_text(json.dumps(found | {"versions": versions()}))


def train(options: argparse.Namespace) -> None:
    """One contender's run, behind its gate."""
    work = Path(options.work)
    name = harness(options.contender)
    import torch

    module: Any = importlib.import_module(name)
    if hasattr(module, "library") and options.device == "cuda":
        module.library()  # Unsloth, which has to be imported before what it changes
    elif not hasattr(module, "library"):
        for library in IMPORTS.get(name.rpartition(".")[2], ()):
            importlib.import_module(library)
    if options.contender == "trl-checkpointed":
        module.VARIANTS.setdefault(options.contender, module.TUNED | {"gradient_checkpointing": True})
    wait(options)
    spec = Spec.read(work / f"{options.workload}.spec.json")
    spec.contender, spec.out = options.contender, str(work / f"{options.name}.json")
    spec.gradients = str(work / f"{options.name}.safetensors") if options.gradients else None
    torch.set_num_threads(spec.threads)
    if options.workload == "W6" and spec.device == "cuda":
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * 2**30 / whole))
    clock = Saving(spec)
    clock.about["versions"] = versions()
    try:
        module.run(spec, clock)
        clock.about["stopped"] = "all that were asked for"
    except torch.OutOfMemoryError as error:
        clock.about["stopped"] = "out of memory"
        print(error)
        if options.workload != "W6":
            clock.about["reason"] = "out of memory"
        elif not clock.steps:
            clock.about["reason"] = "out of memory at the first document"
    except SystemExit as error:
        clock.about["reason"] = str(error)
    clock.write()


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_work")
    parser.add_argument("workload")
    parser.add_argument("contender")
    for flag in ("--work", "--name", "--shape", "--device", "--dtype"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--memory-gib", type=float, default=24)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--gradients", action="store_true")
    options = parser.parse_args()
    if options.workload == "W0":
        prepare(options)
    elif options.workload == "W4":
        preferences(options)
    else:
        train(options)


if __name__ == "__main__":
    main()
