"""A reward model that scores answers.

It reads a conversation as its own training wrote it: with its own tokenizer and its own template, whatever the policy's
are. Scored is the last token of the document, as in its training. An answer that was cut off is written as if it had
ended: the model knows no other documents, so a cut shows as an answer that stops in mid-sentence, and is judged as one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from llama_ft.data.ends import lay_out
from llama_ft.data.examples import Conversation
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.template import Template
from llama_ft.errors import UserError, did_you_mean, nearest
from llama_ft.llama.context import context_length
from llama_ft.llama.load import DTYPES, choose_compute_dtype
from llama_ft.llama.reward import LlamaForSequenceClassification, is_reward_model, load_reward_model
from llama_ft.recipe.run import Run
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.train.lock import folder_fingerprint
from llama_ft.train.rewards.asked import Asked

TOKENS = 8192
"""Tokens in one pass: enough to keep a device busy, and of an 8B model half a gigabyte of activations."""


@dataclass(frozen=True)
class Group:
    """Answers to one prompt: the ids that all begin with, what each goes on with, and their numbers among all."""

    prompt: list[int]
    ends: list[list[int]]
    numbers: list[int]

    @property
    def tokens(self) -> int:
        """Tokens that are computed for it where the prompt is computed once."""
        return len(self.prompt) + sum(map(len, self.ends))


class Scorer:
    """A reward model with its tokenizer and template. Higher scores are better, and their zero means nothing."""

    def __init__(self, model: LlamaForSequenceClassification, renderer: Renderer, folder: Path, key: str | None = None):
        self.model, self.renderer, self.folder, self.key = model, renderer, folder, key
        self.context = context_length(model.config)
        # There a token's angle depends on the length of the document that it stands in.
        self.share = model.model.rotary_emb.rope_type != "dynamic"

    @classmethod
    def open(cls, source: str, device: torch.device, *, key: str | None = None) -> Scorer:
        """Loads the merged model of a run with objective reward, or a folder in HF's layout with one label.

        source: a run's folder, its name in runs/, or a model's folder. UserError when it is something else, with the
        nearest one that is, or when its tokenizer has no template.
        """
        folder = locate(source, key)
        tokenizer = load_tokenizer(folder)
        if not tokenizer.chat_template:
            what = f"{folder} has no chat template: nobody knows how it is to be shown a conversation"
            hint = "put the template of its training beside it, as chat_template.jinja"
            raise UserError(what, key=key, hint=hint)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = DTYPES.get(config.get("dtype") or config.get("torch_dtype") or "float32", torch.float32)
        compute = choose_compute_dtype(dtype, device)
        model = load_reward_model(folder, dtype, compute_dtype=compute, device=device)
        model.eval().requires_grad_(False)
        return cls(model, Renderer(Template.load("base", tokenizer), tokenizer), folder, key)

    def values(self, asked: Sequence[Asked]) -> list[float]:
        """The score of each answer, in order.

        UserError for a row that the model's template does not take, or that is longer than the model reads.
        """
        if not asked:
            return []
        documents = self._documents(asked)
        groups = []
        for _, numbers in groupby(range(len(asked)), key=lambda number: asked[number].prompt):
            own = list(numbers)
            groups.append(grouped([documents[number] for number in own], own))
        scores = [0.0] * len(asked)
        for batch in batches(groups, TOKENS):
            found = self._scores(batch)
            for number, score in zip((n for group in batch for n in group.numbers), found, strict=True):
                scores[number] = score
        return scores

    def fingerprint(self) -> Any:
        """Hashes of its weights and its template."""
        return [folder_fingerprint(self.folder), self.renderer.template.sha256]

    def close(self) -> None:
        """Nothing was started."""

    def _documents(self, asked: Sequence[Asked]) -> list[list[int]]:
        renders = []
        for one in asked:
            said: Conversation = [*one.prompt, {"role": "assistant", "content": one.answer}]
            try:
                renders.append(self.renderer.render(said))
            except TemplateRefusal as refusal:
                what = f"the template of the reward model {self.folder} does not take this conversation: {refusal}"
                raise UserError(what, where=one.row, key=self.key) from refusal
        documents = [[int(token) for token in encoded.ids] for encoded in self.renderer.encode(renders)]
        for one, ids in zip(asked, documents, strict=True):
            if len(ids) > self.context:
                what = f"{len(ids):,} tokens with its answer: the reward model {self.folder} reads {self.context:,}"
                hint = "lower sampling.max_new_tokens or sequence.max_length"
                raise UserError(what, where=one.row, key=self.key, hint=hint)
        return documents

    @torch.inference_mode()
    def _scores(self, groups: Sequence[Group]) -> list[float]:
        """One pass over some groups; a score for each end, in order."""
        batch = lay_out([(group.prompt, group.ends) for group in groups], share=self.share)
        device = self.model.device
        return self.model(
            input_ids=batch["input_ids"].to(device),
            position_ids=batch["position_ids"].to(device),
            cu_seqlens=batch["cu_seqlens"],
            shared=batch["shared"],
            rows=batch["last"].to(device),
        ).scores.tolist()


def grouped(documents: Sequence[list[int]], numbers: Sequence[int]) -> Group:
    """Documents with what they have in common in front, and at least one token left of each."""
    shortest = min(map(len, documents))
    common = next((i for i in range(shortest - 1) if len({one[i] for one in documents}) > 1), shortest - 1)
    return Group(documents[0][:common], [one[common:] for one in documents], list(numbers))


def batches(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Groups in order, together at most `most` tokens; a larger group is cut into several, of one end at the least."""
    batch: list[Group] = []
    held = 0
    for group in (part for whole in groups for part in _cut(whole, most)):
        if batch and held + group.tokens > most:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += group.tokens
    if batch:
        yield batch


