"""A run of `pretrain` again in a plain loop: transformers' own LLaMA, eager, one document at once, torch's AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ft.data.prepare import Prepared, prepare_data
from llama_ft.data.pretraining import PackStream
from llama_ft.llama.load import build_random
from llama_ft.plan.steps import per_device, run_packs
from llama_ft.recipe import Recipe
from llama_ft.recipe.run import Run
from llama_ft.recipe.schedule import rate


def packs(recipe: Recipe, prepared: Prepared) -> Iterator[list[dict[str, Any]]]:
    """The documents of each pack of a run, in its order."""
    if prepared.stream is not None:
        stream = PackStream(prepared.stream, recipe.sequence.max_length, recipe.training.seed)
        yield from (pack["documents"] for pack in stream)
        return
    for pack in run_packs(recipe, prepared.mixture, prepared.lengths):
        yield [prepared.train[int(i)] for i in pack]


def plain_curve(recipe: Recipe, run: Run, steps: int) -> tuple[list[float], list[float]]:
    """Losses (nats per labelled token) and gradient norms of the first steps of a run that began with new weights.

    run: its base/ has the config. The run's own code is used for its data, its first weights and its learning rate.
    """
    training, prepared = recipe.training, prepare_data(recipe, allow=["eval-in-train"])
    config = LlamaConfig.from_pretrained(run.base)
    model = LlamaForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32)
    model.load_state_dict(build_random(config, training.seed, torch.float32).state_dict())
    named = list(model.named_parameters())
    decay = float(training.weight_decay)
    groups = [
        {"params": [weight for name, weight in named if "norm" not in name], "weight_decay": decay},
        {"params": [weight for name, weight in named if "norm" in name], "weight_decay": 0.0},
    ]
    first, second = training.betas
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(first, second), eps=float(training.eps))
    total = training.max_steps or steps
    source, at_once = packs(recipe, prepared), per_device(recipe, 1)
    losses, norms = [], []
    for step in range(steps):
        rows = [row for pack in islice(source, at_once) for row in pack]
        labelled = sum(len(row["input_ids"]) - 1 for row in rows)
        nats = 0.0
        for row in rows:
            if len(row["input_ids"]) < 2:
                continue
            ids = torch.tensor(row["input_ids"], dtype=torch.int64)[None]
            one = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            (one / labelled).backward()
            nats += float(one.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), float(training.max_grad_norm))))
        for group in optimizer.param_groups:
            group["lr"] = float(training.learning_rate) * rate(training, step, total)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(nats / labelled)
    return losses, norms
