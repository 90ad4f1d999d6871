"""The losses of alignment, as functions of numbers per answer: no model, no batch, no configuration.

All tensors are float32 [items]. A log-ratio is log π(answer) − log π_ref(answer), summed over the answer's labelled
tokens; lengths are their number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DPO_LOSSES = ("sigmoid", "ipo", "hinge", "robust")


def dpo(delta: Tensor, loss: str, beta: float, smoothing: float = 0.0) -> Tensor:
    """Of pairs, from the chosen answer's log-ratio less the rejected one's; for `ipo` each divided by its length.

    sigmoid: −log σ(βΔ) (arXiv 2305.18290), with label smoothing −(1 − ε) log σ(βΔ) − ε log σ(−βΔ), cDPO. robust: that
    of labels flipped with probability ε, unbiased (arXiv 2403.00409). hinge: max(0, 1 − βΔ) (arXiv 2305.10425). ipo:
    (Δ − 1 / 2β)² (arXiv 2310.12036, equation 17; its authors divide by the length, as TRL does).
    """
    right, wrong = F.logsigmoid(beta * delta), F.logsigmoid(-beta * delta)
    if loss == "sigmoid":
        return -(1 - smoothing) * right - smoothing * wrong
    if loss == "robust":
        return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)
    if loss == "hinge":
        return torch.relu(1 - beta * delta)
    assert loss == "ipo", loss
    return (delta - 1 / (2 * beta)).square()


def simpo(chosen: Tensor, rejected: Tensor, beta: float, margin: float) -> Tensor:
    """−log σ(β(p_c − p_r) − γ) of log-probabilities per token, without a reference (arXiv 2405.14734)."""
    return -F.logsigmoid(beta * (chosen - rejected) - margin)


def log_odds(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log of the ratio of odds p / (1 − p), where log p is the mean log-probability per token (arXiv 2403.07691)."""
    return (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0 without cancellation: the branch at −log 2 is Mächler's (Rmpfr, 2012)."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)  # certain to the last bit: finite odds all the same
    near = torch.log(-torch.expm1(x))
    return torch.where(x > -0.6931472, near, torch.log1p(-torch.exp(x)))


def kto(ratio: Tensor, kl: Tensor | float, desirable: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """Of judged answers (arXiv 2402.01306, equation 7): λ_D (1 − σ(β(r − z))), λ_U (1 − σ(β(z − r))).

    kl: z, a scalar that carries no gradient. desirable: bool. weights: λ of good and of bad answers.
    """
    above = beta * (ratio - kl)
    good, bad = weights
    return torch.where(desirable, good * (1 - torch.sigmoid(above)), bad * (1 - torch.sigmoid(-above)))


def ranking(chosen: Tensor, rejected: Tensor, margin: Tensor | float, center: float) -> Tensor:
    """−log σ(r_c − r_r − m) + c (r_c + r_r)² of scores: Llama 2's ranking loss (arXiv 2307.09288, equation 2).

    The second term keeps rewards near zero (arXiv 2312.09244).
    """
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected).square()


def k3(log_ratio: Tensor) -> Tensor:
    """An estimate of KL(π ‖ π_ref) at a token drawn from π: e^(−d) − 1 + d for d = log π − log π_ref, never negative.

    Schulman's third estimator, as in GRPO (arXiv 2402.03300, equation 4).
    """
    return torch.exp(-log_ratio) - 1 + log_ratio


def group_advantages(rewards: Tensor, answers: int) -> Tensor:
    """GRPO's: a reward's distance from the mean of its group in that group's standard deviations.

    rewards [prompts · answers], a group's side by side. A group whose answers are all alike gives zeros.
    """
    groups = rewards.view(-1, answers)
    centred = groups - groups.mean(-1, keepdim=True)
    return (centred / (groups.std(-1, keepdim=True) + 1e-4)).flatten()  # 1e-4: TRL's


def leave_one_out(rewards: Tensor, answers: int) -> Tensor:
    """RLOO's (arXiv 2402.14740): a reward less the mean of the other rewards of its group."""
    groups = rewards.view(-1, answers)
    others = (groups.sum(-1, keepdim=True) - groups) / (answers - 1)
    return (groups - others).flatten()
