"""Preparation: a recipe's rows as token ids and labels, cached by everything they depend on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llama_ft.data.benchmarks import open_benchmarks, overlap_indexes
from llama_ft.data.build import CONVERSATIONS, EVAL, SET_ASIDE, TRAIN, Job, Progress, build
from llama_ft.data.cache_key import cache_key, tokenizer_hash
from llama_ft.data.chunks import ChunkMaker
from llama_ft.data.examples import Conversation
from llama_ft.data.mixture import Mixture, plan_counts
from llama_ft.data.order import grouped_by_length, padding_share
from llama_ft.data.packs import efficiency, first_fit_decreasing
from llama_ft.data.pretraining import WINDOW
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.report import ALLOWABLE, NO_DOCUMENTS, Fault, Report
from llama_ft.data.shared import saved_by_sharing
from llama_ft.data.sources import Source, open_sources
from llama_ft.data.store import open_or_build
from llama_ft.data.stream import SAMPLE, DocumentStream
from llama_ft.data.template import Template
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.paths import cache_dir
from llama_ft.recipe.check_data import layout_fits
from llama_ft.recipe.objectives import ONLINE, PAIRS
from llama_ft.recipe.schema import Holdout, Recipe
from llama_ft.tokenizer.load import load_tokenizer, settle_pad

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast


PACKED = 100_000
"""Documents of the first epoch that the fill of packs is told from."""


@dataclass(frozen=True)
class Prepared:
    """A recipe's data, ready to train on.

    `train` and `eval` are memory-mapped `datasets.Dataset`s, one document a row: `input_ids` and `labels` (int32
    [tokens], -100 = no loss), `row` (0-based in its source) and `part` (of a split row), `source` (index into the
    recipe's `data`, or `eval_data` when that is a list), `length` and `labelled` (tokens); pairs also have
    `rejected_ids`, `rejected_labels` and `margin`, rated rows `desirable` and `rating`, and documents whose questions
    are asked again `messages` (JSON). `mixture` says which of them an
    epoch takes, and in which order. `stream` is what is trained on instead when the recipe streams: the others then
    speak of the first rows of each source, a sample that was checked. `eval` is None when the recipe has no eval_data;
    `eval_conversations` are its conversations in the same order. `tokenizer` carries the template as its chat template;
    `template.end_token_id(tokenizer)` is what generation stops on. `hashes` has `data` (per source), `template` and
    `tokenizer`, SHA-256 in hex. `folder` is the cache folder, `job` what it was made from.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    tokenizer: PreTrainedTokenizerFast
    template: Template
    report: Report
    hashes: dict[str, Any]
    eval_conversations: list[Conversation]
    folder: Path
    mixture: Mixture
    stream: DocumentStream | None
    job: Job = field(repr=False)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every training document, int32 [documents], without reading the documents."""
        return column(self.train, "length")

    @property
    def set_aside(self) -> dict[tuple[int, int, int], str]:
        """Documents that were dropped because of others: (source, row, part) -> reason."""
        entries = json.loads((self.folder / SET_ASIDE).read_text(encoding="utf-8"))
        return {(source, row, part): reason for source, row, part, reason in entries}


def prepare_data(recipe: Recipe, *, progress: Progress | None = None, allow: Iterable[str] = ()) -> Prepared:
    """Prepares a recipe's data, or opens it from the cache.

    `progress(label, rows)` is called as rows of a source are done. `allow` names preflight faults to accept
    (:data:`llama_ft.data.report.ALLOWABLE`); the report lists those that were met.

    Raises :class:`UserError` with all malformed rows, or with all faults that are not allowed.
    """
    allowed = list(dict.fromkeys(allow))
    for name in allowed:
        if name not in ALLOWABLE:
            raise UserError(f"--allow {name}: no such fault", hint=did_you_mean(name, ALLOWABLE, kind="names"))
    prepared = inspect_data(recipe, progress=progress)
    stopping = [fault for fault in prepared.report.faults if fault.name not in allowed]
    if stopping:
        raise UserError(Problem(fault.what, fault.where, None, _advice(fault.name, fault.hint)) for fault in stopping)
    if prepared.stream is not None:
        prepared.stream.allowed = tuple(allowed)
    prepared.report.allowed = [name for name in allowed if any(f.name == name for f in prepared.report.faults)]
    return prepared


def inspect_data(recipe: Recipe, *, progress: Progress | None = None) -> Prepared:
    """The same without stopping at preflight faults: they are in `.report.faults` (for previews)."""
    tokenizer = recipe_tokenizer(recipe)
    template = Template.load(recipe.template, tokenizer)
    tokenizer.chat_template = template.source
    renderer = Renderer(template, tokenizer)
    with suppress(TemplateRefusal):  # a template that refuses even a probe is told of by the preflight
        settle_pad(tokenizer, recipe.model.tokenizer or recipe.model.base, end=renderer.end_token_id)
    job = _job(recipe, renderer)
    fingerprints = {source.label: source.fingerprint for source in (*job.sources, *job.benchmarks)}
    hashes = {
        "data": fingerprints,
        "template": template.sha256,
        "tokenizer": tokenizer_hash(tokenizer),
    }
    stream = _stream(recipe, job) if recipe.mixture.streaming else None
    if stream is not None:
        job = replace(job, train=[_sample(source) for source in job.train])
    folder = cache_dir("prepared", cache_key(job, hashes))
    manifest = open_or_build(folder, lambda aside: build(job, aside, progress))
    report = Report.from_dict(manifest["report"])
    _name_anew(report, job.sources)
    report.sampled = SAMPLE if stream is not None else 0
    mixture = _mixture(recipe, report)
    train = _dataset(folder / TRAIN)
    report.efficiency = _efficiency(recipe, train, mixture)
    return Prepared(
        train=train,
        eval=_dataset(folder / EVAL) if job.evaluation is not None else None,
        tokenizer=tokenizer,
        template=template,
        report=report,
        hashes=hashes,
        eval_conversations=_conversations(folder / CONVERSATIONS) if job.evaluation is not None else [],
        folder=folder,
        mixture=mixture,
        stream=stream,
        job=job,
    )


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer that a recipe names, or its base model's own."""
    from llama_ft.llama import smollm2
    from llama_ft.llama.base import locate_base

    named, base = recipe.model.tokenizer, recipe.model.base
    if named is not None and named != smollm2.NAME:
        return load_tokenizer(named)
    if named is None and base.startswith("preset:"):
        hint = "add model.tokenizer: a hub id or a folder"
        raise UserError(f"'{base}' has shapes only, no tokenizer", key="model.tokenizer", hint=hint)
    return load_tokenizer(locate_base(named or base, recipe.model.revision if named is None else None, weights=False))


def _job(recipe: Recipe, renderer: Renderer) -> Job:
    evaluation: float | list[Source] | None = None
    opened = open_sources(recipe.data, streaming=recipe.mixture.streaming)
    if isinstance(recipe.eval_data, Holdout):
        evaluation = float(recipe.eval_data.holdout)
    elif recipe.eval_data is not None:
        evaluation = open_sources(recipe.eval_data, "eval_data")
    _check_layouts(recipe, opened, evaluation if isinstance(evaluation, list) else [])
    if recipe.training.objective not in PAIRS:
        opened = [replace(source, alone=True) for source in opened]
        evaluation = [replace(one, alone=True) for one in evaluation] if isinstance(evaluation, list) else evaluation
    return Job(
        train=opened,
        evaluation=evaluation,
        renderer=renderer,
        sequence=recipe.sequence,
        seed=recipe.training.seed,
        mixture=recipe.mixture,
        infilling=recipe.infilling,
        benchmarks=open_benchmarks(recipe.mixture.benchmarks),
        vocabulary=_vocabulary(recipe, renderer.tokenizer),
        keep_messages=recipe.training.objective in ONLINE,
    )


def _stream(recipe: Recipe, job: Job) -> DocumentStream:
    """The whole of what a recipe trains on, to be read as it comes."""
    weights = [float(entry.weight) for entry in recipe.data]
    overlaps = overlap_indexes(job.benchmarks, job.held_out, decontaminate=job.mixture.decontaminate)
    maker = ChunkMaker(job.maker, recipe.sequence.train_on, job.seed, job.vocabulary, overlaps=overlaps)
    shares = tuple(float(entry.share) for entry in recipe.data if entry.share is not None) or None
    return DocumentStream(maker, job.train, weights, recipe.mixture, job.seed, shares)


def _sample(source: Source) -> Source:
    """The first rows of a source that is streamed."""
    return replace(source, limit=min(source.limit or SAMPLE, SAMPLE))


def _check_layouts(recipe: Recipe, train: list[Source], evaluation: list[Source]) -> None:
    """A card's layout, or a guessed one, is known only now: it must fit the objective."""
    problems = []
    for section, sources in (("data", train), ("eval_data", evaluation)):
        for number, source in enumerate(sources):
            fault = layout_fits(recipe.training.objective, source.layout)
            if fault is not None:
                problems.append(Problem(fault[0], source.label, f"{section}.{number}", fault[1]))
            if source.system is not None and source.layout == "text":
                hint = "remove system"
                problems.append(Problem("text has no system prompt", source.label, f"{section}.{number}.system", hint))
    if recipe.infilling is not None and not any(source.layout == "text" for source in train):
        hint = "remove infilling, or name a source in layout text"
        problems.append(Problem("no source holds text that could be filled in", None, "infilling", hint))
    if problems:
        raise UserError(problems)


def _name_anew(report: Report, sources: list[Source]) -> None:
    """The same rows may have been prepared under another path, or before their layout was stated."""
    for counts, source in zip(report.sources, sources, strict=True):
        for fault in report.faults if counts.label != source.label else ():
            fault.what = fault.what.replace(counts.label, source.label)
            fault.where = fault.where.replace(counts.label, source.label) if fault.where else None
        counts.label, counts.guessed = source.label, source.guessed


def _vocabulary(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Rows of the embedding that is trained, where they are known and do not grow.

    Tokens that were added to the base's own vocabulary get rows; another tokenizer's are for full tuning to learn. A
    base that is not at hand yet says nothing here; training looks again before it starts.
    """
    from llama_ft.llama.base import locate_base
    from llama_ft.llama.load import load_config

    if recipe.model.starts_new or recipe.adapter.method == "full":
        return None
    with suppress(UserError):
        rows = int(load_config(locate_base(recipe.model.base, recipe.model.revision, weights=False)).vocab_size)
        return rows if tokenizer.vocab_size > rows else None
    return None


def _mixture(recipe: Recipe, report: Report) -> Mixture:
    """What an epoch takes of each source, also noted in the report."""
    parts = [one for one in report.sources if one.role == "train"]
    sizes = [one.kept for one in parts]
    weights = [float(entry.weight) for entry in recipe.data]
    epochs = [float(entry.epochs) if entry.epochs is not None else None for entry in recipe.data]
    counts = plan_counts(sizes, weights, epochs, float(recipe.mixture.temperature))
    mixture = Mixture(tuple(sizes), tuple(counts), recipe.training.seed)
    for one, part in zip(parts, mixture.parts(), strict=True):
        one.drawn, one.share, one.repeats = part.drawn, part.share, part.passes
    if not len(mixture) and any(sizes):
        what = "no train documents are left: the sources that have any have weight 0"
        report.faults.append(Fault(NO_DOCUMENTS, what, None, "give them a weight, or mend the others"))
    return mixture


def _efficiency(recipe: Recipe, train: datasets.Dataset, mixture: Mixture) -> dict[str, float]:
    """How much of the work will be done on real tokens, and how much is not done twice."""
    if "rejected_ids" in train.column_names:
        return {"saved by laying prompts out once": saved_by_sharing(train)} if recipe.sequence.packing else {}
    lengths, limit = column(train, "length"), recipe.sequence.max_length
    if recipe.training.objective == "pretrain":
        some = lengths[mixture.order(0)[:PACKED]]  # enough to tell: a run opens its data in a moment, whatever its size
        return {"fill of packs": efficiency(first_fit_decreasing(some, limit, window=WINDOW), some, limit)}
    micro_batch = recipe.training.micro_batch
    if recipe.sequence.packing or isinstance(micro_batch, str):
        return {}
    order = mixture.order(0)
    grouped = grouped_by_length(order, lengths, recipe.training.global_batch)
    return {
        "padding": padding_share(grouped, lengths, micro_batch),
        "padding without grouping by length": padding_share(order, lengths, micro_batch),
    }


def held_out_bytes(prepared: Prepared) -> int:
    """Bytes of UTF-8 of the held-out documents, by which bits per byte are told; 0 where there are none."""
    if prepared.eval is None:
        return 0
    documents: Any = prepared.eval.with_format("numpy")
    texts = (prepared.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in documents)
    return sum(len(str(text).encode()) for text in texts)


def column(documents: datasets.Dataset, name: str) -> np.ndarray:
    """A column of numbers, straight from the mapped file."""
    return documents.data.column(name).to_numpy()


def _dataset(path: Path) -> datasets.Dataset:
    import datasets

    return datasets.Dataset.from_file(str(path))


def _conversations(path: Path) -> list[Conversation]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _advice(name: str, hint: str | None) -> str | None:
    if name == NO_DOCUMENTS:
        return hint
    return f"{hint}, or accept it with --allow {name}"
