"""What `benchmarks.gpu_run` trains: random weights of a real shape, an adapter's first ones, documents; a reference.

Neither a step's time nor what the gates compare depends on what the weights and documents say. All of it is the same in
every call with the same options.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.common import MASKED, Spec, adapter_name
from llama_ft.llama.shapes import PRESETS, Shape

LORA_RANK = 16
CONTEXT = 262_144
"""Of the written config: no contender shall scale RoPE for long documents."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SPECIAL = 3
"""Ids of padding, start and end; documents have none of them."""
PAIR = (512, 256, 256)
"""Tokens of prompt, chosen and rejected answer."""


@dataclass(frozen=True)
class Workload:
    """What is trained on, in sizes of a real model; `small` divides lengths for a tiny one."""

    says: str
    micro_batch: int = 1
    accumulation: int = 1
    lengths: tuple[int, int] = (60, 512)
    median: int = 160
    row: int = 0
    """Tokens of a packed row; 0: one document a row."""
    method: str = "lora"


WORKLOADS = {
    "W1": Workload("LoRA, Alpaca-like documents of 60–512 tokens, 2 × 8 rows a step", 8, 2),
    "W2": Workload("LoRA, chats packed into rows of 2,048 tokens, 2 × 2 rows a step", 2, 2, (200, 2048), 500, 2048),
    "W3": Workload("QLoRA, chats packed as in W2", 2, 2, (200, 2048), 500, 2048, "qlora"),
    "W4": Workload(f"DPO with LoRA, 2 × 4 pairs of {' + '.join(map(str, PAIR))} tokens a step", 4, 2),
    "W6": Workload("QLoRA with checkpointing within the given memory, one document a step", method="qlora"),
}
GROWTH, FIRST = 1.2, 8192
"""W6: every document is so much longer than the last, the first so long."""


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape, cut where it was asked for."""
    shape = PRESETS[options.shape]
    return replace(shape, layers=options.layers) if options.layers else shape


def small(options: argparse.Namespace) -> int:
    """What lengths are divided by: a tiny model is for trying this out."""
    return 16 if options.shape == "tiny" else 1


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights, in Hugging Face's words."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, size in shape.projections.items():
            part = "self_attn" if name in LINEAR[:4] else "mlp"
            yield f"model.layers.{layer}.{part}.{name}.weight", size
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{name}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)


def write_model(shape: Shape, folder: Path, device: str) -> None:
    """Config, a tokenizer that nobody uses but some ask for, and weights of standard deviation 0.02 in shards."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = shape.config_dict(context=CONTEXT) | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(SPECIAL, 300)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="w3"
    ).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(0)
    shards: list[dict[str, Any]] = [{}]
    held, where, saving = 0, {}, []
    with ThreadPoolExecutor(4) as pool:
        for name, size in tensors(shape):
            if len(size) == 1:
                weight = torch.ones(size, dtype=torch.bfloat16)
            else:
                random_ = torch.randn(size, generator=generator, device=device, dtype=torch.bfloat16)
                weight = random_.mul_(0.02).cpu()
            shards[-1][name] = weight
            where[name] = f"model-{len(shards):05d}.safetensors"
            held += weight.numel()
            if held > 2**29:  # a gigabyte
                saving.append(pool.submit(save_file, shards[-1], folder / where[name], {"format": "pt"}))
                shards.append({})
                held = 0
        if shards[-1]:
            saving.append(
                pool.submit(save_file, shards[-1], folder / f"model-{len(shards):05d}.safetensors", {"format": "pt"})
            )
        for one in saving:
            one.result()
    total = 2 * sum(math.prod(size) for _, size in tensors(shape))
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(shape: Shape, file: Path) -> None:
    """First weights of the adapter with PEFT's names; B is not zero, or A would have no gradient to compare."""
    import torch
    from safetensors.torch import save_file

    generator, found = torch.Generator().manual_seed(1), {}
    for name, size in tensors(shape):
        if name.split(".")[-2] in LINEAR:
            out, into = size
            place = f"base_model.model.{name.removesuffix('.weight')}"
            found[f"{place}.lora_A.weight"] = torch.randn(LORA_RANK, into, generator=generator) / math.sqrt(into)
            found[f"{place}.lora_B.weight"] = torch.randn(out, LORA_RANK, generator=generator) * 0.01
    save_file(found, file)


