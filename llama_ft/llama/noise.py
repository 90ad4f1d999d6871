"""NEFTune: noise on the embeddings while training (arXiv 2310.05914, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def add_noise(tokens: Tensor, bounds: Sequence[int], alpha: float) -> Tensor:
    """tokens [N, hidden] plus uniform noise in ±alpha / √(L · hidden), L the length of a token's own document.

    bounds: where documents lie, 0 = b₀ < b₁ < … = N. The paper's L is the length of a sequence; laid end to end with
    others a document gets the noise that it would get alone.
    """
    borders = torch.tensor(bounds, device=tokens.device)
    lengths = borders.diff()
    reach = (alpha / (lengths * tokens.shape[1]).sqrt()).repeat_interleave(lengths, output_size=len(tokens))
    noise = torch.empty_like(tokens).uniform_(-1.0, 1.0)
    return tokens + noise * reach.to(tokens.dtype)[:, None]
