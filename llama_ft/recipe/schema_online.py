"""`sampling`, `rewards` and `policy`: objectives that draw answers from the model itself and score them.

grpo and rloo learn from the scores of all answers, rejection_sampling is tuned on the best one of each prompt.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StrictBool, StrictInt

from llama_ft.recipe.section import Finite, NonNegative, Positive, PositiveInt, Section, Text

FUNCTIONS = ("exact_match", "format", "length", "code")
"""What `function` knows by name; any other is FILE.py:NAME."""


class Sampling(Section):
    """How answers are drawn: grpo, rloo, rejection_sampling."""

    answers: PositiveInt = 8
    """K, answers per prompt: a group of GRPO (arXiv 2402.03300), of RLOO (2402.14740), best of K (2307.09288)."""
    max_new_tokens: PositiveInt = 256
    """Longest answer, in tokens; one that does not end before is cut there, and counted."""
    temperature: NonNegative = 1.0
    """Logits are divided by this before they become probabilities."""
    top_p: Annotated[StrictInt, Field(ge=1, le=1)] | Annotated[Finite, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that hold this much probability. grpo and rloo need 1: below it the model's
    log-probabilities are not those that answers were drawn with."""


class Reward(Section):
    """One part of an answer's score: a reward model or a function. The score is the sum of weight times value."""

    model: Text | None = None
    """A reward model: the run of a recipe with objective reward, or a folder in HF's layout (num_labels 1)."""
    function: Text | None = None
    """`exact_match` (the last number, or else the text, is that of the row's own answer), `format` (the whole answer
    matches the pattern), `length` (0 at the target, down to −1 at twice as many tokens), `code` (the row's own answer
    runs as its tests), or FILE.py:NAME."""
    weight: StrictInt | Finite = 1.0
    """What the value is multiplied by; below 0 it is a penalty."""
    pattern: Text | None = None
    """format: a regex of Python's `re` that the whole answer must match."""
    target: PositiveInt | None = None
    """length: tokens that an answer should have."""
    timeout: Positive = 10.0
    """Seconds that a function, or the code that it runs, may take for one answer."""


class Policy(Section):
    """How the policy learns from scores: grpo (arXiv 2402.03300), rloo (2402.14740)."""

    kl: NonNegative = 0.04
    """β of the KL to the reference: grpo has it in the loss (k3 estimator, arXiv 2402.03300), rloo in the reward, per
    answer, as Llama 2's PPO (2307.09288, eq. 4: 0.01 for 7B and 13B, 0.005 for larger). 0 needs no reference."""
    whiten: StrictBool = False
    """rloo: rewards are whitened over the batch, as in Llama 2 (arXiv 2307.09288, section 3.2.3); grpo always
    normalises within each prompt's answers."""
    max_kl: Positive | None = None
    """A mean KL per token above this warns `kl-runaway`; null: no limit."""
