"""A run that samples: prompts out of prepared data, rewards opened, a reference found, and what was said kept."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import datasets
import torch
from peft import PeftModel

from llama_ft.adapters.lora import stack_projections
from llama_ft.data.batches import PackedCollator, PaddedCollator
from llama_ft.data.prepare import Prepared
from llama_ft.files import keep_lines
from llama_ft.llama.load import DTYPES
from llama_ft.recipe.run import Run
from llama_ft.train.asking import Answer, Asker, Prompt, PromptCollator, context_of, figures_of
from llama_ft.train.compared import copy_of_base, numbered, reference_facts, shares_prompts
from llama_ft.train.ends import EndToken
from llama_ft.train.guards import Guard
from llama_ft.train.load import Loaded, trains_base_weights
from llama_ft.train.objectives.reference import AdapterOff, Copy, Reference
from llama_ft.train.online import HELD_OUT, OnlineGuard, OnlineTrainer
from llama_ft.train.rejection import FOLDER, record, tuned_on_best
from llama_ft.train.rewards.rewards import Rewards
from llama_ft.train.signs import Signs
from llama_ft.train.start import Start
from llama_ft.train.trainer import LlamaTrainer
from llama_ft.train.warn import Warnings

ASKED = 64
"""Held-out prompts that a model tuned on the best answers is asked at an evaluation."""


def asker_of(start: Start, loaded: Loaded, rewards: Rewards) -> Asker:
    """Who draws and scores the answers of a run."""
    return Asker(start.recipe, start.prepared, rewards, context_of(loaded.model))


def collator_of(prepared: Prepared) -> PromptCollator:
    """Documents to prompts, each with the place of its row. Numbers behind the training documents are held-out ones."""
    first = len(prepared.train)

    def where(index: int, source: int, row: int) -> str:
        held_out = prepared.job.held_out if index >= first else []
        return (held_out or prepared.job.train)[source].where(row)

    return PromptCollator(prepared, where)


class OnlineRun(OnlineTrainer):
    """The online trainer of a run that was started from a recipe."""

    def __init__(self, *args: Any, start: Start, loaded: Loaded, signs: Signs | None, **kwargs: Any):
        self.start, self.loaded, self.signs = start, loaded, signs
        self.told: dict[str, float] = {}
        self.said = Said(start.run, start.step or 0) if start.main else None
        super().__init__(*args, **kwargs)

    def before_training(self) -> None:
        """The weights are still those of the start, also in a run that goes on from a checkpoint."""
        if float(self.recipe.policy.kl):
            self.reference = self._find_reference()

    def _find_reference(self) -> Reference:
        asked = self.recipe.preference.reference
        if asked == "adapter_off" or (asked == "auto" and self.recipe.adapter.method != "full"):
            return AdapterOff()
        return Copy(copy_of_base(self.start, self.loaded, self.model))

    def heard(self, prompts: list[Prompt], groups: list[list[Answer]]) -> None:
        """Keeps the answers to one prompt of the step, and looks at all of them for signs of trouble."""
        step = self.state.global_step + 1
        if self.said is not None and prompts:
            self.said.keep(step, prompts[0], groups[0])
        self.told = self.signs.heard(step, groups) if self.signs is not None else {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what the signs are read off to the step's line."""
        step = "loss" in logs
        logs |= self.told if step else {}
        super().log(logs, start_time)
        if step and self.signs is not None and "kl" in logs:
            self.signs.moved(logs["kl"])


