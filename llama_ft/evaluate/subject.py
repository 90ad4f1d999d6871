"""A model that is measured: what documents cost it, which ending it prefers, and what it answers.

Documents lie end to end without padding, prompts of several endings are read once, and answers are drawn side by side
(llama_ft/llama/sampling.py). Nothing here knows of suites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from llama_ft.data.render import MASKED, Renderer
from llama_ft.errors import UserError
from llama_ft.evaluate.answers import Answer, Stops, read_answer, seed_of
from llama_ft.llama.context import context_length, rope_of
from llama_ft.llama.head import CHUNK_BYTES
from llama_ft.llama.sampling import sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llama_ft.llama.model import LlamaForCausalLM

__all__ = ["Answer", "Cost", "Subject"]

READ_AT_ONCE = {"cpu": 4096, "cuda": 32768}
"""Tokens of documents in one forward pass."""
CACHE_BYTES = {"cpu": 2**30, "cuda": 6 * 2**30}
"""Keys and values of the answers that are drawn together, prompts included."""
Document = tuple[Sequence[int], Sequence[int]]
"""Token ids, and labels of the same length (−100: not scored)."""
Tick = Callable[[int], None]
"""Told how many more items are done."""


class Cost(NamedTuple):
    """What a document costs: `nats` in all, over `tokens` labelled ones, of which `hits` were the model's own guess."""

    nats: float
    tokens: int
    hits: int


