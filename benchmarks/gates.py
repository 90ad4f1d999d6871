"""The gates of an honest row: the same documents, the first loss and the first gradient of transformers' own LLaMA.

The reference is that model in float32 with eager attention, one document at a time, without padding, packing or
kernels of anybody, and PEFT's own LoRA on top. For QLoRA its weights went through NF4 and back.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from benchmarks.peers.common import Spec, Step, adapter_name

LOSS = {"float32": 1e-5, "bfloat16": 2e-3}
"""How far the first step's loss may be from the reference's, in nats per labelled token."""
DEVIATIONS = 4.0
"""bfloat16: or so many standard deviations of what rounding alone does to a mean over few tokens, if that is more."""
COSINE = 0.9999
"""float32: least cosine between the first gradient and the reference's."""


@dataclass(frozen=True)
class Reference:
    """What the first step must be."""

    loss: float
    gradients: Path
    noise: float
    """Standard deviation, in nats, of what bfloat16 does to a labelled token's loss in transformers' LLaMA."""
    labelled: int

    def allowed(self, dtype: str) -> float:
        """How far a first loss may be from `loss`."""
        if dtype == "float32":
            return LOSS[dtype]
        return max(LOSS[dtype], DEVIATIONS * self.noise / math.sqrt(self.labelled))


def reference_of(spec: Spec, documents: int, folder: Path) -> Reference:
    """The first step of a spec, computed the plain way; `documents`: how many are in it."""
    first = [json.loads(line) for line in Path(spec.documents).read_text(encoding="utf-8").splitlines()[:documents]]
    model = _model(spec)
    labelled = sum(_labels(one).ne(-100).sum().item() for one in first)
    plain, total = [], 0.0
    for one in first:
        losses = _losses(model, one)
        (losses.sum() / labelled).backward()
        plain.append(losses.detach())
        total += losses.sum().item()
    found = {adapter_name(n): p.grad.contiguous() for n, p in model.named_parameters() if p.grad is not None}
    file = folder / "reference.safetensors"
    save_file(found, file)
    for parameter in model.parameters():
        parameter.grad = None
    model.to(torch.bfloat16)
    with torch.no_grad():
        rounded = [_losses(model, one) for one in first]
    noise = (torch.cat(rounded) - torch.cat(plain)).std().item()
    return Reference(total / labelled, file, noise, int(labelled))


def _labels(document: dict[str, Any]) -> Tensor:
    return torch.tensor([*document["labels"][1:]])


def _losses(model: Any, document: dict[str, Any]) -> Tensor:
    """Nats of each labelled token of a document, float32."""
    labels = _labels(document)
    logits = model(input_ids=torch.tensor([document["input_ids"]])).logits[0, :-1].float()
    kept = labels != -100
    return cross_entropy(logits[kept], labels[kept], reduction="none")


def _model(spec: Spec) -> Any:
    model: Any = LlamaForCausalLM.from_pretrained(spec.model, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    if spec.method == "full":
        return model
    if spec.method == "qlora":
        _through_nf4(model, spec.torch_dtype)
    settings: dict[str, Any] = {"r": spec.r, "lora_alpha": spec.alpha, "target_modules": "all-linear"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    assert spec.adapter is not None
    set_peft_model_state_dict(model, load_file(spec.adapter))
    return model


@torch.no_grad()
def _through_nf4(model: Any, dtype: torch.dtype) -> None:
    """Rounds every linear layer but the head to NF4 with double quantisation, as bitsandbytes keeps it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            packed, state = quantize_4bit(module.weight.to(dtype), quant_type="nf4", compress_statistics=True)
            module.weight.copy_(dequantize_4bit(packed, state).float())


def cosine(file: Path, reference: Path) -> float:
    """Cosine between two gradients, over all weights that both files name; 0 where one lacks a name of the other."""
    with safe_open(file, "pt") as own, safe_open(reference, "pt") as right:
        if set(own.keys()) != set(right.keys()):
            return 0.0
        sums = torch.zeros(3, dtype=torch.float64)
        for name in right.keys():  # noqa: SIM118 (no mapping)
            a, b = own.get_tensor(name).double().flatten(), right.get_tensor(name).double().flatten()
            sums += torch.stack([a @ b, a @ a, b @ b])
    return (sums[0] / (sums[1] * sums[2]).sqrt()).item()


def faults(
    steps: list[Step], expected: list[Step], reference: Reference, dtype: str, gradient: float, *, in_order: bool
) -> list[str]:
    """The gates that a run does not pass, in words. `gradient`: the cosine of its first gradient."""
    if len(steps) != len(expected):
        return [f"{len(steps)} steps, not {len(expected)}"]
    found = []
    for number, (one, right) in enumerate(zip(steps, expected, strict=True), 1):
        if not in_order and number > 1:
            break
        if sorted(one.documents) != sorted(right.documents):
            found.append(f"other documents in step {number}")
        if (one.tokens, one.labelled) != (right.tokens, right.labelled):
            counted = f"{one.tokens} tokens, {one.labelled} labelled"
            found.append(f"{counted} in step {number}, not {right.tokens} and {right.labelled}")
    everything = sorted(name for one in expected for name in one.documents)
    if sorted(name for one in steps for name in one.documents) != everything:
        found.append("other documents in all")
    apart = math.inf if steps[0].loss is None else abs(steps[0].loss - reference.loss)
    if not apart <= reference.allowed(dtype):
        found.append(f"its first loss is {apart:.1e} from the reference's, allowed {reference.allowed(dtype):.1e}")
    if dtype == "float32" and not gradient > COSINE:
        found.append(f"its first gradient has cosine {gradient:.6f} with the reference's")
    return found