def lengths_of(workload: Workload, count: int, divisor: int, seed: int) -> list[int]:
    """Lognormal lengths between the workload's two."""
    drawn = random.Random(seed)
    least, most = (max(6, length // divisor) for length in workload.lengths)
    return [
        min(most, max(least, round(drawn.lognormvariate(math.log(workload.median / divisor), 0.6))))
        for _ in range(count)
    ]


def growing(options: argparse.Namespace) -> list[int]:
    """Lengths of W6, one a step; as many as could fit anywhere."""
    first, count = FIRST // small(options), 4 if options.shape == "tiny" else 19
    return [round(first * GROWTH**number) // 8 * 8 for number in range(count)]


def rows_of(options: argparse.Namespace, workload: str) -> list[list[int]]:
    """Lengths of the documents of every row, in the order of training."""
    about, divisor = WORKLOADS[workload], small(options)
    if workload == "W6":
        return [[length] for length in growing(options)]
    rows = options.steps * about.micro_batch * about.accumulation
    if not about.row:
        # Batches of like length in random order, the longest first: who runs out of memory does so at once.
        lengths = sorted(lengths_of(about, rows, divisor, 7), reverse=True)
        batches = [lengths[n : n + about.micro_batch] for n in range(0, rows, about.micro_batch)]
        rest = batches[1:]
        random.Random(8).shuffle(rest)
        return [[length] for batch in [batches[0], *rest] for length in batch]
    found: list[list[int]] = [[]]
    for length in lengths_of(about, 40 * rows, divisor, 9):
        if sum(found[-1]) + length > about.row // divisor:
            if len(found) == rows:
                break
            found.append([])
        found[-1].append(length)
    return found


def write_documents(options: argparse.Namespace, workload: str, shape: Shape) -> Spec:
    """Random ids, the second half of every document labelled; and the spec that all contenders get."""
    work, drawn = Path(options.work), random.Random(workload)
    about, rows = WORKLOADS[workload], rows_of(options, workload)
    with (work / f"{workload}.jsonl").open("w") as out:
        for number, lengths in enumerate(rows):
            for length in lengths:
                ids = [drawn.randrange(SPECIAL, shape.vocabulary) for _ in range(length)]
                labels = [MASKED] * (length // 2) + ids[length // 2 :]
                out.write(json.dumps({"input_ids": ids, "labels": labels, "row": number}) + "\n")
    spec = Spec(
        contender=workload,
        model=str(work / "model"),
        documents=str(work / f"{workload}.jsonl"),
        packed=bool(about.row),
        max_length=max(sum(lengths) for lengths in rows) if workload == "W6" else (about.row or 512) // small(options),
        method=about.method,
        adapter=str(work / "adapter.safetensors"),
        r=LORA_RANK,
        alpha=2 * LORA_RANK,
        dtype=options.dtype,
        steps=len(rows) if workload == "W6" else options.steps,
        micro_batch=about.micro_batch,
        accumulation=about.accumulation,
        learning_rate=1e-4,
        threads=len(os.sched_getaffinity(0)),
        device=options.device,
    )
    spec.write(work / f"{workload}.spec.json")
    return spec


def reference(spec: Spec, file: Path) -> float:
    """transformers + PEFT, eager, float32, document by document: loss and gradients of the first step."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    place = {"": 0} if spec.device == "cuda" else {"": "cpu"}
    model: Any = AutoModelForCausalLM.from_pretrained(
        spec.model, dtype=torch.float32, attn_implementation="eager", device_map=place
    )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=spec.r, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=list(LINEAR)
    )
    model = get_peft_model(model, config).train()
    set_peft_model_state_dict(model, load_file(str(spec.adapter)))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = spec.rows()[: spec.micro_batch * spec.accumulation]
    documents = [document for row in rows for document in row]
    labelled = sum(label != MASKED for document in documents for label in document["labels"][1:])
    total = 0.0
    for document in documents:
        ids = torch.tensor([document["input_ids"]], device=spec.device)
        labels = torch.tensor(document["labels"][1:], device=spec.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, labels, ignore_index=MASKED, reduction="sum") / labelled
        nats.backward()
        total += nats.item()
    found = {adapter_name(n): p.grad.float().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
    save_file(found, file)
    return total
