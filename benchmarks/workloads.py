"""The workloads of `benchmarks.run`: which recipe, which documents, and what makes a step.

W1 Alpaca, LoRA of rank 16, one document a row · W2 chats packed into rows of 2,048 tokens, LoRA and full tuning ·
W3 Alpaca, QLoRA (NF4, double quantisation) · W4 pairs, DPO (:mod:`benchmarks.preference`) · W5 everything around the
steps (:mod:`benchmarks.chores`) · W6 the longest context at fixed memory (:mod:`benchmarks.gpu_run`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from benchmarks.pairs import spread
from benchmarks.peers.common import Step, digest
from benchmarks.preference import write_adapter
from llama_ft import load_recipe, prepare_data
from llama_ft.data.order import document_order
from llama_ft.data.prepare import Prepared
from llama_ft.data.problems import Problems
from llama_ft.recipe import Recipe
from llama_ft.recipe.schema import Training

RATES = {"lora": 3e-4, "qlora": 3e-4, "full": 2e-5}


@dataclass(frozen=True)
class Workload:
    """One training job, the same for every contender."""

    name: str
    title: str
    recipe: str
    data: str
    """File of real rows below the folder of `--data`."""
    method: str = "lora"
    documents: int = 8
    """Of a step."""
    rows: int = 8
    """Of a step; fewer than documents: whole documents share rows, each of `max_length` tokens at most."""
    micro_batch: int = 8
    """Rows that go through a model at once."""
    max_length: int = 512
    pool: int = 400
    """Rows of the file that the steps are drawn from."""
    overrides: tuple[str, ...] = field(default=())

    @property
    def packed(self) -> bool:
        """Whether documents share rows."""
        return self.rows < self.documents

    @property
    def accumulation(self) -> int:
        """Micro-batches of a step."""
        return self.rows // self.micro_batch


ALPACA = "instruct/alpaca_5000.json"
CHAT = "chat/moss_en_sharegpt.json"
PACKED: dict[str, Any] = {"documents": 8, "rows": 2, "micro_batch": 1, "max_length": 2048, "pool": 293}
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "Alpaca, LoRA of rank 16, rows of at most 512 tokens", "alpaca/smollm2-135m-lora", ALPACA),
        Workload("W2", "chats packed into 2,048 tokens, LoRA", "vicuna/smollm2-135m-lora", CHAT, **PACKED),
        Workload(
            *("W2-full", "chats packed into 2,048 tokens, full tuning", "vicuna/smollm2-135m-lora", CHAT, "full"),
            **PACKED,
        ),
        Workload("W3", "Alpaca, QLoRA: NF4, double quantisation", "alpaca/smollm2-135m-qlora", ALPACA, "qlora"),
    )
}


@dataclass(frozen=True)
class Job:
    """A workload with its documents chosen and written."""

    workload: Workload
    recipe: Recipe
    overrides: list[str]
    """What the recipe is started with, for our own command."""
    documents: Path
    """As `Spec.documents` describes."""
    sha256: str
    adapter: Path | None
    expected: list[Step]
    """What every contender must see: documents, tokens and labelled tokens of each step."""


def overrides_of(workload: Workload, rows: Path, steps: int, dtype: str, limit: int | None) -> list[str]:
    """The recipe as it is measured: no evaluation, no export, the full rate from the first step on."""
    source = {"path": str(rows), "limit": limit}
    if "moss" in workload.data:
        source["layout"] = "sharegpt"
    return [
        "data=" + json.dumps([source]),
        f"model.dtype={dtype}",
        f"adapter.method={workload.method}",
        f"sequence.max_length={workload.max_length}",
        "sequence.overlong=drop",
        f"training.learning_rate={RATES[workload.method]}",
        f"training.max_steps={steps}",
        f"training.global_batch={workload.documents}",
        f"training.micro_batch={workload.documents // workload.accumulation}",
        "training.gradient_checkpointing=false",
        "training.schedule=constant",
        "training.warmup=0.0",
        "eval_data=null",
        "export.merged=false",
        "tracking=[]",
        *workload.overrides,
    ]


def prepare_job(workload: Workload, data: Path, steps: int, dtype: str, folder: Path) -> Job:
    """Chooses documents out of the pool and writes them, for us as rows of the original set, for peers as ids.

    ValueError where the pool does not give so many steps.
    """
    pool = load_recipe(workload.recipe, overrides_of(workload, data / workload.data, steps, dtype, workload.pool))
    prepared = prepare_data(pool)
    lengths = [len(one["input_ids"]) for one in prepared.train]
    if workload.packed:
        per_row = workload.documents // workload.rows
        chosen = filled(lengths, per_row, workload.max_length, workload.rows * steps)
    else:
        chosen = spread(lengths, workload.documents, steps)
    rows = _write_rows(prepared, chosen, pool.training, folder)
    overrides = overrides_of(workload, rows, steps, dtype, None)
    recipe = load_recipe(workload.recipe, overrides)
    again = prepare_data(recipe)
    file, expected = write_documents(again, workload, folder)
    adapter = None if workload.method == "full" else write_adapter(recipe, again, folder)
    return Job(workload, recipe, overrides, file, sha256(file.read_bytes()).hexdigest(), adapter, expected)


def filled(lengths: Sequence[int], per_row: int, room: int, rows: int) -> list[int]:
    """Numbers of documents for `rows` rows of `per_row` each, every row as full as greed makes it, none over `room`.

    The fullest row comes first: it warms up and shows the peak of memory. ValueError where too few rows come out.
    """
    left = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    found: list[list[int]] = []
    while len(left) >= per_row and len(found) < rows:
        row: list[int] = []
        for number in list(left):
            rest = per_row - len(row) - 1
            least = sum(lengths[other] for other in [one for one in reversed(left) if one not in row][:rest])
            if sum(lengths[one] for one in row) + lengths[number] + least <= room:
                row.append(number)
                left.remove(number)
            if len(row) == per_row:
                break
        if len(row) < per_row:
            break
        found.append(row)
    if len(found) < rows:
        raise ValueError(f"{len(lengths)} documents do not give {rows} rows of {per_row} within {room} tokens")
    found.sort(key=lambda row: -sum(lengths[one] for one in row))
    return [number for row in found for number in row]


def _write_rows(prepared: Prepared, chosen: list[int], training: Training, folder: Path) -> Path:
    """The chosen rows in a file that training reads in this order: the order of an epoch is known beforehand."""
    wanted = [prepared.train[number]["row"] for number in chosen]
    raw = {row: value for row, value in prepared.job.train[0].rows(Problems()) if row in set(wanted)}
    lines = [""] * len(wanted)
    for place, row in zip(document_order(len(wanted), training.seed, 0), wanted, strict=True):
        lines[place] = json.dumps(raw[row]) + "\n"
    file = folder / "rows.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file


def write_documents(prepared: Prepared, workload: Workload, folder: Path) -> tuple[Path, list[Step]]:
    """The documents of the first epoch in their order, as `Spec.documents` says; and what is in every step."""
    lines, steps = [], []
    per_row = workload.documents // workload.rows
    for place, number in enumerate(prepared.mixture.order(0)):
        row = prepared.train[int(number)]
        document: dict[str, Any] = {name: [int(one) for one in row[name]] for name in ("input_ids", "labels")}
        if workload.packed:
            document["row"] = place // per_row
        lines.append(json.dumps(document) + "\n")
        if place % workload.documents == 0:
            steps.append(Step())
        steps[-1].documents.append(digest(document["input_ids"], document["labels"]))
        steps[-1].tokens += len(document["input_ids"])
        steps[-1].labelled += sum(label != -100 for label in document["labels"][1:])
    file = folder / "documents.jsonl"
    file.write_text("".join(lines), encoding="utf-8")
    return file, steps
