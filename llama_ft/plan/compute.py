"""How large a model and how many tokens: scaling laws, and LLaMA's answer to them. Arithmetic alone, no torch.

A law says the loss, in nats per token, of a model of N parameters (embeddings among them) trained on D tokens:

    L(N, D) = E + A / N^α + B / D^β                      (Hoffmann et al., arXiv 2203.15556, equation 2)

With x = A/N^α, y = B/D^β and C = 6·N·D FLOP of training, the least loss for C, the least C for a loss, the best D for
an N and the best N for a D all stand where α·x = β·y (Lagrange). From there:

    N(C) = G·(C/6)^(β/(α+β)),   D(C) = C / 6N,   G = (αA / βB)^(1/(α+β))          (equation 4 there)

LLaMA (arXiv 2302.13971 §1) asks for something else: a model of that loss that is cheap to *use*, smaller and trained
for longer. With S tokens to be served over the model's life, 2·N FLOP each, Sardana & Frankle (arXiv 2401.00448,
equation 3) minimise 6·N·D + 2·N·S along L(N, D) = ℓ. The derivative along that line is 6D − 6D·(αx / βy) + 2S, so that
a model is the best one for just

    S = 3·D·(αx / βy − 1)

served tokens: none where α·x = β·y, more the smaller and longer trained it is. This has no closed form in N; it grows
steadily as N shrinks, and :func:`Fit.served` halves an interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TRAINING, SERVING = 6.0, 2.0
"""FLOP per parameter and token: forward 2, backward 4 (Kaplan et al., arXiv 2001.08361 §2.1)."""
RATIO = 20.0
"""Tokens per parameter of Chinchilla itself: 70B and 1.4T (arXiv 2203.15556 §4), the rule of thumb that came of it."""


@dataclass(frozen=True)
class Point:
    """A model to train. parameters: N; tokens: D."""

    parameters: float
    tokens: float

    @property
    def compute(self) -> float:
        """FLOP of training: C = 6·N·D."""
        return TRAINING * self.parameters * self.tokens

    @property
    def ratio(self) -> float:
        """Tokens per parameter."""
        return self.tokens / self.parameters

    def lifetime(self, served: float) -> float:
        """FLOP of training and of `served` tokens: 6·N·D + 2·N·S."""
        return self.compute + SERVING * self.parameters * served


@dataclass(frozen=True)
class Fit:
    """L(N, D) = e + a/N^alpha + b/D^beta: loss in nats per token of the data that it was fitted on."""

    name: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float
    source: str

    def loss(self, point: Point) -> float:
        """L(N, D)."""
        return self.e + self.a / point.parameters**self.alpha + self.b / point.tokens**self.beta

    def for_compute(self, compute: float) -> Point:
        """The least loss for C FLOP of training."""
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = g * (compute / TRAINING) ** (self.beta / (self.alpha + self.beta))
        return Point(parameters, compute / TRAINING / parameters)

    def for_parameters(self, parameters: float) -> Point:
        """The compute-optimal D of an N: y = αx/β."""
        y = self.alpha / self.beta * self.a / parameters**self.alpha
        return Point(parameters, (self.b / y) ** (1 / self.beta))

    def for_tokens(self, tokens: float) -> Point:
        """The compute-optimal N of a D: x = βy/α."""
        x = self.beta / self.alpha * self.b / tokens**self.beta
        return Point((self.a / x) ** (1 / self.alpha), tokens)

    def for_loss(self, loss: float) -> Point:
        """The least compute for a loss above e: x = (ℓ − e)·β/(α + β)."""
        x = (loss - self.e) * self.beta / (self.alpha + self.beta)
        return Point((self.a / x) ** (1 / self.alpha), (self.b / (loss - self.e - x)) ** (1 / self.beta))

    def tokens_for(self, loss: float, parameters: float) -> float | None:
        """D with L(N, D) = ℓ; None where no number of tokens brings a model of N parameters there."""
        rest = loss - self.e - self.a / parameters**self.alpha
        return (self.b / rest) ** (1 / self.beta) if rest > 0 else None

    def pays_from(self, point: Point) -> float:
        """Served tokens for which a model is the cheapest one of its loss: S = 3D(αx/βy − 1).

        Negative for a model that is larger than compute-optimal: no amount of serving makes it the cheapest.
        """
        x, y = self.a / point.parameters**self.alpha, self.b / point.tokens**self.beta
        return TRAINING / SERVING * point.tokens * (self.alpha * x / (self.beta * y) - 1)

    def served(self, loss: float, served: float) -> Point:
        """The model of a loss that is cheapest to train and to serve `served` tokens from: argmin 6ND + 2NS."""
        largest = self.for_loss(loss)
        low = math.log(self.a / (loss - self.e)) / self.alpha  # at this ln N infinitely many tokens would be needed
        high = math.log(largest.parameters)
        for _ in range(200):  # beyond the last bit of a float
            middle = (low + high) / 2
            tokens = self.tokens_for(loss, math.exp(middle))
            if tokens is None or self.pays_from(Point(math.exp(middle), tokens)) > served:
                low = middle
            else:
                high = middle
        parameters = math.exp(high)
        tokens = self.tokens_for(loss, parameters)
        return Point(parameters, tokens) if tokens is not None else largest


HOFFMANN = Fit(
    "Chinchilla",
    e=math.exp(0.5267228),
    a=math.exp(6.0073404),
    b=math.exp(6.0179186),
    alpha=0.33917084,
    beta=0.2849083,
    source="Hoffmann et al., arXiv 2203.15556, approach 3, the unrounded constants of its TeX source",
)
"""Approach 3 with the constants of the paper's TeX source, which Besiroglu et al. quote: E 1.6934, A 406.4, B 410.7,
α 0.3392, β 0.2849. The text prints α 0.34 and β 0.28; those put the optimum of Gopher's 5.76e23 FLOP at 32B where the
paper itself says 40B (figure 4), the unrounded ones at 40B."""
BESIROGLU = Fit(
    "replicated",
    e=1.8172,
    a=482.01,
    b=2085.43,
    alpha=0.3478,
    beta=0.3658,
    source="Besiroglu et al., arXiv 2404.10102, the same runs fitted again",
)
"""Table 1 there: standard errors 0.03, 124.58, 1293.23, 0.02, 0.02. It agrees with the first two approaches of Hoffmann
et al. and with 20 tokens per parameter, which the third as published does not."""
FITS = (HOFFMANN, BESIROGLU)
MAIN = BESIROGLU
"""The fit that chooses presets and draws the chart."""
SEEN = ((70e6, 16e9), (5e9, 500e9))
"""Parameters and tokens of the runs that both fits come from (arXiv 2203.15556, abstract); all else is extrapolated."""


def rule_for_compute(compute: float) -> Point:
    """20 tokens per parameter: N = √(C / 120)."""
    parameters = math.sqrt(compute / (TRAINING * RATIO))
    return Point(parameters, RATIO * parameters)


def extrapolated(point: Point) -> bool:
    """Whether a model lies outside of what the fits have seen."""
    (least, most), (few, many) = SEEN
    return not (least <= point.parameters <= most and few <= point.tokens <= many)
