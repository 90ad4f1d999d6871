"""Preparation: a recipe's rows as token ids and labels, cached by everything they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_ft
from llama_ft.data.build import CONVERSATIONS, EVAL, TRAIN, Job, Progress, build
from llama_ft.data.layouts import Conversation
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.report import ALLOWABLE, NO_DOCUMENTS, Report
from llama_ft.data.sources import Source, open_sources
from llama_ft.data.store import open_or_build
from llama_ft.data.template import Template
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.paths import PACKAGE, cache_dir
from llama_ft.recipe.schema import Holdout, Recipe
from llama_ft.tokenizer.load import load_tokenizer, settle_pad

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Prepared:
    """A recipe's data, ready to train on.

    `train` and `eval` are memory-mapped `datasets.Dataset`s, one document a row: `input_ids` and `labels` (int32
    [tokens], -100 = no loss), `row` (0-based in its file), `source` (index into the recipe's `data`, or `eval_data`
    when that is a list), `length` and `labelled` (tokens). `eval` is None when the recipe has no eval_data;
    `eval_conversations` are its conversations in the same order. `tokenizer` carries the template as its chat
    template; `template.end_token_id(tokenizer)` is what generation stops on. `hashes` has `data` (per source),
    `template` and `tokenizer`, SHA-256 in hex. `folder` is the cache folder, `job` what it was made from.
    """

    train: datasets.Dataset
    eval: datasets.Dataset | None
    tokenizer: PreTrainedTokenizerFast
    template: Template
    report: Report
    hashes: dict[str, Any]
    eval_conversations: list[Conversation]
    folder: Path
    job: Job = field(repr=False)


def prepare_data(recipe: Recipe, *, progress: Progress | None = None, allow: Iterable[str] = ()) -> Prepared:
    """Prepares a recipe's data, or opens it from the cache.

    `progress(label, rows)` is called as rows of a source are done. `allow` names preflight faults to accept
    (`control-tokens`, `end-token-unlabelled`, `two-bos`, `eval-in-train`); the report lists those that were met.

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
    prepared.report.allowed = [name for name in allowed if any(f.name == name for f in prepared.report.faults)]
    return prepared


def inspect_data(recipe: Recipe, *, progress: Progress | None = None) -> Prepared:
    """The same without stopping at preflight faults: they are in `.report.faults` (for previews)."""
    _check_slice(recipe)
    tokenizer = recipe_tokenizer(recipe)
    template = Template.load(recipe.template, tokenizer)
    tokenizer.chat_template = template.source
    renderer = Renderer(template, tokenizer)
    with suppress(TemplateRefusal):  # a template that refuses even a probe is told of by the preflight
        settle_pad(tokenizer, recipe.model.tokenizer or recipe.model.base, end=renderer.end_token_id)
    job = _job(recipe, renderer)
    hashes = {
        "data": {source.label: source.fingerprint for source in job.sources},
        "template": template.sha256,
        "tokenizer": _tokenizer_hash(tokenizer),
    }
    folder = cache_dir("prepared", _key(job, hashes))
    manifest = open_or_build(folder, lambda aside: build(job, aside, progress))
    report = Report.from_dict(manifest["report"])
    for counts, source in zip(report.sources, job.sources, strict=True):
        counts.label = source.label  # the same rows may have been prepared under another path
    return Prepared(
        train=_dataset(folder / TRAIN),
        eval=_dataset(folder / EVAL) if job.evaluation is not None else None,
        tokenizer=tokenizer,
        template=template,
        report=report,
        hashes=hashes,
        eval_conversations=_conversations(folder / CONVERSATIONS) if job.evaluation is not None else [],
        folder=folder,
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
    if isinstance(recipe.eval_data, Holdout):
        evaluation = float(recipe.eval_data.holdout)
    elif recipe.eval_data is not None:
        evaluation = open_sources(recipe.eval_data, "eval_data")
    return Job(open_sources(recipe.data), evaluation, renderer, recipe.sequence, recipe.training.seed)


def _check_slice(recipe: Recipe) -> None:
    """What the schema allows and this version does not do yet."""
    problems = []
    if recipe.training.objective != "sft":
        what = f"data for '{recipe.training.objective}' is not prepared yet"
        problems.append(Problem(what, None, "training.objective", "use sft"))
    if recipe.sequence.overlong == "split":
        problems.append(Problem("'split' is not built yet", None, "sequence.overlong", "use drop or truncate"))
    if problems:
        raise UserError(problems)


def _key(job: Job, hashes: dict[str, Any]) -> str:
    """Everything that the prepared files depend on, hashed: rows, template, tokenizer, settings, code."""

    def told(source: Source) -> list[Any]:
        return [source.fingerprint, source.layout, dict(source.columns or {}), source.system, source.limit]

    share = job.evaluation if isinstance(job.evaluation, float) else None
    state = {
        "sources": [len(job.train), job.evaluation is None, *(told(source) for source in job.sources)],
        "holdout": [share, job.seed if share else None],
        "template": [hashes["template"], job.renderer.template.name],
        "tokenizer": hashes["tokenizer"],
        "sequence": [job.sequence.max_length, job.sequence.train_on, job.sequence.overlong],
        "code": [llama_ft.__version__, _code_hash(), *map(version, ("transformers", "tokenizers", "jinja2"))],
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def _code_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted([*(PACKAGE / "data").glob("*.py"), *(PACKAGE / "tokenizer").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    state = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()


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
