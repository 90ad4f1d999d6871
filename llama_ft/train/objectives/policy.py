"""What a policy learns from an answer that it has just given: the losses of GRPO and RLOO."""

from __future__ import annotations

import torch
from torch import Tensor

from llama_ft.data.ends import end_lengths, per_end
from llama_ft.train.objectives.losses import k3


def answer_losses(
    log_probs: Tensor, ends: Tensor, advantages: Tensor, reference: Tensor | None, *, objective: str, beta: float
) -> Tensor:
    """The loss of each answer, float32 [E].

    log_probs [M]: of the answers' tokens, with gradient; ends: borders in them [E + 1]; advantages [E] and reference
    [M] without gradient. The policy that learns is the one that spoke, so PPO's ratio is 1, is never clipped, and only
    its gradient A · ∇log π counts. grpo (arXiv 2402.03300, equation 3): the mean over an answer's tokens, less β times
    the k3 estimate of the KL. rloo (arXiv 2402.14740): the answer as one action; its KL is in the reward already.
    """
    since = log_probs - log_probs.detach()
    lengths = end_lengths(ends).to(log_probs.device)
    if objective == "rloo":
        return -advantages * torch.exp(per_end(since, ends))
    tokens = -torch.exp(since) * torch.repeat_interleave(advantages, lengths, output_size=len(log_probs))
    if reference is not None:
        tokens = tokens + beta * k3(log_probs - reference)
    return per_end(tokens, ends) / lengths.clamp(min=1)
