"""How near the model comes to the machine's limit, and what each fast path is worth.

    python -m benchmarks.model --data ../shared/data/instruct/alpaca_5000.json

SmolLM2-135M, LoRA r 16 on all linear layers (or `--method full`), Alpaca rows packed into micro-batches. In one process
and in turn: transformers + PEFT on padded batches, our plain twins, then each fast path added to those before it. Every
round also times matrix products of the model's own shapes, forward and both backward orientations: their rate is the
machine's limit, and `fraction` is what of it the training reaches, counting the FLOP of the formula in `flop_per_token`
whatever a path manages to leave out. Peers have processes of their own: `benchmarks.run`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Reference

from benchmarks.machine import RESULTS, describe, machine
from llama_ft import load_recipe, prepare_data
from llama_ft.adapters.fused import fused_project
from llama_ft.adapters.lora import attach_lora
from llama_ft.data.batches import PackedCollator, PaddedCollator
from llama_ft.data.order import document_order
from llama_ft.llama.base import locate_base
from llama_ft.llama.fast import PLAIN, Fast
from llama_ft.llama.load import load_model
from llama_ft.llama.projections import Project, project, project_each
from llama_ft.recipe.schema import Adapter

RECIPE = "alpaca/smollm2-135m-lora"
Batch = dict[str, Tensor]
CPU = torch.device("cpu")
HF = "transformers + PEFT, padded"
LADDER: dict[str, tuple[Fast, Project]] = {
    "ours, plain twins": (PLAIN, project_each),
    "+ attention": (Fast(elementwise="plain", head=False, labelled_rows=False), project_each),
    "+ RMSNorm, SwiGLU": (Fast(head=False, labelled_rows=False), project_each),
    "+ loss head": (Fast(labelled_rows=False), project_each),
    "+ fused products": (Fast(labelled_rows=False), fused_project),
    "+ labelled rows (all)": (Fast(), fused_project),
}
ALL = "+ labelled rows (all)"


@dataclass(frozen=True)
class Shares:
    """What the FLOP of a token depend on besides the model."""

    mean_length: float
    """s̄ = Σℓ² / Σℓ over document lengths: how many keys a token's attention meets, twice over."""
    labelled: float
    """Share of tokens with a label."""


class Work:
    """The same documents as micro-batches, packed and padded, and what is in them."""

    def __init__(self, data: str, micro_batch: int, batches: int, seed: int = 42):
        recipe = load_recipe(RECIPE, [f"data.0.path={Path(data).resolve()}", "data.0.limit=400", "eval_data=null"])
        rows = prepare_data(recipe).train
        order = document_order(len(rows), seed, 0)
        groups = [[rows[int(i)] for i in order[n * micro_batch : (n + 1) * micro_batch]] for n in range(batches)]
        self.packed = [PackedCollator()(group) for group in groups]
        self.padded = [PaddedCollator(0)(group) for group in groups]
        lengths = [len(row["input_ids"]) for group in groups for row in group]
        self.tokens = sum(lengths)
        labelled = sum(int((batch["labels"] != -100).sum()) for batch in self.packed)
        self.shares = Shares(sum(length**2 for length in lengths) / self.tokens, labelled / self.tokens)


def flop_per_token(config: LlamaConfig, shares: Shares, adapter_weights: int | None) -> float:
    """FLOP of one training step per non-pad token, after PERFORMANCE's count of multiply-adds as two.

    LoRA: 4·B + 4·f·Hd + 3.5·a + 6·P; full tuning: 6·B + 6·f·Hd + 3.5·a, where B are the weights of the linear layers,
    Hd those of the head, f the labelled share, P the adapter's weights and a = 2·layers·(heads·dim)·s̄ causal attention.
    """
    kv = config.num_key_value_heads * config.head_dim
    d_attention = config.num_attention_heads * config.head_dim
    layer = config.hidden_size * (2 * d_attention + 2 * kv + 3 * config.intermediate_size)
    body = config.num_hidden_layers * layer
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * d_attention * shares.mean_length
    if adapter_weights is None:
        return 6 * body + 6 * shares.labelled * head + 3.5 * attention
    return 4 * body + 4 * shares.labelled * head + 3.5 * attention + 6 * adapter_weights