class Said:
    """sampled/answers.jsonl of a run that samples as it learns: the answers to one prompt of each step."""

    def __init__(self, run: Run, step: int):
        """step: the one that the run goes on from; what was said after it will be said again."""
        self.file = run.path / FOLDER / "answers.jsonl"
        keep_lines(self.file, lambda line: line.get("step", 0) <= step)

    def keep(self, step: int, prompt: Prompt, group: list[Answer]) -> None:
        """One line."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **record(prompt, group)}, ensure_ascii=False) + "\n")


def online_trainer(
    start: Start, loaded: Loaded, common: dict[str, Any], rewards: Rewards, warnings: Warnings | None
) -> OnlineRun:
    """The trainer of a run of grpo or rloo. common: what every trainer of a run is given."""
    prepared = start.prepared
    signs = Signs(start.recipe, warnings.say, warnings.records) if warnings is not None else None
    train = numbered(common.pop("train_dataset"))
    held_out = common.pop("eval_dataset")
    # An answer's seed comes from its prompt's number, which what fills a step up must not move.
    evaluated = numbered(held_out, len(prepared.train)) if held_out is not None else None
    asker, collate = asker_of(start, loaded, rewards), collator_of(prepared)
    asker.check_room(collate, *(one for one in (train, evaluated) if one is not None))
    return OnlineRun(
        **common,
        start=start,
        loaded=loaded,
        signs=signs,
        asker=asker,
        share=shares_prompts(start.recipe, loaded.model),
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=collate,
        guard=OnlineGuard(start.run, start.recipe, prepared),
        ends=EndToken.of(prepared),
    )


class TunedOnBest(LlamaTrainer):
    """Tunes on the best answers, and asks at each evaluation what answers of its own are worth."""

    def __init__(self, *args: Any, asker: Asker, prompts: list[Prompt], **kwargs: Any):
        self.asker, self.prompts = asker, prompts
        super().__init__(*args, **kwargs)

    def measure(self, batches: Any) -> dict[str, float] | None:
        """Adds `reward` and its parts: one drawn answer to each of some held-out prompts, by the same seeds."""
        measured = super().measure(batches)
        if measured is None or not self.prompts:
            return measured
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        with self.asking():
            groups = self.asker.ask(self.model, self.prompts[rank::world], 1, HELD_OUT)
        return measured | self.means(figures_of(groups))


def rejection_data(start: Start, loaded: Loaded, rewards: Rewards) -> Prepared:
    """The run's data with the best answers of its base in place of the rows' own."""
    said = start.recipe.sampling.model_dump()
    scored = [one.model_dump() for one in start.recipe.rewards]
    facts = reference_facts(start, loaded) | {"sampling": said, "rewards": scored, "scored_by": rewards.fingerprint()}
    facts["seed"] = start.recipe.training.seed
    for name in ("processes", "packing"):  # which a run that goes on may change
        facts.pop(name)
    model: Any = loaded.model.to(start.state.device)  # the trainer, which moves it, comes later
    if isinstance(model, PeftModel):
        base: Any = model.get_base_model()
        stack_projections(base)  # in its new place; else they are laid side by side for every token
    on_gpu = start.state.device.type == "cuda" and trains_base_weights(start.base)
    held_in = torch.autocast("cuda", DTYPES[start.recipe.model.dtype]) if on_gpu else nullcontext()
    with held_in:
        return tuned_on_best(start, model, asker_of(start, loaded, rewards), facts)


def rejection_trainer(start: Start, loaded: Loaded, common: dict[str, Any], rewards: Rewards) -> TunedOnBest:
    """The trainer that follows."""
    prepared = start.prepared
    pad = prepared.tokenizer.pad_token_id
    return TunedOnBest(
        **common,
        asker=asker_of(start, loaded, rewards),
        prompts=held_out_prompts(prepared),
        data_collator=PackedCollator() if start.recipe.sequence.packing else PaddedCollator(pad),
        guard=Guard(start.run, start.recipe, prepared),
        ends=EndToken.of(prepared),
    )


def held_out_prompts(prepared: Prepared) -> list[Prompt]:
    """Some held-out prompts, spread over all."""
    if prepared.eval is None or not len(prepared.eval):
        return []
    documents: datasets.Dataset = numbered(prepared.eval, len(prepared.train))
    collate = collator_of(prepared)
    stride = max(1, len(documents) // ASKED)
    return [collate.prompt(documents[number]) for number in range(0, len(documents), stride)][:ASKED]
