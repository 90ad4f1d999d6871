"""A run on pairs or judged answers: its data as the comparing trainer reads them, its reference, its guard."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object

from llama_ft.data.ends import JudgedCollator, PairCollator, ends_of
from llama_ft.data.others import WithOther
from llama_ft.llama.fast import Fast
from llama_ft.recipe.schema import Recipe
from llama_ft.recipe.schema_objective import Preference
from llama_ft.train.comparing import ComparingTrainer
from llama_ft.train.ends import EndToken
from llama_ft.train.engine import engine_of
from llama_ft.train.guards import Guard
from llama_ft.train.load import Loaded, load_whole
from llama_ft.train.lock import folder_fingerprint
from llama_ft.train.objectives.judged import KTO
from llama_ft.train.objectives.objective import Ends, Judged, Objective
from llama_ft.train.objectives.pairs import DPO, ORPO, SimPO
from llama_ft.train.objectives.ranking import Ranking
from llama_ft.train.objectives.reference import INDEX, AdapterOff, Copy, Reference, precomputed
from llama_ft.train.scored import accuracy_by_margin, write_accuracy
from llama_ft.train.start import Start


def objective_of(recipe: Recipe) -> Objective:
    """What a recipe with one of these objectives optimises."""
    name = recipe.training.objective
    if name == "reward":
        return Ranking(recipe.reward_model)
    kinds: dict[str, Callable[[Preference], Objective]] = {"dpo": DPO, "kto": KTO, "orpo": ORPO, "simpo": SimPO}
    return kinds[name](recipe.preference)


def shares_prompts(recipe: Recipe, model: Any) -> bool:
    """Whether a prompt is computed once for its answers: unless the recipe asks for plain rows, or RoPE follows the
    length of each document, which an answer apart from its prompt does not have."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    return recipe.sequence.packing and rope.get("rope_type") != "dynamic"


def numbered(documents: datasets.Dataset, first: int = 0) -> datasets.Dataset:
    """The documents with a column `index`, counted on from `first`, as numpy arrays."""
    places = np.arange(first, first + len(documents))
    return documents.add_column(INDEX, places).with_format("numpy")


def collator_of(recipe: Recipe, model: Any) -> JudgedCollator | PairCollator:
    """Lays a micro-batch out as the model reads it."""
    return JudgedCollator() if recipe.training.objective == "kto" else PairCollator(shares_prompts(recipe, model))


class ComparedRun(ComparingTrainer):
    """The comparing trainer of a run that was started from a recipe: it finds its reference before the first step."""

    def __init__(self, *args: Any, start: Start, loaded: Loaded, **kwargs: Any):
        self.start, self.loaded = start, loaded
        super().__init__(*args, objective=objective_of(start.recipe), **kwargs)
        if self.objective.name == "kto":  # TRL's trainer takes nothing but a data set of the library's own
            longest = start.recipe.sequence.max_length
            self.train_dataset = WithOther(self.train_dataset, longest)
            self.eval_dataset = WithOther(self.eval_dataset, longest) if self.eval_dataset is not None else None

    def before_training(self) -> None:
        """The weights are still those of the start, also in a run that goes on from a checkpoint."""
        if self.objective.reference:
            self.reference = self.find_reference()

    def measured_of(self, ends: Ends, judged: Judged) -> dict[str, float]:
        """Of a reward model also how often it is right, by margin, over all processes: eval/accuracy.json."""
        if not self.objective.scores:
            return {}
        real = self.objective.real(ends.lengths)
        scores = ends.values.view(-1, 2)[real].cpu()
        margins = ends.batch["margin"][real].cpu() if "margin" in ends.batch else torch.full((len(scores),), torch.nan)
        every = gather_object([(scores, margins)])
        if self.is_world_process_zero():
            scores, margins = (torch.cat([one[side] for one in every]) for side in (0, 1))
            told = accuracy_by_margin(scores, margins)
            write_accuracy(self.run, [{"step": self.state.global_step, **one} for one in told])
        return {}

    def find_reference(self) -> Reference:
        """What `preference.reference` names."""
        start, recipe = self.start, self.start.recipe
        asked = recipe.preference.reference
        if asked == "auto":
            asked = "precomputed" if recipe.adapter.method == "full" else "adapter_off"
        if asked == "adapter_off":
            return AdapterOff()
        if asked == "copy":
            return Copy(copy_of_base(start, self.loaded, self.model))
        sets = [one for one in (self.train_dataset, self.eval_dataset) if one is not None]
        return precomputed(self, sets, reference_facts(start, self.loaded), start.console)


