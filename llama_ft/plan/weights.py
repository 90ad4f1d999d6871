"""How many weights a recipe loads, trains and stores, counted from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from llama_ft.adapters.sizes import is_frozen, target_sizes, trained_weights, whole_sizes
from llama_ft.llama.shapes import NF4_BYTES, Shape
from llama_ft.recipe.schema import Adapter

FLOAT, HALF = 4, 2
BYTES = {"float32": FLOAT, "bfloat16": HALF, "float16": HALF}
NF4_SINGLE = 0.5 + 4 / 64
"""Bytes per NF4 weight without double quantisation: 4 bits and a float32 scale for 64 (arXiv 2305.14314 §2)."""


@dataclass(frozen=True)
class Weights:
    """The weights of `shape` under `adapter`. `shape.vocabulary` is that of the embedding that is trained."""

    shape: Shape
    adapter: Adapter
    grown: bool = False
    """Whether the tokenizer has more tokens than the base: an adapter then trains embedding and head whole."""
    reward: bool = False
    """Whether a score stands in the head's place, which an adapter trains as well."""

    @property
    def full(self) -> bool:
        """Whether every weight may be trained, and not an adapter."""
        return self.adapter.method == "full"

    @property
    def quantised(self) -> bool:
        """Whether the linear layers are held in 4 or 8 bits."""
        return self.adapter.method == "qlora"

    @property
    def total(self) -> int:
        """Weights of the base; of a reward model with its score and without a head."""
        shape = self.shape
        head = 0 if shape.tied else shape.vocabulary * shape.hidden
        return shape.parameters + (shape.hidden - head if self.reward else 0)

    @cached_property
    def targets(self) -> list[tuple[int, int]]:
        """(out, in) of every projection that carries LoRA factors."""
        return target_sizes(self.shape, self.adapter)

    @property
    def lora(self) -> int:
        """Weights of the factors: Σ r·(in + out) (arXiv 2106.09685)."""
        return self.adapter.r * sum(out + into for out, into in self.targets)

    @property
    def magnitudes(self) -> int:
        """DoRA's lengths, one per row of a target (arXiv 2402.09353)."""
        return sum(out for out, _ in self.targets) if self.adapter.dora else 0

    @cached_property
    def whole(self) -> list[tuple[int, ...]]:
        """Shapes of the base's own weights that are trained whole: all, less `freeze`; or `modules_to_save`."""
        sizes = whole_sizes(self.shape, self.adapter, new_tokens=self.grown, reward=self.reward)
        return sizes[:-1] if self.reward and not self.full else sizes  # a score is none of the base's

    @property
    def trained_whole(self) -> int:
        """Weights of the base that are trained."""
        return sum(prod(size) for size in self.whole)

    @property
    def trained(self) -> int:
        """All weights that training changes."""
        return trained_weights(self.shape, self.adapter, new_tokens=self.grown, reward=self.reward)

    @property
    def head_trained(self) -> bool:
        """Whether the head's own gradient is made."""
        if self.reward:
            return False
        name = "model.embed_tokens.weight" if self.shape.tied else "lm_head.weight"
        if self.full:
            return not is_frozen(name, self.adapter)
        saved = set(self.adapter.modules_to_save)
        return self.grown or "lm_head" in saved or (self.shape.tied and "embed_tokens" in saved)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of every trained matrix, factors among them."""
        factors = [(self.adapter.r, into) for _, into in self.targets]
        factors += [(out, self.adapter.r) for out, _ in self.targets]
        return [*factors, *((size[0], size[1]) for size in self.whole if len(size) == 2)]

    def held(self, element: int) -> int:
        """Bytes of the base as it is loaded: `element` bytes per weight, the linear layers fewer where quantised."""
        linear = self.shape.linear_weights
        other = element * (self.total - linear)
        if not self.quantised:
            return element * self.total
        if self.adapter.bits == 8:
            rows = self.shape.layers * sum(out for out, _ in self.shape.projections.values())
            return other + linear + FLOAT * rows
        return other + round(linear * (NF4_BYTES if self.adapter.double_quant else NF4_SINGLE))

    @property
    def largest_layer(self) -> int:
        """Weights of one block."""
        return self.shape.linear_weights // self.shape.layers + 2 * self.shape.hidden
