"""What Meta's models took, as their papers print it: the check of the planner's hours, and marks on its chart."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.llama.shapes import PRESETS, Shape
from llama_ft.plan.compute import TRAINING, Point
from llama_ft.plan.compute_shape import exact_flops
from llama_ft.plan.hardware import CARDS

UTILISATION = 0.47
"""Of 312 TFLOP/s, by C = 6ND: the default. LLaMA 65B's 380 tokens/s per A100 (arXiv 2302.13971 §2.4) are 0.477."""
TOKENS_PER_SECOND_65B = 380.0
CARD = CARDS["A100-80GB"]
LLAMA, LLAMA_2 = "LLaMA", "Llama 2"
SOURCES = {LLAMA: "arXiv 2302.13971, tables 2 and 15", LLAMA_2: "arXiv 2307.09288, tables 1 and 2"}


@dataclass(frozen=True)
class Published:
    """One model's training. hours: of A100-80GB, summed over GPUs; tokens: of training."""

    family: str
    size: str
    preset: str
    tokens: float
    hours: float

    @property
    def shape(self) -> Shape:
        """Its sizes."""
        return PRESETS[self.preset]

    @property
    def point(self) -> Point:
        """Its parameters and tokens."""
        return Point(self.shape.parameters, self.tokens)

    @property
    def exact(self) -> float:
        """FLOP of training by :func:`exact_flops`, in rows of the model's context."""
        return exact_flops(self.shape, self.shape.context) * self.tokens

    @property
    def rate(self) -> float:
        """Tokens per second and GPU."""
        return self.tokens / self.hours / 3600

    def utilisation(self, *, exact: bool = False) -> float:
        """Share of the card's dense bfloat16 rate, by 6ND or by the exact FLOP."""
        return (self.exact if exact else self.point.compute) / (self.hours * 3600 * CARD.flops)

    def planned(self, utilisation: float = UTILISATION, *, exact: bool = False) -> float:
        """GPU-hours at a share of the card's rate."""
        return gpu_hours(self.exact if exact else self.point.compute, CARD.flops, utilisation)


PUBLISHED = (
    Published(LLAMA, "7B", "llama-1-7b", 1.0e12, 82_432),
    Published(LLAMA, "13B", "llama-1-13b", 1.0e12, 135_168),
    Published(LLAMA, "33B", "llama-1-33b", 1.4e12, 530_432),
    Published(LLAMA, "65B", "llama-1-65b", 1.4e12, 1_022_362),
    Published(LLAMA_2, "7B", "llama-2-7b", 2.0e12, 184_320),
    Published(LLAMA_2, "13B", "llama-2-13b", 2.0e12, 368_640),
    Published(LLAMA_2, "70B", "llama-2-70b", 2.0e12, 1_720_320),
)
"""Llama 2's 34B (1,038,336 hours) was not released, and its shape not published."""


def gpu_hours(flops: float, rate: float, utilisation: float) -> float:
    """Hours of one device of `rate` FLOP/s for so much work."""
    return flops / (rate * utilisation) / 3600


def said_utilisation() -> float:
    """What the 65B's published tokens per second are by 6ND."""
    return TOKENS_PER_SECOND_65B * TRAINING * PRESETS["llama-1-65b"].parameters / CARD.flops