class Subject:
    """A model under a name, with the template it is asked in.

    `renderer` writes prompts (its template refuses all conversations where the model has none); `stop`: ids that end an
    answer; `context`: tokens that it reads; `system`: the system prompt that all rows of its run had, or None;
    `fingerprint` changes when the weights do; `notices`: for the user.
    """

    def __init__(
        self,
        name: str,
        model: LlamaForCausalLM,
        renderer: Renderer,
        stop: frozenset[int],
        *,
        system: str | None = None,
        fingerprint: str = "",
        notices: Sequence[str] = (),
    ):
        self.name, self.model, self.renderer, self.stop = name, model, renderer, stop
        self.system, self.fingerprint, self.notices = system, fingerprint, tuple(notices)
        self.context = context_length(model.config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The renderer's."""
        return self.renderer.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.model.model.embed_tokens.weight.device

    @property
    def computed_in(self) -> str:
        """`float32 on cpu`: what the numbers were computed with."""
        return f"{str(self.model.model.embed_tokens.weight.dtype).removeprefix('torch.')} on {self.device.type}"

    def nll(self, documents: Sequence[Document]) -> list[tuple[float, int]]:
        """(nats, labelled tokens) of each document; the first token of a document is predicted by nothing."""
        return [(cost.nats, cost.tokens) for cost in self.costs(documents)]

    def costs(self, documents: Sequence[Document], tick: Tick | None = None) -> list[Cost]:
        """The same, with how many labelled tokens the model would have said itself. A document without a label costs
        nothing. UserError for one that is longer than the model reads."""
        found = [Cost(0.0, 0, 0)] * len(documents)
        for part in self._packs([len(ids) for ids, _ in documents]):
            ids: list[np.ndarray] = []
            rows, targets, owners = [], [], []
            start = 0
            for number in part:
                tokens, labels = (np.asarray(side, dtype=np.int64) for side in documents[number])
                places = np.nonzero(labels[1:] != MASKED)[0]
                rows.append(start + places)
                targets.append(labels[1:][places])
                owners.append(np.full(len(places), number))
                ids.append(tokens)
                start += len(tokens)
            owner = np.concatenate(owners)
            log_probs, hits = self._log_probs(np.concatenate(ids), [len(one) for one in ids], rows, targets)
            for number in part:
                own = owner == number
                found[number] = Cost(-float(log_probs[own].sum()), int(own.sum()), int(hits[own].sum()))
            if tick is not None:
                tick(len(part))
        return found

    def losses(self, ids: Sequence[int]) -> np.ndarray:
        """Nats of every token of one document but its first, float64 [tokens − 1]. UserError as :meth:`costs`."""
        list(self._packs([len(ids)]))
        tokens = np.asarray(ids, dtype=np.int64)
        found, _ = self._log_probs(tokens, [len(tokens)], [np.arange(len(tokens) - 1)], [tokens[1:]])
        return -found

    def endings(
        self, questions: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]], tick: Tick | None = None
    ) -> list[list[float]]:
        """log p(ending | prompt) in nats of each ending of each (prompt, endings); the prompt is read once for all."""
        if rope_of(self.model.config)["rope_type"] == "dynamic":  # it turns a prompt by its document's whole length
            return self._endings_apart(questions, tick)
        lengths = [len(prompt) + sum(map(len, endings)) for prompt, endings in questions]
        found: list[list[float]] = [[] for _ in questions]
        for part in self._packs(lengths, [len(p) + max(map(len, e), default=0) for p, e in questions]):
            ids: list[int] = []
            sizes: list[int] = []
            shared: list[int] = []
            rows, targets, counts = [], [], []
            for number in part:
                prompt, endings = questions[number]
                last, segment = len(ids) + len(prompt) - 1, len(sizes)
                ids += prompt
                sizes.append(len(prompt))
                shared.append(-1)
                for ending in endings:
                    counts.append((number, len(ending)))
                    if not ending:
                        continue  # it says nothing, and costs nothing
                    rows.append(np.array([last, *range(len(ids), len(ids) + len(ending) - 1)]))
                    targets.append(np.asarray(ending, dtype=np.int64))
                    ids += ending
                    sizes.append(len(ending))
                    shared.append(segment)
            log_probs, _ = self._log_probs(np.asarray(ids), sizes, rows, targets, shared)
            bounds = [0, *accumulate(count for _, count in counts)]
            for place, (number, _) in enumerate(counts):
                found[number].append(float(log_probs[bounds[place] : bounds[place + 1]].sum()))
            if tick is not None:
                tick(len(part))
        return found

    def _endings_apart(self, questions: Any, tick: Tick | None) -> list[list[float]]:
        documents = [
            ([*prompt, *ending], [MASKED] * len(prompt) + list(ending))
            for prompt, endings in questions
            for ending in endings
        ]
        costs = iter(self.costs(documents))
        found = [[-next(costs).nats for _ in endings] for _, endings in questions]
        if tick is not None:
            tick(len(found))
        return found

    def _packs(self, sizes: Sequence[int], longest: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Numbers of items to read together, in order. `longest`: of each, the longest document in it."""
        for number, length in enumerate(sizes if longest is None else longest):
            if length > self.context:
                what = f"item {number} is {length} tokens long, {self.name} reads {self.context}"
                raise UserError(what, hint="leave it out, or evaluate a model with a longer context")
        limit = READ_AT_ONCE["cpu" if self.device.type == "cpu" else "cuda"]
        part: list[int] = []
        tokens = 0
        for number, size in enumerate(sizes):
            if part and tokens + size > limit:
                yield part
                part, tokens = [], 0
            part.append(number)
            tokens += size
        if part:
            yield part

    @torch.no_grad()
    def _log_probs(
        self,
        ids: np.ndarray,
        sizes: Sequence[int],
        rows: Sequence[np.ndarray],
        targets: Sequence[np.ndarray],
        shared: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """float64 log-probabilities of `targets` at tokens `rows` of segments laid end to end, and which of them are
        the most probable. Logits are made in chunks, as the loss head does."""
        asked, wanted = (torch.from_numpy(np.concatenate(side)) for side in (rows, targets))
        if not len(asked):
            return np.empty(0), np.empty(0, bool)
        device = self.device
        hidden = self.model.model.hidden_of(
            torch.from_numpy(ids)[None].to(device),
            asked.to(device),
            cu_seqlens=[0, *accumulate(sizes)],
            shared=shared,
        )
        wanted = wanted.to(device)
        size = max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (4 * self.model.config.vocab_size))
        found, hits = [], []
        for start in range(0, len(wanted), size):
            logits = self.model.lm_head(hidden[start : start + size]).float()
            target = wanted[start : start + size, None]
            found.append((logits.gather(-1, target).squeeze(-1) - logits.logsumexp(-1)).double().cpu())
            hits.append((logits.argmax(-1) == target.squeeze(-1)).cpu())
        return torch.cat(found).numpy(), torch.cat(hits).numpy()

    def answers(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        samples: int = 1,
        tick: Tick | None = None,
        seeds: Sequence[int] | None = None,
        ends: frozenset[int] | None = None,
    ) -> list[list[Answer]]:
        """`samples` answers of up to max_tokens to each prompt (ids). temperature 0: greedy, token for token what
        transformers' generate gives in float32. stop: strings that an answer ends before; ends: ids that end it, in
        place of the subject's own.

        An answer is drawn by `seed` and the numbers of its prompt and sample, or by its prompt's own of `seeds` and the
        number of the sample, whatever is drawn beside it. One to a prompt that leaves less room in the context is
        shorter; without any room it is empty, ended by length.
        """
        found: list[list[Answer]] = [[Answer("", [], "length")] * samples for _ in prompts]
        ended = Stops(self.tokenizer, stop) if stop else None
        own = [(seed, number) if seeds is None else (seeds[number], 0) for number in range(len(prompts))]
        for part, room in self._batches([len(prompt) for prompt in prompts], max_tokens, samples):
            groups = sample(
                self.model,
                [list(prompts[number]) for number in part],
                answers=samples,
                max_new_tokens=room,
                temperature=temperature,
                top_p=top_p,
                stop=self.stop if ends is None else ends,
                seeds=[seed_of(*own[number], one) for number in part for one in range(samples)],
                finished=ended,
            )
            for number, group in zip(part, groups, strict=True):
                found[number] = [read_answer(self.tokenizer, prompts[number], one, stop) for one in group]
            if tick is not None:
                tick(len(part))
        return found

    def _batches(self, lengths: Sequence[int], max_tokens: int, samples: int) -> Iterator[tuple[list[int], int]]:
        """(numbers of prompts, tokens that their answers may have): prompts of like length, as many as memory takes."""
        config, heads = self.model.config, self.model.model.heads
        width = 2 * config.num_hidden_layers * heads.key_value * heads.dim
        per_token = width * self.model.model.embed_tokens.weight.element_size()
        most = CACHE_BYTES["cpu" if self.device.type == "cpu" else "cuda"] // per_token
        # `dynamic` RoPE turns an answer by its final length, which the sampler cannot know beyond the original context.
        dynamic = rope_of(config)["rope_type"] == "dynamic"
        context = config.max_position_embeddings if dynamic else self.context
        rooms = [min(max_tokens, context - length) for length in lengths]
        order = sorted(
            (n for n, room in enumerate(rooms) if room > 0 and lengths[n]), key=lambda n: (-rooms[n], lengths[n], n)
        )
        part: list[int] = []
        for number in order:
            cost = lengths[number] + samples * rooms[number]  # the longest so far: shorter prompts are filled up to it
            if part and (rooms[number] != rooms[part[0]] or (len(part) + 1) * cost > most):
                yield part, rooms[part[0]]
                part = []
            part.append(number)
        if part:
            yield part, rooms[part[0]]
