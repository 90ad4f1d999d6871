"""From a recipe's `adapter` section to a model with trainable low-rank factors (PEFT, arXiv 2106.09685)."""

from __future__ import annotations

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llama_ft.adapters.fused import fused_project, stack_frozen
from llama_ft.errors import UserError, did_you_mean
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.recipe.schema import Adapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def target_modules(targets: str | list[str]) -> list[str]:
    """The projections that `adapter.targets` names. UserError for a name that no LLaMA has."""
    if targets == "all-linear":
        return list(ALL_LINEAR)
    if targets == "attention":
        return list(ATTENTION)
    names = [targets] if isinstance(targets, str) else targets
    unknown = [name for name in names if name not in ALL_LINEAR]
    if unknown:
        choices = [*ALL_LINEAR, "all-linear", "attention"]
        raise UserError(
            f"no projection '{unknown[0]}' in a LLaMA",
            key="adapter.targets",
            hint=did_you_mean(unknown[0], choices, kind="targets"),
        )
    return list(names)


def lora_config(adapter: Adapter) -> LoraConfig:
    """PEFT's configuration of a recipe's adapter."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=adapter.dropout,
        target_modules=target_modules(adapter.targets),
        bias="none",
    )


def stack_projections(model: LlamaForCausalLM) -> None:
    """Lays the frozen weights of q/k/v, and of gate/up, one after the other, so that one product needs no copy of them.

    To be done again after the model has moved to another device, which gives each weight a storage of its own; not for
    weights that an engine shards, which stand elsewhere at every step.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            linears = [getattr(linear, "base_layer", linear) for linear in group]
            if all(type(linear) is nn.Linear for linear in linears):  # quantised weights have no rows to lay out
                stack_frozen(linears)


def attach_lora(model: LlamaForCausalLM, adapter: Adapter) -> PeftModel:
    """A PEFT model around `model`, base frozen, factors in float32 (A random, B zero), computed by the fused product.

    The factors' initial values come from torch's global generator: seed it first.
    """
    base_name = model.config.name_or_path
    stack_projections(model)
    peft_model = get_peft_model(model, lora_config(adapter), autocast_adapter_dtype=True)
    model.model.set_project(fused_project)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    return peft_model
