"""What a run starts from: a model folder as it is, or new weights that the run makes and keeps in its own base/.

New weights (`preset:NAME`, or `model.init: random`) become a folder like any other, so that an adapter on them is
merged, proven, resumed and opened by plain transformers just as one on a published model. Full tuning needs no copy of
where it began: there base/ holds config and tokenizer alone.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizerFast

from llama_ft.adapters.sizes import trained_weights, weight_names
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.files import publish
from llama_ft.llama.base import locate_base
from llama_ft.llama.checkpoints.shards import write_model
from llama_ft.llama.context import context_length, original_context, scale_rope
from llama_ft.llama.init import initial_weights, weight_shapes
from llama_ft.llama.load import DTYPES, load_config
from llama_ft.llama.shapes import PRESETS, Shape
from llama_ft.recipe.rope import too_long
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Base:
    """Where a run starts. `vocabulary`: rows of the embedding that is trained; `new`: the run makes the weights."""

    recipe: Recipe
    folder: Path
    config: LlamaConfig
    vocabulary: int
    new: bool

    @property
    def full(self) -> bool:
        """Whether every weight is trained, and not an adapter."""
        return self.recipe.adapter.method == "full"

    @property
    def parameters(self) -> int:
        """Weights of the base, rows for added tokens included."""
        return sum(map(prod, weight_names(self.shape, reward=self.reward).values()))

    @property
    def reward(self) -> bool:
        """Whether a score stands in the place of the head."""
        return self.recipe.training.objective == "reward"

    @property
    def trained(self) -> int:
        """Weights that training changes."""
        return trained_weights(self.shape, self.recipe.adapter, new_tokens=self.grown, reward=self.reward)

    @property
    def grown(self) -> bool:
        """Whether the tokenizer has tokens that the base does not know."""
        return self.vocabulary > self.config.vocab_size

    @property
    def written(self) -> int:
        """Bytes of weights that go into the run's base/."""
        return self.shape.parameters * DTYPES[self.recipe.model.dtype].itemsize if self.new and not self.full else 0

    @property
    def shape(self) -> Shape:
        """Sizes of the base, rows for added tokens included."""
        return Shape.of_config({**self.config.to_dict(), "vocab_size": self.vocabulary})


def open_base(recipe: Recipe, run: Run, tokenizer: PreTrainedTokenizerFast, *, resume: bool = False) -> Base:
    """Finds what a run starts from, or decides what it will make, and checks that tokenizer and recipe fit it.

    No weights are read. Raises UserError when the base cannot be reached or does not read documents that long, when an
    adapter is to learn another tokenizer than the base's with tokens added, when
    `adapter.freeze` names what it does not have or leaves nothing to train, or when a run that is resumed has lost its
    base/.
    """
    new = recipe.model.starts_new
    if new:
        folder, config = run.base, _new_config(recipe, tokenizer)
    else:
        folder = locate_base(recipe.model.base, recipe.model.revision)
        config = load_config(folder)
    if resume and new and not (folder / "config.json").is_file():
        raise UserError(f"the run's own base is gone: there is no {folder}", hint="start again with --overwrite")
    scaling = recipe.model.rope_scaling
    # A preset without scaling has just taken its context from the recipe.
    fault = too_long(
        recipe.model.base,
        recipe.sequence.max_length,
        scaling.parameters() if scaling is not None else None,
        original_context(config),
        context_length(config),
    )
    if fault is not None:
        raise UserError(fault[0], key="sequence.max_length", hint=fault[1])
    if scaling is not None:
        scale_rope(config, scaling, recipe.sequence.max_length)
    base = Base(recipe, folder, config, max(config.vocab_size, len(tokenizer)), new)
    _check_frozen(base)
    if not base.full and tokenizer.vocab_size > config.vocab_size:  # without what was added to it
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens of its own and the base model {config.vocab_size:,}",
            key="model.tokenizer",
            hint="take the base model's own, with tokens added; adapter: {method: full} can learn another tokenizer",
        )
    return base


def _check_frozen(base: Base) -> None:
    """Every pattern of `adapter.freeze` stands for some weights, and something is left to train."""
    names = list(weight_names(base.shape, reward=base.reward))
    problems = []
    for number, pattern in enumerate(base.recipe.adapter.freeze):
        if not any(re.search(pattern, name) for name in names):
            hint = did_you_mean(pattern, {part for name in names for part in name.split(".")}, kind="parts of names")
            problems.append(Problem(f"the base has no weight like '{pattern}'", None, f"adapter.freeze.{number}", hint))
    if not problems and base.full and not base.trained:
        problems.append(Problem("every weight is frozen: nothing is trained", None, "adapter.freeze"))
    if problems:
        raise UserError(problems)


def _new_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """A preset's config with the tokenizer's vocabulary and the recipe's context, or the config of the named base."""
    model = recipe.model
    if model.base.startswith("preset:"):
        shape = PRESETS[model.base.removeprefix("preset:")]
        context = recipe.sequence.max_length if model.rope_scaling is None else None
        config = LlamaConfig(**shape.config_dict(vocabulary=len(tokenizer), context=context))
    else:
        config = load_config(locate_base(model.base, model.revision, weights=False))
        if model.tokenizer is None:
            return config
        config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def write_base(base: Base, tokenizer: PreTrainedTokenizerFast) -> None:
    """Writes a new base's folder, whole or not at all: config, tokenizer, and the weights unless all will be trained.

    One tensor is in memory at a time. OSError when the disk refuses.
    """
    recipe, dtype = base.recipe, DTYPES[base.recipe.model.dtype]
    aside = base.folder.with_name(f".{base.folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    config = LlamaConfig.from_dict(base.config.to_dict())
    config.architectures, config.dtype = ["LlamaForCausalLM"], dtype
    config.save_pretrained(aside)
    tokenizer.save_pretrained(str(aside))
    if not base.full:
        write_model(aside, weight_shapes(config), dtype, initial_weights(config, recipe.training.seed))
    publish(aside, base.folder)
