"""Tokens one by one: greedy or nucleus sampling over a KV cache that is kept from turn to turn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from llama_ft.llama.model import LlamaForCausalLM


class Generator:
    """Continues token ids with one model. The next prompt only costs what differs from what was seen before."""

    def __init__(self, model: LlamaForCausalLM, stop: frozenset[int], context: int, seed: int | None = None):
        """stop: ids that end an answer; context: tokens in all; seed: of the sampling, None = another each time."""
        self.model, self.stop, self.context = model, stop, context
        self.random = torch.Generator()
        if seed is None:
            self.random.seed()
        else:
            self.random.manual_seed(seed)
        self._forget()

    def _forget(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.seen: list[int] = []

    def stream(self, ids: list[int], *, max_tokens: int, temperature: float, top_p: float) -> Iterator[int]:
        """Yields up to `max_tokens` ids that continue `ids`, without the one that ends the answer.

        temperature 0 is greedy. The caller may stop iterating, or be interrupted, at any time.
        """
        self._rewind(ids)
        fed = ids[len(self.seen) :]
        for _ in range(min(max_tokens, self.context - len(ids))):
            token = pick(self._step(fed), temperature, top_p, self.random)
            if token in self.stop:
                return
            yield token
            fed = [token]

    @torch.inference_mode()
    def _step(self, fed: list[int]) -> Tensor:
        """Logits [V] float32 after `fed`; the cache grows by it."""
        try:
            ids = torch.tensor([fed], device=self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        except BaseException:  # Ctrl-C too: some layers may have cached the tokens and others not
            self._forget()
            raise
        self.seen += fed
        return out.logits[0, -1].float().cpu()

    def _rewind(self, ids: list[int]) -> None:
        """Keeps of the cache what `ids` begins with, without its last token: that one gives the first logits."""
        common = 0
        for left, right in zip(self.seen, ids[:-1], strict=False):
            if left != right:
                break
            common += 1
        if common == 0:
            self._forget()
        elif common < len(self.seen):
            self.cache.crop(common - len(self.seen))  # negative: that many off the end
            self.seen = self.seen[:common]


def pick(logits: Tensor, temperature: float, top_p: float, random: torch.Generator) -> int:
    """A token from logits [V]: the best at temperature 0, else a draw from the smallest set with probability ≥ top_p.

    Nucleus sampling: arXiv 1904.09751. The best token is always in the set.
    """
    if temperature < 1e-5:  # so small that the logits would overflow: greedy in all but name
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, -1).sort(descending=True, stable=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[0] = False
    probabilities[outside] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=random)])
