"""Answers drawn from a model: many to each of many prompts, all of them in one forward pass per token.

A prompt is read once, and its keys and values are kept once for all its answers; an answer adds its own. Each token
attends to both parts, and the two softmaxes are merged by their log-sum-exp. An answer is drawn by its own seed, by the
inverse of the cumulative distribution: up to rounding it depends on its prompt, the weights and that seed, not on what
is drawn beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ft.llama.attention import Heads
from llama_ft.llama.kernels import Spans, attend, choose_kernel
from llama_ft.llama.projections import project, project_each
from llama_ft.llama.rope import rotate_

READ_AT_ONCE = 8192
"""Tokens of prompts in one forward pass: enough to fill the products, few beside the keys and values that stay."""
GROWTH = 32
"""Tokens of an answer for which there is room at first; then twice as many, and so on."""
IDLE = 1 / 8
"""Share of finished answers in the batch from which on moving the others together costs less than computing them."""
NUCLEUS = 256
"""Tokens that are sorted for top_p at first: those that a tuned model finds likely are nearly always among them."""
BLOCK = 256
"""Tokens that are summed at once on the way to the one that is drawn: about the root of a vocabulary."""
GREEDY = 1e-5
"""Temperatures below this are greedy: logits would overflow."""


@dataclass(frozen=True)
class Sampled:
    """One answer: its token ids, with the one that ended it, and whether one did."""

    ids: list[int]
    ended: bool


def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    answers: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop: frozenset[int],
    seeds: Sequence[int],
    finished: Callable[[list[int]], bool] | None = None,
) -> list[list[Sampled]]:
    """`answers` answers to each prompt (token ids, at least one), of up to max_new_tokens ≥ 1 tokens.

    model: our LlamaForCausalLM, or a PEFT model around it, whose adapters act as they stand. temperature 0: greedy.
    top_p: draws from the smallest set of tokens with this probability or more (arXiv 1904.09751); 1: from all. stop:
    ids that end an answer. seeds [prompts · answers], 0 ≤ seed < 2⁶⁴: answer j to prompt i has number i·answers + j.
    finished: whether an answer that came so far, its ids, needs no more (it holds a stop string); its `ended` is False.
    Room in the model's context is the caller's business. torch's random numbers are left alone; dropout is off
    meanwhile. Processes that share out the weights (FSDP, ZeRO-3) would wait for one another: each stops with its own
    last answer. ValueError for empty prompts and numbers that do not fit, and for RoPE of type `dynamic` beyond its
    original context, where training turns a whole answer by its final length, which nobody knows yet.
    """
    if len(seeds) != len(prompts) * answers:
        raise ValueError(f"{len(prompts)} prompts with {answers} answers each need as many seeds, got {len(seeds)}")
    if not all(prompts) or max_new_tokens < 1:
        raise ValueError("a prompt has one token or more, and so has an answer")
    if not seeds:
        return [[] for _ in prompts]
    whole: Any = model
    base = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    rotary, config = base.model.rotary_emb, base.config
    longest = max(map(len, prompts)) + max_new_tokens
    if rotary.rope_type == "dynamic" and longest > config.max_position_embeddings:
        raise ValueError(f"rope_type dynamic cannot sample beyond {config.max_position_embeddings} tokens")
    # Philox takes whole 64-bit seeds; torch's own generator would look at half of each.
    draws = [np.random.Generator(np.random.Philox(key=seed)).random(max_new_tokens) for seed in seeds]
    chances = torch.from_numpy(np.stack(draws))
    ids: list[list[int]] = [[] for _ in seeds]
    done: set[int] = set()
    with torch.no_grad(), _generating(model, base):
        batch = _Batch(base, [len(prompt) for prompt in prompts], answers)
        logits = _read(model, base, batch, prompts).repeat_interleave(answers, 0)
        for step in range(max_new_tokens):
            tokens = _draw(logits, chances[batch.numbers, step].to(logits.device), temperature, top_p)
            going = []
            for row, (number, token) in enumerate(zip(batch.numbers, tokens.tolist(), strict=True)):
                if number not in done:
                    ids[number].append(token)
                    if token in stop or (finished is not None and finished(ids[number])):
                        done.add(number)
                    else:
                        going.append(row)
            if not going or step + 1 == max_new_tokens:
                break
            if len(going) <= (1 - IDLE) * len(batch.numbers):
                tokens = tokens[batch.keep(going)]
            batch.advance()
            logits = model(input_ids=tokens[:, None], context=batch).logits[:, 0].float()
    found = [Sampled(answer, answer[-1] in stop) for answer in ids]
    return [found[start : start + answers] for start in range(0, len(found), answers)]


@contextmanager
def _generating(model: nn.Module, base: Any) -> Iterator[None]:
    """Evaluation mode, and no stacking of weights for a few rows: both as they were afterwards."""
    training = [module for module in model.modules() if module.training]
    stacking = [part for layer in base.model.layers for part in (layer.self_attn, layer.mlp) if part.project is project]
    model.eval()
    for part in stacking:
        part.project = project_each  # `project` would copy the weights for each token
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for part in stacking:
            part.project = project


def _read(model: nn.Module, base: Any, batch: _Batch, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits [prompts, V] float32 after each prompt, whose keys and values go into `batch`."""
    device = base.model.embed_tokens.weight.device
    found, first = [], 0
    while first < len(prompts):
        stop, tokens = first + 1, len(prompts[first])
        while stop < len(prompts) and tokens + len(prompts[stop]) <= READ_AT_ONCE:
            tokens += len(prompts[stop])
            stop += 1
        part = prompts[first:stop]
        bounds = [0, *accumulate(map(len, part))]
        input_ids = torch.tensor([[token for prompt in part for token in prompt]], device=device)
        lasts = torch.tensor(bounds[1:], device=device) - 1
        found.append(model(input_ids=input_ids, context=_Reading(batch, first, bounds), logits_to_keep=lasts).logits[0])
        first = stop
    return torch.cat(found).float()


