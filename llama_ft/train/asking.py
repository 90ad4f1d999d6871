"""Prompts, the answers that a model draws to them, and what the answers are worth.

An answer depends on the weights, its prompt and a seed of its own, so a run draws the same ones whatever else is in a
batch, however many processes share the work, and after every resume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_ft.adapters.quantised import unpacked
from llama_ft.data.batches import origins
from llama_ft.data.examples import Conversation
from llama_ft.data.prepare import Prepared
from llama_ft.data.render import Renderer
from llama_ft.errors import UserError
from llama_ft.llama.context import context_length, rope_of
from llama_ft.llama.sampling import Sampled, sample
from llama_ft.recipe.schema import Recipe
from llama_ft.train.objectives.reference import INDEX
from llama_ft.train.rewards.rewards import Asked, Rewards, Scored

MARGIN = 32
"""Tokens by which a prompt may be longer than the document that it is of."""
MESSAGES = "messages"
"""Column of prepared documents: the conversation, as JSON."""


@dataclass(frozen=True)
class Prompt:
    """A question as the model reads it, up to where it is to answer. `reference`: the row's own last answer.

    `index`: the document's number, which its seeds come from; `place`: where the row stands, for messages.
    """

    ids: list[int]
    turns: Conversation
    reference: str | None
    index: int
    place: str


@dataclass(frozen=True)
class Answer:
    """A drawn answer and its worth. `ids` hold the end token where it came."""

    ids: list[int]
    text: str
    ended: bool
    scored: Scored


class PromptCollator:
    """Documents to prompts: {"prompts": [Prompt …], "origins": …}. What only fills a step up gives none."""

    def __init__(self, prepared: Prepared, places: Any):
        """places: `(index, source, row) -> str`, what messages call a document's row."""
        self.renderer = Renderer(prepared.template, prepared.tokenizer)
        self.places = places

    def __call__(self, documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        spoken = [one for one in documents if one[MESSAGES]]
        return {"prompts": [self.prompt(one) for one in spoken], **(origins(spoken) if spoken else {})}

    def prompt(self, document: Mapping[str, Any]) -> Prompt:
        """The question that a document's last answer answers."""
        turns = json.loads(document[MESSAGES])
        reference = turns[-1]["content"] if turns[-1]["role"] == "assistant" else None
        asked = turns[:-1] if reference is not None else turns
        index = int(document[INDEX])
        place = self.places(index, int(document["source"]), int(document["row"]))
        return Prompt(self.renderer.prompt_ids(asked), asked, reference, index, place)


class Asker:
    """Draws answers with a model and scores them, as `sampling` and `rewards` of a recipe say."""

    def __init__(self, recipe: Recipe, prepared: Prepared, rewards: Rewards, context: int):
        """context: the longest document that the model reads, in tokens."""
        self.recipe, self.rewards, self.context = recipe, rewards, context
        self.tokenizer = prepared.tokenizer
        end = prepared.template.end_token_id(prepared.tokenizer)
        self.stop = frozenset(token for token in (end, prepared.tokenizer.eos_token_id) if token is not None)

    def ask(
        self, model: Any, prompts: Sequence[Prompt], answers: int, seed: int, *, temperature: float | None = None
    ) -> list[list[Answer]]:
        """`answers` answers to each prompt, scored. seed: of this occasion, mixed with each prompt's own number.

        UserError for a prompt that leaves no room for an answer, and as rewards raise it.
        """
        said = self.recipe.sampling
        self._check_room(prompts)
        seeds = [mixed(seed, prompt.index, number) for prompt in prompts for number in range(answers)]
        with unpacked(model, model.get_input_embeddings().weight.dtype):
            drawn = sample(
                model,
                [prompt.ids for prompt in prompts],
                answers=answers,
                max_new_tokens=said.max_new_tokens,
                temperature=float(said.temperature if temperature is None else temperature),
                top_p=float(said.top_p),
                stop=self.stop,
                seeds=seeds,
            )
        return self.score(prompts, drawn)

    def score(self, prompts: Sequence[Prompt], drawn: Sequence[Sequence[Sampled]]) -> list[list[Answer]]:
        """What drawn answers say, and what that is worth."""
        texts: list[list[str]] = []
        for group in drawn:
            decoded: Any = self.tokenizer.batch_decode([one.ids for one in group], skip_special_tokens=True)
            texts.append([text.strip() for text in decoded])
        asked = [
            Asked(
                prompt=prompt.turns,
                answer=text,
                reference=prompt.reference,
                row=prompt.place,
                ids=[*prompt.ids, *one.ids],
                ended=one.ended,
                start=len(prompt.ids),
            )
            for prompt, group, said in zip(prompts, drawn, texts, strict=True)
            for one, text in zip(group, said, strict=True)
        ]
        scored = iter(self.rewards.score(asked))
        return [
            [Answer(one.ids, text, one.ended, next(scored)) for one, text in zip(group, said, strict=True)]
            for group, said in zip(drawn, texts, strict=True)
        ]

    def check_room(self, collate: PromptCollator, *sets: Any) -> None:
        """Looks before the first step whether every prompt leaves room for an answer. sets: numbered documents."""
        most = self.context - self.recipe.sampling.max_new_tokens
        for documents in sets:
            # A prompt is shorter than its document, but for what a template writes where an answer is to come.
            lengths = np.asarray(documents.with_format("numpy")["length"][:])
            long = np.flatnonzero(lengths > most - MARGIN).tolist()
            self._check_room([collate.prompt(documents[number]) for number in long if documents[number][MESSAGES]])

    def _check_room(self, prompts: Sequence[Prompt]) -> None:
        longest = max(prompts, key=lambda prompt: len(prompt.ids), default=None)
        new = self.recipe.sampling.max_new_tokens
        if longest is not None and len(longest.ids) + new > self.context:
            raise UserError(
                f"a prompt of {len(longest.ids):,} tokens and {new:,} new ones are more than the {self.context:,} that "
                "the model reads",
                where=longest.place,
                key="sampling.max_new_tokens",
                hint="lower it, or sequence.max_length, which bounds the rows",
            )


def mixed(seed: int, index: int, number: int) -> int:
    """A seed of 63 bits for answer `number` to prompt `index`, different for all of them."""
    digest = hashlib.blake2b(f"{seed} {index} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def context_of(model: Any) -> int:
    """The longest document that a model reads, in tokens, its RoPE scaling counted in.

    Under `dynamic` scaling answers are drawn within the original context alone (llama_ft/llama/sampling.py).
    """
    dynamic = rope_of(model.config)["rope_type"] == "dynamic"
    return int(model.config.max_position_embeddings) if dynamic else context_length(model.config)


@torch.no_grad()
def figures_of(groups: Sequence[Sequence[Answer]]) -> dict[str, torch.Tensor]:
    """Sums and counts, float64 [2], of what people watch: reward, its parts, spread in a group, length, ends."""
    every = [answer for group in groups for answer in group]
    columns: dict[str, list[float]] = {
        "reward": [answer.scored.total for answer in every],
        "answer_tokens": [float(len(answer.ids)) for answer in every],
        "ended": [float(answer.ended) for answer in every],
    }
    names = list(every[0].scored.parts) if every else []
    if len(names) > 1:
        columns |= {f"reward/{name}": [answer.scored.parts[name] for answer in every] for name in names}
    spread = [
        torch.tensor([answer.scored.total for answer in group]).double().std().item()
        for group in groups
        if len(group) > 1
    ]
    if spread:
        columns["reward_spread"] = spread
    return {name: torch.tensor([sum(values), float(len(values))]).double() for name, values in columns.items()}
