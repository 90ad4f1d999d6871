"""The pairs of `benchmarks.preference`: which of a set, in what order, and in the form that TRL reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from benchmarks.trl_dpo import COLUMNS, digest
from llama_ft import prepare_data
from llama_ft.data.order import document_order
from llama_ft.data.prepare import Prepared
from llama_ft.data.problems import Problems
from llama_ft.data.render import MASKED
from llama_ft.recipe import Recipe

Step = dict[str, Any]


def spread(lengths: Sequence[int], batch: int, steps: int) -> list[int]:
    """Numbers of documents for so many steps: the longest batch first, then batches from the shorter to the longer.

    Each batch holds neighbours in length; those behind the first stand at equal shares of all others. ValueError for
    too few documents.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    longest, *others = [order[first : first + batch] for first in range(0, len(order) - batch + 1, batch)] or [[]]
    if steps < 2 or len(others) < steps - 1:
        raise ValueError(f"{len(lengths)} pairs do not give {steps} steps of {batch}, at least two")
    others.reverse()
    places = [int((number + 0.5) * len(others) / (steps - 1)) for number in range(steps - 1)]
    return [*longest, *(number for place in places for number in others[place])]


def choose_rows(recipe: Recipe, folder: Path) -> Path:
    """The rows of the steps out of the recipe's, in a file that training reads in the order of :func:`spread`: the
    order of an epoch is known beforehand. UserError and ValueError where that cannot be."""
    pool, training = prepare_data(recipe), recipe.training
    assert training.max_steps is not None
    lengths = [max(len(one["input_ids"]), len(one["rejected_ids"])) for one in pool.train]
    wanted = [pool.train[number]["row"] for number in spread(lengths, training.global_batch, training.max_steps)]
    raw = {row: value for row, value in pool.job.train[0].rows(Problems()) if row in set(wanted)}
    lines = [""] * len(wanted)
    for place, row in zip(document_order(len(wanted), training.seed, 0), wanted, strict=True):
        lines[place] = json.dumps(raw[row]) + "\n"
    file = folder / "rows.jsonl"
    file.write_text("".join(lines))
    return file


def as_trl(document: dict[str, Any]) -> dict[str, list[int]]:
    """A prepared pair as ids of prompt, chosen and rejected; what follows an answer and has no loss is left out.

    ValueError for a pair that TRL has no form for: two prompts, or loss on more than the last answer.
    """
    ids, spans = [], []
    for name, labels in (("input_ids", "labels"), ("rejected_ids", "rejected_labels")):
        own = [place for place, label in enumerate(document[labels]) if label != MASKED]
        if own != list(range(own[0], own[-1] + 1)):
            raise ValueError("a pair has loss on more than its last answer")
        ids.append(document[name])
        spans.append((own[0], own[-1] + 1))
    prompts = [one[:start] for one, (start, _) in zip(ids, spans, strict=True)]
    if prompts[0] != prompts[1]:
        raise ValueError("a pair has two prompts")
    return dict(
        zip(COLUMNS, [prompts[0], *(o[start:stop] for o, (start, stop) in zip(ids, spans, strict=True))], strict=True)
    )


def write_pairs(prepared: Prepared, folder: Path) -> Path:
    """The documents of the first epoch in their order, as TRL's side reads them."""
    file = folder / "pairs.jsonl"
    pairs = [as_trl(prepared.train[int(number)]) for number in prepared.mixture.order(0)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return file


def expected_steps(pairs: Path, batch: int) -> list[Step]:
    """What must be in every step: labelled tokens, and the names of its documents."""
    steps = []
    read = [json.loads(line) for line in pairs.read_text().splitlines()]
    for first in range(0, len(read), batch):
        ends = [(one["prompt"], one[side]) for one in read[first : first + batch] for side in ("chosen", "rejected")]
        rows = sorted(digest([*prompt, *answer], len(prompt)) for prompt, answer in ends)
        steps.append({"labelled": sum(len(answer) for _, answer in ends), "rows": rows})
    return steps


@torch.no_grad()
def bfloat16_noise(base: Path, pairs: Path, count: int = 24) -> float:
    """Standard deviation, in nats, of what bfloat16 does to the log-probability of a token of the chosen answers.

    transformers' LLaMA with the weights of `base` in bfloat16 against itself in float32, on the last `count` pairs.
    """
    read = [json.loads(line) for line in pairs.read_text().splitlines()][-count:]
    said = []
    for dtype in (torch.float32, torch.bfloat16):
        model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
        found = []
        for one in read:
            ids, start = torch.tensor([[*one["prompt"], *one["chosen"]]]), len(one["prompt"])
            logits = model(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1)
            found.append(logits.gather(-1, ids[0, start:, None])[:, 0])
        said.append(torch.cat(found))
    return float((said[1] - said[0]).std())
