"""What a recipe trains on, in numbers: counted where its rows lie here, estimated from cards elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llama_ft.data.cards import Files, Python, load_card
from llama_ft.data.mixture import Mixture
from llama_ft.llama.smollm2 import NAME as SMOLLM2
from llama_ft.plan.shape import cached_file, smollm2_is_here
from llama_ft.recipe.schema import Data, Recipe


@dataclass(frozen=True)
class DataFacts:
    """One epoch's documents. `exact`: counted from the rows themselves; `source`: how, in words.

    Counted documents have `lengths` and `labelled`, int32 [documents], and the `mixture` that orders them. Estimated
    ones have means alone: `documents` is None where nothing says how many there are. `vocabulary`: tokens of the
    tokenizer, None where it is not at hand. `evaluated`: (tokens, labelled tokens, Σℓ²) of one evaluation.
    """

    exact: bool
    source: str
    documents: int | None
    mean_tokens: float
    mean_labelled: float
    mean_squares: float
    lengths: np.ndarray | None = None
    labelled: np.ndarray | None = None
    mixture: Mixture | None = None
    vocabulary: int | None = None
    evaluated: tuple[float, float, float] | None = None
    eval_documents: int = 0
    notes: tuple[str, ...] = field(default=())
    files: int = 0
    """Bytes of prepared documents that a run maps."""
    pairs: bool = False
    """Whether a document is a pair: `lengths` then count its prompt once and both answers."""
    squares: np.ndarray | None = None
    """Of each document what stands for ℓ² in attention, float64 [documents]; None: its length squared."""
    longest: int | None = None
    """Tokens that no document exceeds; None: sequence.max_length."""
    deviation: float | None = None
    """Standard deviation of the tokens of a document; None: by `mean_squares`."""


def data_facts(recipe: Recipe) -> DataFacts:
    """Counts what is local, by opening or making the same cache that training opens; estimates the rest."""
    missing = not_local(recipe)
    if missing is None and not recipe.mixture.streaming:
        from llama_ft.data.prepare import inspect_data

        return facts_of(inspect_data(recipe))
    from llama_ft.plan.estimate import estimated

    return estimated(recipe, missing or "the rows are streamed")


def not_local(recipe: Recipe) -> str | None:
    """Why a recipe's documents cannot be counted without fetching something; None where they can."""
    named = recipe.model.tokenizer or recipe.model.base
    if named == SMOLLM2:
        if not smollm2_is_here():
            return f"the tokenizer of {SMOLLM2} was not fetched yet"
    elif not Path(named).expanduser().exists() and not _cached_tokenizer(named, recipe.model.revision):
        return f"the tokenizer of {named} is not on this machine"
    entries = [*recipe.data, *(recipe.eval_data if isinstance(recipe.eval_data, list) else [])]
    entries += [Data(use=name) for name in recipe.mixture.benchmarks if not Path(name).exists()]
    for entry in entries:
        if entry.path is None and not isinstance(load_card(str(entry.use)).source, (Files, Python)):
            return f"the rows of {entry.use} lie on the hub"
    return None


def _cached_tokenizer(name: str, revision: str | None) -> bool:
    files = ("tokenizer.json", "tokenizer.model")
    return any(cached_file(name, file, revision) is not None for file in files)


def facts_of(prepared: Any) -> DataFacts:
    """The facts of prepared documents (:class:`llama_ft.data.prepare.Prepared`)."""
    from llama_ft.data.prepare import column

    lengths, labelled = prepared.lengths, column(prepared.train, "labelled")
    mixture = prepared.mixture
    order = mixture.order(0)
    own, with_loss = lengths[order].astype(np.int64), labelled[order].astype(np.int64)
    count = max(1, len(own))
    evaluated = None
    if prepared.eval is not None and len(prepared.eval):
        sizes = column(prepared.eval, "length").astype(np.int64)
        evaluated = (float(sizes.sum()), float(column(prepared.eval, "labelled").sum()), float((sizes**2).sum()))
    return DataFacts(
        exact=True,
        source="counted from the rows, as training will",
        documents=len(mixture),
        mean_tokens=float(own.sum() / count),
        mean_labelled=float(with_loss.sum() / count),
        mean_squares=float((own**2).sum() / count),
        lengths=lengths,
        labelled=labelled,
        mixture=mixture,
        vocabulary=len(prepared.tokenizer),
        evaluated=evaluated,
        eval_documents=len(prepared.eval) if prepared.eval is not None else 0,
        notes=tuple(fault.what for fault in prepared.report.faults),
        pairs="rejected_ids" in prepared.train.column_names,
        files=sum(file.stat().st_size for file in prepared.folder.glob("*.arrow")),
    )