def _cut(group: Group, most: int) -> Iterator[Group]:
    first, held = 0, len(group.prompt)
    for number, end in enumerate(group.ends):
        if number > first and held + len(end) > most:
            yield Group(group.prompt, group.ends[first:number], group.numbers[first:number])
            first, held = number, len(group.prompt)
        held += len(end)
    yield Group(group.prompt, group.ends[first:], group.numbers[first:])


def locate(source: str, key: str | None = None) -> Path:
    """The folder of a reward model's weights: that of a run is merged/. UserError for anything else, by name."""
    path = next((one for one in (Path(source).expanduser(), Path("runs", source)) if one.is_dir()), None)
    if path is None:
        meant = Path(source).expanduser()
        hint = _hint(meant) if meant.parent.is_dir() else "train one with training.objective: reward"
        raise UserError(f"there is no run and no folder {source}", key=key, hint=hint)
    is_run = (path / "recipe.yaml").is_file()
    folder = path / "merged" if is_run else path
    if not (folder / "config.json").is_file():
        if not is_run:
            raise UserError(f"{path} is not a model folder: it has no config.json", key=key, hint=_hint(path))
        objective = Run(path).recipe.training.objective
        if objective == "reward":
            hint = f"finish its training, or merge it: llama-ft export {source}"
            raise UserError(f"{path} has no merged/ yet to score answers with", key=key, hint=hint)
        raise UserError(f"{path} is a run of objective {objective}, not of reward", key=key, hint=_hint(path))
    if not _scores(folder):
        kind = f"a run of objective {Run(path).recipe.training.objective}" if is_run else "a model that writes text"
        raise UserError(f"{path} is {kind}, not a reward model", key=key, hint=_hint(path))
    return folder


def _scores(folder: Path) -> bool:
    try:
        return is_reward_model(folder)
    except (OSError, ValueError, AttributeError):
        return False


def _hint(path: Path) -> str:
    """The nearest reward model beside `path`, or what makes one."""
    others = [entry for entry in path.absolute().parent.iterdir() if entry != path.absolute()]
    fit = [entry.name for entry in others if _scores(entry / "merged") or _scores(entry)]
    if not fit:
        return "train one with training.objective: reward"
    near = nearest(path.name, fit)
    return f"did you mean '{path.parent / near}'?" if near else did_you_mean(path.name, fit, kind="reward models")
