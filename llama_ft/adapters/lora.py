"""From a recipe's `adapter` section to a model with trainable low-rank factors (PEFT, arXiv 2106.09685)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llama_ft.adapters.fused import fused_project, stack_frozen
from llama_ft.adapters.quantised import known_as_quantised
from llama_ft.errors import UserError, did_you_mean
from llama_ft.llama.head import LossHead
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.reward import LlamaForSequenceClassification
from llama_ft.recipe.check_adapter import GROUPS, PROJECTIONS, matched
from llama_ft.recipe.schema import Adapter

SAVED = {
    "embed_tokens": ["embed_tokens"],
    "lm_head": ["lm_head"],
    "norms": ["input_layernorm", "post_attention_layernorm", "norm"],
}
"""What `modules_to_save` means in the model's own names."""


def target_modules(targets: str | list[str]) -> str | list[str]:
    """What PEFT is told: the projections that `adapter.targets` names, or its regex, which matches nothing else.

    PEFT would take `.*layers\\.1\\..*` for the blocks' own modules too. UserError for a name that no LLaMA has.
    """
    if isinstance(targets, str) and targets not in GROUPS:
        return rf"(?=.*\.(?:{'|'.join(PROJECTIONS)})$)(?:{targets})"
    if isinstance(targets, str):
        return list(PROJECTIONS if targets == "all-linear" else PROJECTIONS[:4])
    unknown = [name for name in targets if name not in PROJECTIONS]
    if unknown:
        raise UserError(
            f"no projection '{unknown[0]}' in a LLaMA",
            key="adapter.targets",
            hint=did_you_mean(unknown[0], [*PROJECTIONS, *GROUPS], kind="targets"),
        )
    return list(targets)


def saved_modules(adapter: Adapter, *, new_tokens: bool, tied: bool, reward: bool = False) -> list[str]:
    """Names of the modules that are trained whole: those asked for; embedding and head where tokens are new.

    A tied head is the embedding: one of them means both, and PEFT is told the embedding. A reward model has a new head,
    its score, which is always trained, and no other: UserError where lm_head is asked for.
    """
    asked = {*adapter.modules_to_save, *(("embed_tokens", "lm_head") if new_tokens else ())}
    if reward and "lm_head" in adapter.modules_to_save:
        hint = "remove it: its score is always trained"
        raise UserError("a reward model has no lm_head", key="adapter.modules_to_save", hint=hint)
    if reward:
        asked -= {"lm_head"}
    elif tied and asked & {"embed_tokens", "lm_head"}:
        asked = (asked - {"lm_head"}) | {"embed_tokens"}
    return [module for name, modules in SAVED.items() if name in asked for module in modules] + ["score"] * reward


def lora_config(
    adapter: Adapter, saved: list[str] | None = None, *, tied: bool = False, task_type: str = "CAUSAL_LM"
) -> LoraConfig:
    """PEFT's configuration of a recipe's adapter; `saved`: modules trained whole, see :func:`saved_modules`.

    task_type: PEFT's word for what the model does, SEQ_CLS for a reward model.
    """
    return LoraConfig(
        task_type=task_type,
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT divides it by r: any number will do
        lora_dropout=adapter.dropout,
        target_modules=target_modules(adapter.targets),
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        modules_to_save=saved or None,
        ensure_weight_tying=tied and "embed_tokens" in (saved or []),
        bias="none",
    )


def stack_projections(model: LlamaForCausalLM | LlamaForSequenceClassification) -> None:
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


def attach_lora(
    model: LlamaForCausalLM | LlamaForSequenceClassification,
    adapter: Adapter,
    *,
    new_tokens: bool = False,
    stacked: bool = True,
) -> PeftModel:
    """A PEFT model around `model`, base frozen, factors in float32 (A random, B zero), computed by the fused product.

    Of a reward model the score is trained as well, whole. new_tokens: the vocabulary has grown, so embedding and head
    are trained too. stacked: whether to lay weights out for the fused product (:func:`stack_projections`). Whatever is
    trained is float32. The factors' initial values come from torch's global generator: seed it first. UserError when
    the regex of `adapter.targets` matches nothing in this model.
    """
    base_name = model.config.name_or_path
    if not matched(adapter.targets, model.config.num_hidden_layers):
        layers = model.config.num_hidden_layers
        what = f"the regex '{adapter.targets}' matches no projection of this base's {layers} layers"
        raise UserError(what, key="adapter.targets", hint="layers are counted from 0")
    if stacked:
        stack_projections(model)
    reward = isinstance(model, LlamaForSequenceClassification)
    tied = bool(model.config.tie_word_embeddings) and not reward
    saved = saved_modules(adapter, new_tokens=new_tokens, tied=tied, reward=reward)
    config = lora_config(adapter, list(saved), tied=tied, task_type="SEQ_CLS" if reward else "CAUSAL_LM")
    with known_as_quantised(model, adapter) if adapter.method == "qlora" else nullcontext():
        peft_model = get_peft_model(model, config, autocast_adapter_dtype=True)
    for parameter in peft_model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    prepare_forward(peft_model)
    said: Any = peft_model.peft_config["default"]
    said.base_model_name_or_path = base_name
    if reward:  # PEFT has added all that it ever called a classifier's head
        said.modules_to_save = saved
    return peft_model


def prepare_forward(peft_model: PeftModel) -> None:
    """Lets a PEFT model on our LLaMA compute as one: the fused product in its seam, a head that answers with the loss.

    Where embedding and head are tied and trained, PEFT puts a plain linear layer on the embedding's weight for a head.
    A reward model has no such head.
    """
    model: Any = peft_model.get_base_model()
    model.model.set_project(fused_project)
    if isinstance(model, LlamaForSequenceClassification):
        return
    for head in model.lm_head.modules():
        if type(head) is nn.Linear:
            head.__class__ = LossHead