class Gemm:
    """Times the model's matrix products: each shape forward, and backward to the input and to the weight.

    Shapes are those the fast path multiplies (q/k/v and gate/up as one); operands change from call to call, as in a
    model, so that none is in the cache already.
    """

    def __init__(
        self,
        config: LlamaConfig,
        tokens: int,
        labelled: int,
        dtype: torch.dtype,
        copies: int = 4,
        device: torch.device = CPU,
    ):
        self.device = device
        h, i, d = config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim
        kv = config.num_key_value_heads * config.head_dim
        layer = [(tokens, h, d + 2 * kv), (tokens, d, h), (tokens, h, 2 * i), (tokens, i, h)]
        self.parts = [(shape, config.num_hidden_layers, copies) for shape in layer]
        self.parts.append(((labelled, h, config.vocab_size), 1, 1))
        self.operands = {
            (m, k, n): [self._matrices(((m, k), (n, k), (m, n)), dtype) for _ in range(count)]
            for (m, k, n), _, count in self.parts
        }

    def _matrices(self, shapes: tuple[tuple[int, int], ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.randn(shape, device=self.device).to(dtype) for shape in shapes)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def rate(self) -> float:
        """FLOP/s over all shapes and orientations, each weighted by how often the model has it."""
        flop = seconds = 0.0
        for (m, k, n), times, _ in self.parts:
            operands = self.operands[m, k, n]
            start = self._now()
            for x, weight, grad in operands:
                torch.mm(x, weight.t())
                torch.mm(grad, weight)
                torch.mm(grad.t(), x)
            seconds += (self._now() - start) * times / len(operands)
            flop += 3 * 2 * m * k * n * times
        return flop / seconds


class Contender:
    """A way to compute the same gradients; `run` makes one pass over all micro-batches and returns seconds, nats."""

    def __init__(self, model: Any, batches: list[Batch], prepare: Callable[[], None] = lambda: None):
        self.model, self.batches, self.prepare = model, batches, prepare
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run(self) -> tuple[float, float]:
        self.prepare()
        for weight in self.weights:
            weight.grad = None
        nats = 0.0
        start = time.perf_counter()
        for batch in self.batches:
            loss = self.model(**batch, num_items_in_batch=int((batch["labels"] != -100).sum())).loss
            loss.backward()
            nats += loss.item()
        return time.perf_counter() - start, nats / len(self.batches)


def contenders(method: str, dtype: torch.dtype, work: Work, *, with_hf: bool) -> dict[str, Contender]:
    """Ours on one model whose paths are switched, transformers on its own."""
    folder = locate_base("smollm2-135m")
    adapter = Adapter(r=16, alpha=32)
    found: dict[str, Contender] = {}
    model: Any = load_model(folder, dtype)
    if method == "lora":
        torch.manual_seed(0)
        model = attach_lora(model, adapter)
    inner = model.get_base_model().model if method == "lora" else model.model
    for name, (fast, projection) in LADDER.items():
        # Without an adapter there is no LoRA to fuse; what is left is one product for inputs that are shared.
        used = project if method == "full" and projection is fused_project else projection

        def prepare(fast: Fast = fast, used: Project = used) -> None:
            inner.set_fast(fast)
            inner.set_project(used)

        found[name] = Contender(model.train(), work.packed, prepare)
    if with_hf:
        reference: Any = Reference.from_pretrained(folder, dtype=dtype)
        if method == "lora":
            settings = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
            reference = get_peft_model(reference, LoraConfig(**settings), autocast_adapter_dtype=dtype == torch.float32)
        found = {HF: Contender(reference.train(), work.padded), **found}
    return found


def ladder(options: argparse.Namespace, dtype_name: str) -> dict[str, Any]:
    """All contenders of one dtype in turn, with the machine's own rate in every round."""
    dtype = getattr(torch, dtype_name)
    work = Work(options.data, options.micro_batch, options.batches)
    found = contenders(options.method, dtype, work, with_hf=not options.no_hf)
    config = next(iter(found.values())).model.config
    ours = found[ALL]
    adapter_weights = sum(w.numel() for w in ours.weights) if options.method == "lora" else None
    tokens = work.tokens // options.batches
    gemm = Gemm(config, tokens, int(tokens * work.shares.labelled), dtype)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    rates: list[float] = []
    losses: dict[str, float] = {}
    for number in range(options.rounds + 1):
        rates.append(gemm.rate())
        for name, contender in found.items():
            took, losses[name] = contender.run()
            seconds[name].append(took)
        print(
            f"{dtype_name} round {number}: {work.tokens / seconds[ALL][-1]:.0f} tokens/s", file=sys.stderr, flush=True
        )
    flop, limit = flop_per_token(config, work.shares, adapter_weights), statistics.median(rates[1:])
    rows = {}
    for name, times in seconds.items():
        counted = [work.tokens / took for took in times[1:]]  # the first round warms up
        share = [flop * rate / limit_ for rate, limit_ in zip(counted, rates[1:], strict=True)]
        rows[name] = {
            "tokens_per_second": statistics.median(counted),
            "spread": [min(counted), max(counted)],
            "fraction": statistics.median(share),
            "loss": losses[name],
        }
    return {
        "dtype": dtype_name,
        "gemm_gflops": limit / 1e9,
        "flop_per_token": flop,
        "tokens": work.tokens,
        "labelled": work.shares.labelled,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown of one dtype."""
    first = next(iter(result["rows"].values()))
    lines = [
        f"**{result['dtype']}**: GEMM at the model's shapes {result['gemm_gflops']:.0f} GFLOP/s, "
        f"{result['flop_per_token'] / 1e6:.0f} MFLOP per token, {result['labelled']:.0%} of tokens labelled",
        "",
        "| | non-pad tokens/s (min–max) | against the first | fraction of the machine | loss |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} ({row['spread'][0]:.0f}–{row['spread'][1]:.0f}) "
            f"| {row['tokens_per_second'] / first['tokens_per_second']:.2f}× | {row['fraction']:.0%} "
            f"| {row['loss']:.5f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.model")
    parser.add_argument("--data", default="../shared/data/instruct/alpaca_5000.json", help="Alpaca rows")
    parser.add_argument("--method", choices=("lora", "full"), default="lora")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--micro-batch", type=int, default=8, help="documents")
    parser.add_argument("--batches", type=int, default=2, help="micro-batches per round")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--no-hf", action="store_true", help="leave transformers + PEFT out")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    about = machine()
    results = [ladder(options, name) for name in options.dtypes.split(",")]
    command = f"`python -m benchmarks.model {' '.join(sys.argv[1:])}`"
    text = f"{command}\n\n{describe(about)}. {options.rounds} rounds.\n\n"
    text += "\n\n".join(table(result) for result in results) + "\n"
    data = {"machine": about, "ladders": results}
    print(text)
    if not options.no_write:
        RESULTS.mkdir(exist_ok=True)
        stem = f"model-{options.method}-cpu-{about['date']}"
        (RESULTS / f"{stem}.md").write_text(text)
        (RESULTS / f"{stem}.json").write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
