"""Shapes of a real LLaMA on one GPU: ours, path by path, beside transformers + PEFT, in one call of a few minutes.

    python -m benchmarks.gpu --shape llama-3-8b --lengths 2048,8192
    python -m benchmarks.gpu --shape tiny --lengths 64 --device cpu --rank 4     # the same on a CPU, to try it

Random weights in bfloat16 (a step's time does not depend on them), LoRA on all linear layers, one full document of each
length per row, 8,192 tokens a step, the second half of every document labelled. Every contender is a process of its
own, so that memory is its own; what does not fit says so and its row stays. Rates are medians over steps after warm-up;
the limit is the rate of matrix products of the model's own shapes, timed in each process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS

CONTENDERS = (
    "ours",
    "ours, compiled norms",
    "ours, flex",
    "ours, selective",
    "ours, checkpointed",
    "hf",
    "hf, checkpointed",
)
STEP_TOKENS = 8192
WARM_UP = 3


def build(options: argparse.Namespace, device: torch.device) -> Any:
    """The contender's model, adapter attached, on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig
    from transformers import LlamaForCausalLM as Reference

    from llama_ft.adapters.lora import attach_lora
    from llama_ft.llama.fast import Fast
    from llama_ft.llama.model import LlamaForCausalLM
    from llama_ft.llama.shapes import PRESETS
    from llama_ft.recipe.schema import Adapter

    name, ours = options.contender, options.contender.startswith("ours")
    config = LlamaConfig(**PRESETS[options.shape].config_dict(context=max(options.length, 64)))
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = (LlamaForCausalLM if ours else Reference)(config)
    torch.set_default_dtype(default)
    if ours:
        model = attach_lora(model, Adapter(r=options.rank, alpha=2 * options.rank))
        fast = Fast(
            attention="flex" if "flex" in name else "auto",
            elementwise="compiled" if "compiled" in name else "saving",
        )
        model.get_base_model().model.set_fast(fast)
        model.get_base_model().model.checkpoint_every = 2 if "selective" in name else 1
    else:
        settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "target_modules": "all-linear"}
        model.config.use_cache = False
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings), autocast_adapter_dtype=False)
    if "checkpointed" in name or "selective" in name:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One contender at one length: tokens/s, the machine's rate, peak memory."""
    from benchmarks.model import Gemm, Shares, flop_per_token

    device = torch.device(options.device)
    model = build(options, device)
    config = model.config
    rows = max(1, STEP_TOKENS // options.length)
    ids = torch.randint(0, config.vocab_size, (rows, options.length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : options.length // 2] = -100
    batch: dict[str, Any] = {"input_ids": ids.to(device), "labels": labels.to(device)}
    tokens = ids.numel()
    if options.contender.startswith("ours"):
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        batch["cu_seqlens"] = list(range(0, tokens + 1, options.length))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds, losses = [], []
    for _ in range(WARM_UP + options.steps):
        start = wait()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(wait() - start)
        losses.append(loss.item())
    found: dict[str, Any] = {"tokens_per_second": tokens / statistics.median(seconds[WARM_UP:]), "loss": losses[0]}
    if device.type == "cuda":
        found["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    optimizer.zero_grad()
    del model, loss
    if device.type == "cuda":
        torch.cuda.empty_cache()
    gemm = Gemm(config, tokens, tokens // 2, torch.bfloat16, copies=1, device=device)
    rates = [gemm.rate() for _ in range(4)][1:]
    shares = Shares(mean_length=options.length, labelled=0.5)
    flop = flop_per_token(config, shares, sum(parameter.numel() for parameter in trained))
    found["gemm_tflops"] = statistics.median(rates) / 1e12
    found["fraction"] = flop * found["tokens_per_second"] / statistics.median(rates)
    return found


def table(rows: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Markdown, one block per length."""
    lines = []
    for length, contenders in rows.items():
        lines += [f"**documents of {length} tokens**", ""]
        lines += ["| | tokens/s | fraction of GEMM | allocated / reserved GiB | first loss |", "|---|---|---|---|---|"]
        for name, row in contenders.items():
            if "error" in row:
                lines.append(f"| {name} | {row['error']} | | | |")
                continue
            memory = f"{row['allocated_gib']:.1f} / {row['reserved_gib']:.1f}" if "allocated_gib" in row else "–"
            rate = f"{row['tokens_per_second']:,.0f} | {row['fraction']:.0%} of {row['gemm_tflops']:.1f} TFLOP/s"
            lines.append(f"| {name} | {rate} | {memory} | {row['loss']:.4f} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu")
    parser.add_argument("--shape", default="llama-3-8b", help="a name of `llama-ft models`")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--contenders", default="; ".join(CONTENDERS), help="separated by semicolons")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(measure(options)))
        return
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for length in options.lengths.split(","):
        rows[length] = {}
        for name in options.contenders.split("; "):
            flags = [*sys.argv[1:], "--contender", name, "--length", length]
            launch = [sys.executable, "-m", "benchmarks.gpu", *flags]
            done = subprocess.run(launch, check=False, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                rows[length][name] = {"error": "out of memory" if "OutOfMemory" in done.stderr else last[:120]}
            else:
                rows[length][name] = json.loads(done.stdout.splitlines()[-1])
            print(length, name, rows[length][name], file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    command = f"`python -m benchmarks.gpu {' '.join(sys.argv[1:])}`"
    text = f"{command}\n\n{device}, torch {torch.__version__}\n\n{table(rows)}"
    print(text)
    if not options.no_write:
        stem = f"gpu-{options.shape}-{device.lower().replace(' ', '-')}-{time.strftime('%Y-%m-%d')}"
        Path(RESULTS / f"{stem}.md").write_text(text)
        Path(RESULTS / f"{stem}.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
