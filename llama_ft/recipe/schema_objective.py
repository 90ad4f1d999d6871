"""`preference` and `reward_model`: what the losses on pairs and on judged answers are made of.

A recipe may state only the keys that its objective reads (check_objective.py); the others mean nothing and are left out
where a recipe is written down. Policies that sample have their own sections in schema_online.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt

from llama_ft.recipe.section import Finite, NonNegative, Positive, Section

Loss = Literal["sigmoid", "ipo", "hinge", "robust"]
Reference = Literal["auto", "adapter_off", "precomputed", "copy"]


class Preference(Section):
    """The losses that compare answers: dpo, kto, orpo, simpo. `reference` is read by grpo and rloo too.

    A reward here is β · log(π/π_ref) of an answer; simpo's is β · log π per token and has no reference.
    """

    loss: Loss = "sigmoid"
    """dpo: `sigmoid` (arXiv 2305.18290), `ipo` (2310.12036), `hinge` (SLiC, 2305.10425), `robust` (2403.00409)."""
    beta: Positive = 0.1
    """dpo, kto: β, how strongly the reference holds (arXiv 2305.18290; Zephyr 0.01, length-normalised Tülu 3 5).
    simpo: the scale of log-probabilities per token (2405.14734 takes 2 to 2.5). orpo: λ, the weight of the odds ratio
    (2403.07691)."""
    label_smoothing: Annotated[StrictInt, Field(ge=0, le=0)] | Annotated[Finite, Field(ge=0, lt=0.5)] = 0.0
    """dpo with `sigmoid` (conservative) or `robust`: the share of pairs that are labelled the wrong way round
    (arXiv 2403.00409)."""
    length_normalised: StrictBool = False
    """dpo with `sigmoid`: log-probabilities are divided by the answer's labelled tokens, as in Tülu 3
    (arXiv 2411.15124)."""
    sft_weight: NonNegative = 0.0
    """dpo, simpo: adds this times the chosen answer's negative log-likelihood per token (arXiv 2404.19733)."""
    margin: NonNegative = 0.5
    """simpo: γ, by how much the chosen answer's reward is to lead (arXiv 2405.14734)."""
    desirable_weight: Positive = 1.0
    """kto: λ_D, the weight of desirable answers (arXiv 2402.01306)."""
    undesirable_weight: Positive = 1.0
    """kto: λ_U, the weight of undesirable answers (arXiv 2402.01306 keeps λ·count of both within 1 to 4/3)."""
    reference: Reference = "auto"
    """dpo, kto, grpo, rloo: the model as it was before. `adapter_off` switches the adapter off, `precomputed` reads
    log-probabilities made once before training and kept by hash, `copy` holds a second, frozen model. `auto` takes
    adapter_off for lora and qlora; for full precomputed, or copy where answers are sampled and policy.kl is above 0."""


class RewardModel(Section):
    """The pairwise ranking loss of objective reward: −log σ(r_chosen − r_rejected − m) (arXiv 2307.09288, eq. 2)."""

    margin: StrictBool = False
    """m is the pair's margin by rating, where its row has one (arXiv 2307.09288, section 3.2.2); false: 0."""
    center: NonNegative = 0.0
    """Coefficient of (r_chosen + r_rejected)², which keeps rewards near 0 (arXiv 2312.09244 takes 0.01)."""
