"""Rejection sampling (arXiv 2307.09288, section 3.2.3): K answers to each prompt, and tuning on the best of them.

The answers are drawn by the base before any step, in blocks that are kept under the hash of all they depend on: a run
that was stopped draws no block again, and one that starts anew under the same settings draws none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import numpy as np
from accelerate.utils import broadcast_object_list, gather_object

from llama_ft.data.prepare import Prepared
from llama_ft.data.render import MASKED
from llama_ft.errors import MachineFault
from llama_ft.files import write_json, write_text
from llama_ft.paths import cache_dir
from llama_ft.recipe.run import Run
from llama_ft.train.asking import Answer, Asker, Prompt, PromptCollator, mixed
from llama_ft.train.start import Start

BLOCK = 64
"""Prompts whose answers are kept in one file: what a stopped run need not draw again."""
AT_ONCE = 8
"""Prompts whose answers are drawn together."""
OCCASION = 0
FOLDER = "sampled"
"""In the run folder: the answers (answers.jsonl) and the mean of the best of k (best_of_k.json)."""


def tuned_on_best(start: Start, model: Any, asker: Asker, facts: dict[str, Any]) -> Prepared:
    """The run's data with, in place of each row's own last answer, the best of the K that the base gives to its prompt.

    facts: all that an answer and its score depend on. The main process writes every answer into the run folder.
    Raises UserError as rewards do, MachineFault if the answers cannot be kept.
    """
    prepared = start.prepared
    documents = prepared.train.add_column("index", np.arange(len(prepared.train))).with_format("numpy")
    collate = PromptCollator(prepared, lambda _, source, row: prepared.job.train[source].where(row))
    if start.step is not None:  # a run goes on with the answers that it began with
        own = broadcast_object_list([_said(start.run, len(documents)) if start.main else None])[0]
        if own is not None:
            return replace(prepared, train=best_set(documents, own, prepared))
    asker.check_room(collate, documents)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir("sampled", key)
    chosen: list[dict[str, Any]] = []
    for first in range(0, len(documents), BLOCK):
        numbers = range(first, min(first + BLOCK, len(documents)))
        file = folder / f"{first:09}.json"
        kept = broadcast_object_list([_read(file, len(numbers)) if start.main else None])[0]
        if kept is None:
            prompts = [collate.prompt(documents[number]) for number in numbers]
            kept = _drawn(start, model, asker, prompts)
            if start.main:
                _write(file, kept)
        chosen += kept
        rewards = [one["reward"] for group in chosen for one in group["answers"]]
        taken = [best_of(group) for group in chosen]
        start.console.print(
            f"sampled: {len(chosen):,} of {len(documents):,} prompts · reward {mean(rewards):.4f} · taken of "
            f"{start.recipe.sampling.answers}: {mean(one['reward'] for one in taken):.4f}, "
            f"{mean(not one['ended'] for one in taken):.0%} of them cut",
            highlight=False,
        )
    if start.main:
        _report(start, chosen)
    return replace(prepared, train=best_set(documents, chosen, prepared))


def _drawn(start: Start, model: Any, asker: Asker, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The answers of all processes, in the order of the prompts."""
    world, rank = start.state.num_processes, start.state.process_index
    found: list[tuple[int, dict[str, Any]]] = []
    own = list(range(rank, len(prompts), world))
    seed = mixed(start.recipe.training.seed, OCCASION, 0)
    for first in range(0, len(own), AT_ONCE):
        places = own[first : first + AT_ONCE]
        asked = [prompts[place] for place in places]
        groups = asker.ask(model, asked, start.recipe.sampling.answers, seed)
        found += [(place, record(prompts[place], group)) for place, group in zip(places, groups, strict=True)]
    every = dict(gather_object(found))
    return [every[number] for number in range(len(prompts))]


def record(prompt: Prompt, group: Sequence[Answer]) -> dict[str, Any]:
    """A prompt with its answers, as they are kept."""
    answers = [
        {
            "ids": [int(token) for token in one.ids],
            "text": one.text,
            "ended": one.ended,
            "reward": one.scored.total,
            "parts": one.scored.parts,
        }
        for one in group
    ]
    return {"where": prompt.place, "prompt": prompt.ids, "turns": prompt.turns, "answers": answers}


def best_of(group: dict[str, Any]) -> dict[str, Any]:
    """The answer with the highest reward, the first of equals; one that came to its end before any that was cut."""
    return max(group["answers"], key=lambda one: (one["ended"], one["reward"]))


def best_set(documents: datasets.Dataset, groups: Sequence[dict[str, Any]], prepared: Prepared) -> datasets.Dataset:
    """Prompts with their best answers as documents to tune on, one for each document, in their order."""
    columns: dict[str, list[Any]] = {
        name: [] for name in ("input_ids", "labels", "row", "part", "source", "length", "labelled")
    }
    for document, group in zip(documents, groups, strict=True):
        answer = best_of(group)["ids"]
        ids = [*group["prompt"], *answer]
        columns["input_ids"].append(ids)
        columns["labels"].append([MASKED] * len(group["prompt"]) + answer)
        columns["length"].append(len(ids))
        columns["labelled"].append(len(answer))
        for name in ("row", "part", "source"):
            columns[name].append(int(document[name]))
    features = {name: prepared.train.features[name] for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def best_of_k(groups: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """[{k, mean, error}]: the mean over prompts of the highest reward among k answers drawn from each prompt's K.

    Exact over all choices of k (order statistics without replacement): of K sorted rewards the i-th smallest is the
    highest of k with probability C(i − 1, k − 1) / C(K, k). error: standard error over prompts.
    """
    rewards = np.sort([[one["reward"] for one in group["answers"]] for group in groups], axis=1)
    prompts, count = rewards.shape
    found = []
    for k in range(1, count + 1):
        weight = np.zeros(count)
        weight[k - 1] = 1.0 / _choose(count, k)
        for i in range(k, count):  # C(i, k − 1) from C(i − 1, k − 1)
            weight[i] = weight[i - 1] * i / (i - k + 1)
        best = rewards @ weight
        error = float(best.std(ddof=1) / np.sqrt(prompts)) if prompts > 1 else 0.0
        found.append({"k": k, "mean": float(best.mean()), "error": error})
    return found


def _choose(n: int, k: int) -> float:
    result = 1.0
    for i in range(k):
        result *= (n - i) / (i + 1)
    return result


def _report(start: Start, groups: Sequence[dict[str, Any]]) -> None:
    folder = start.run.path / FOLDER
    write_text(
        folder / "answers.jsonl",
        "".join(json.dumps(group | {"best": best_of(group)["text"]}, ensure_ascii=False) + "\n" for group in groups),
    )
    write_json(folder / "best_of_k.json", best_of_k(groups))


def _said(run: Run, prompts: int) -> list[dict[str, Any]] | None:
    """The answers in a run folder, if all are there."""
    try:
        lines = (run.path / FOLDER / "answers.jsonl").read_text(encoding="utf-8").splitlines()
        groups = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return None
    return groups if len(groups) == prompts else None


def _read(file: Path, prompts: int) -> list[dict[str, Any]] | None:
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return groups if isinstance(groups, list) and len(groups) == prompts else None


def _write(file: Path, groups: list[dict[str, Any]]) -> None:
    try:
        write_json(file, groups)
    except OSError as error:
        hint = "free some space, or set LLAMA_FT_CACHE to a folder elsewhere; then start again"
        raise MachineFault(f"the answers could not be kept: {error}", where=str(file), hint=hint) from error