def copy_of_base(start: Start, loaded: Loaded, trained: Any) -> Any:
    """A second model with the weights that the run starts from, held as the trained one is: DeepSpeed's in 16 bits."""
    model = load_whole(start.base, loaded.compute_dtype, start.state.device)
    model.model.set_fast(Fast(attention=start.recipe.model.attention))
    held = next(trained.parameters()).dtype if start.base.full else loaded.compute_dtype
    return model.to(start.state.device, held)


def reference_facts(start: Start, loaded: Loaded) -> dict[str, Any]:
    """All that the reference's log-probabilities depend on."""
    recipe, base = start.recipe, start.base
    return {
        "weights": folder_fingerprint(base.folder),
        "seed": recipe.training.seed if base.new or base.grown else None,
        "model": recipe.model.model_dump(),
        "quantised": loaded.base_digest,
        "documents": start.prepared.folder.name,
        "judged": recipe.training.objective == "kto",
        "processes": start.state.num_processes,
        "compute": str(loaded.compute_dtype),
        "device": start.state.device.type,
        "packing": recipe.sequence.packing,
        "rounded": "float32" if recipe.adapter.method == "full" else recipe.model.dtype,
        "engine": engine_of(start.state).name,
        "mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
    }


def compared_trainer(start: Start, loaded: Loaded, common: dict[str, Any]) -> ComparedRun:
    """The trainer of a run on pairs or judged answers. common: what every trainer of a run is given."""
    recipe, prepared = start.recipe, start.prepared
    train = numbered(common.pop("train_dataset"))
    held_out = common.pop("eval_dataset")
    evaluated = numbered(held_out, len(train)) if held_out is not None else None
    return ComparedRun(
        **common,
        start=start,
        loaded=loaded,
        train_dataset=train,
        eval_dataset=evaluated,
        data_collator=collator_of(recipe, loaded.model),
        guard=ComparingGuard(start.run, recipe, prepared),
        ends=EndToken.of(prepared) if not objective_of(recipe).scores else None,
    )


class ComparingGuard(Guard):
    """Names pairs and judged answers where a step must not be taken."""

    @property
    def max_spike(self) -> float:
        """IPO's loss is a square around 1 / 2β: a nat of difference moves it by 1 / β."""
        said, objective = self.recipe.preference, self.recipe.training.objective
        return super().max_spike / (float(said.beta) if objective == "dpo" and said.loss == "ipo" else 1.0)

    def _records(self, trainer: Any) -> list[dict[str, Any]]:
        """This process's items of the step, each with what it costs now."""
        decode = self.prepared.tokenizer.decode
        records = []
        model, was_training = trainer.model_wrapped, trainer.model_wrapped.training
        model.eval()
        for number, (batch, origins) in enumerate(self.batches):
            with torch.no_grad(), trainer.accelerator.autocast():
                ends = trainer.ends_of(model, dict(batch))
                losses = trainer.objective.judge(ends).losses.tolist()
            real = trainer.objective.real(ends.lengths).tolist()
            whole = list(ends_of(batch))
            at_once = len(whole) // len(losses)
            for place, loss in enumerate(losses):
                if not real[place]:
                    continue
                sides = [decode(end.ids.tolist()) for end in whole[place * at_once : (place + 1) * at_once]]
                records.append(
                    {
                        **self.whence(origins[place] if origins else None),
                        "epoch": None if trainer.order is None else trainer.order.epoch,
                        "process": trainer.accelerator.process_index,
                        "micro_batch": number,
                        "loss": loss if np.isfinite(loss) else None,
                        "text": sides[0],
                        **({"rejected": sides[1]} if at_once == 2 else {}),
                    }
                )
        model.train(was_training)
        return records