def _draw(logits: Tensor, chance: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token [A] of each row of logits [A, V]: the first whose cumulative probability exceeds chance [A] < 1."""
    if temperature < GREEDY:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits / temperature, -1)
    return _inverse(probabilities if top_p >= 1 else _nucleus(probabilities, top_p), chance).squeeze(-1)


def _inverse(probabilities: Tensor, chance: Tensor) -> Tensor:
    """[A, 1]: where the sums of probabilities [A, V] pass chance [A] of the whole. In float64: of 10⁵ unlikely tokens
    none may be rounded away. First over blocks of tokens, then inside one, which spares most of that."""
    count = probabilities.shape[1]
    blocks = F.pad(probabilities, (0, -count % BLOCK)).unflatten(1, (-1, BLOCK))
    sums = F.pad(blocks.sum(-1, dtype=torch.float64).cumsum(-1), (1, 0))
    wanted = chance[:, None] * sums[:, -1:]
    block = torch.searchsorted(sums[:, 1:].contiguous(), wanted, right=True).clamp_(max=blocks.shape[1] - 1)
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(-1)
    place = torch.searchsorted(inside, wanted - sums.gather(1, block), right=True).clamp_(max=BLOCK - 1)
    return (block * BLOCK + place).clamp_(max=count - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Probabilities [A, V] with zeros outside of the smallest set of each row that has top_p or more of them."""
    best, order = probabilities.topk(min(NUCLEUS, probabilities.shape[1]))
    kept = torch.zeros_like(probabilities).scatter_(1, order, _up_to(top_p, best))
    wide = (best.sum(-1) < top_p).nonzero().squeeze(-1)
    if len(wide):
        best, order = probabilities[wide].sort(descending=True, stable=True)
        kept[wide] = torch.zeros_like(best).scatter_(1, order, _up_to(top_p, best))
    return kept


def _up_to(top_p: float, best: Tensor) -> Tensor:
    """Falling probabilities [A, N] until they come to top_p, then zeros; the first one always."""
    outside = best.cumsum(-1) - best >= top_p
    outside[:, 0] = False
    return best.masked_fill(outside, 0)


class _Reading:
    """Attention context of some prompts laid end to end, whose keys and values are kept in a batch of answers."""

    def __init__(self, batch: _Batch, first: int, bounds: list[int]):
        """first: number of the first of these prompts; bounds: where they lie, 0 = b₀ < b₁ < … = N."""
        self.batch, self.first, self.spans = batch, first, Spans(bounds)
        positions = [torch.arange(stop - start) for start, stop in pairwise(bounds)]
        self.cos, self.sin = batch.turning(torch.cat(positions))

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """See attention.Context."""
        heads = self.batch.heads
        rotate_(heads.turned(qkv), self.cos, self.sin)
        q, k, v = heads.split(qkv)
        for number, (start, stop) in enumerate(pairwise(self.spans.keys), self.first):
            self.batch.keep_prompt(layer, number, k[start:stop], v[start:stop])
        kernel = choose_kernel(self.batch.kernel, q.device, q.dtype, heads.dim)
        return attend("plain" if kernel == "cpu" else kernel, q, k, v, self.spans).flatten(-2)


class _Batch:
    """Attention context of the answers that are being drawn, a token of each at a time, with all that was seen before.

    Keys and values of prompts are [G, KV, P, D], shorter ones filled up with zeros that a mask hides; those of answers
    [A, KV, room, D]. Answers to the same prompt ask its keys side by side, in a grid [G, n] with gaps where some are
    done already.
    """

    def __init__(self, base: Any, lengths: list[int], answers: int):
        model = base.model
        self.heads: Heads = model.heads
        self.kernel: str = model.fast.attention
        self.rotary, self.weight = model.rotary_emb, model.embed_tokens.weight
        self.prompts: list[list[Tensor]] = [[] for _ in model.layers]
        self.own: list[list[Tensor]] = [[] for _ in model.layers]
        self.lengths = torch.tensor(lengths)
        self.numbers = list(range(len(lengths) * answers))
        self.prompt_of = torch.arange(len(lengths)).repeat_interleave(answers)
        self.seen, self.room = 0, 0
        self._lay_out()

    def turning(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of positions [N], as RotaryEmbedding gives them for short documents."""
        return self.rotary(positions.to(self.weight.device), self.weight.dtype)

    def keep_prompt(self, layer: int, number: int, k: Tensor, v: Tensor) -> None:
        """Takes keys and values [P, KV, D] of one prompt."""
        if not self.prompts[layer]:
            shape = (len(self.lengths), self.heads.key_value, int(self.lengths.max()), self.heads.dim)
            self.prompts[layer] = [k.new_zeros(shape), v.new_zeros(shape)]
        for kept, new in zip(self.prompts[layer], (k, v), strict=True):
            kept[number, :, : len(new)] = new.transpose(0, 1)

    def keep(self, rows: list[int]) -> Tensor:
        """Lets all other answers go, and prompts that have none left. Returns `rows` on the device."""
        device = self.weight.device
        self.numbers = [self.numbers[row] for row in rows]
        prompts, self.prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        self.lengths = self.lengths[prompts]
        longest, asked, kept = int(self.lengths.max()), prompts.to(device), torch.tensor(rows, device=device)
        for layer, (read, own) in enumerate(zip(self.prompts, self.own, strict=True)):
            if len(prompts) < len(read[0]):
                self.prompts[layer] = [part[:, :, :longest].index_select(0, asked) for part in read]
            self.own[layer] = [part.index_select(0, kept) for part in own]
        self._lay_out()
        return kept

    def _lay_out(self) -> None:
        """Where each answer stands in the grid, and which keys of the prompts are none."""
        counts = self.prompt_of.bincount()
        self.grid = (len(self.lengths), int(counts.max()))
        firsts = counts.cumsum(0) - counts
        places = torch.arange(len(self.prompt_of)) - firsts[self.prompt_of]
        device = self.weight.device
        self.slots = (self.prompt_of * self.grid[1] + places).to(device)
        keys = torch.arange(int(self.lengths.max()))
        hidden = (keys >= self.lengths[:, None])[:, None, None]  # [G, 1, 1, P]
        self.hidden = hidden.to(device) if bool(hidden.any()) else None

    def advance(self) -> None:
        """Goes to the next token of every answer."""
        if self.seen == self.room:
            self.room = max(GROWTH, 2 * self.room)
            for layer, parts in enumerate(self.own):
                self.own[layer] = [F.pad(part, (0, 0, 0, self.room - self.seen)) for part in parts]
        self.cos, self.sin = self.turning(self.lengths[self.prompt_of] + self.seen)
        self.seen += 1

    def attend(self, qkv: Tensor, layer: int) -> Tensor:
        """See attention.Context: one token of each answer, qkv [A, (H + 2·KV)·D]."""
        heads = self.heads
        rotate_(heads.turned(qkv), self.cos, self.sin)
        q, *new = heads.split(qkv)
        if not self.own[layer]:
            self.own[layer] = [part.new_empty(*part.shape[:2], self.room, heads.dim) for part in new]
        for kept, part in zip(self.own[layer], new, strict=True):
            kept[:, :, self.seen - 1] = part
        q = q.unflatten(1, (heads.key_value, -1))  # [A, KV, H / KV, D]
        own, own_z = _seen(q, [part[:, :, : self.seen] for part in self.own[layer]], None)
        groups, most = self.grid
        asking = q.new_zeros(groups * most, *q.shape[1:]).index_copy_(0, self.slots, q)
        asking = asking.unflatten(0, self.grid).transpose(1, 2).flatten(2, 3)  # [G, KV, n · H / KV, D]
        read, read_z = (
            part.unflatten(2, (most, -1)).transpose(1, 2).flatten(0, 1).index_select(0, self.slots)
            for part in _seen(asking, self.prompts[layer], self.hidden)
        )
        return torch.lerp(own, read, torch.sigmoid(read_z - own_z)).to(qkv.dtype).flatten(1)


def _seen(q: Tensor, keys_values: list[Tensor], hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """What queries [B, KV, Q, D] see of keys and values [B, KV, N, D], and the log-sum-exp of their scores
    [B, KV, Q, 1]; float32. hidden: keys that nobody sees."""
    k, v = keys_values
    scores = (q @ k.transpose(-1, -2)).float().mul_(1 / math.sqrt(q.shape[-1]))
    if hidden is not None:
        scores.masked_fill_(hidden, -math.inf)
    z = scores.logsumexp(-1, keepdim=True)
    return ((scores - z).exp_().to(v.dtype) @ v).float(), z
