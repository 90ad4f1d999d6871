"""The name of a cache folder: a hash of everything that prepared documents depend on."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import llama_ft
from llama_ft.data.build import Job
from llama_ft.data.sources import Source
from llama_ft.paths import PACKAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def cache_key(job: Job, hashes: dict[str, Any]) -> str:
    """Everything that the prepared files depend on, hashed: rows, template, tokenizer, settings, code."""

    def told(source: Source) -> list[Any]:
        return [
            source.fingerprint,
            source.layout,
            dict(source.columns or {}),
            source.system,
            source.limit,
            source.unit,
            source.shape,
            *([source.quality.steps, source.quality.languages] if source.quality else []),
        ]

    share = job.evaluation if isinstance(job.evaluation, float) else None
    mixture, sequence = job.mixture, job.sequence
    state = {
        "sources": [len(job.train), job.evaluation is None, *(told(source) for source in job.sources)],
        "holdout": share,
        "seed": job.seed if share or job.infilling else None,
        "benchmarks": [told(source) for source in job.benchmarks],
        "mixture": [mixture.dedupe, mixture.similarity, mixture.decontaminate],
        "infilling": job.infilling.model_dump() if job.infilling else None,
        "template": [hashes["template"], job.renderer.template.name],
        "tokenizer": hashes["tokenizer"],
        "vocabulary": job.vocabulary,
        "messages": job.keep_messages,
        "sequence": sequence.model_dump(exclude={"packing"}),
        "code": [llama_ft.__version__, _code_hash(), *map(version, ("transformers", "tokenizers", "jinja2"))],
        "near": _version("datasketch") if mixture.dedupe == "near" else None,
        "language": _version("py3langid") if any(_tells_languages(source) for source in job.sources) else None,
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:32]


def _tells_languages(source: Source) -> bool:
    return source.quality is not None and "language" in source.quality.steps


def _version(package: str) -> str | None:
    """The version of a package that documents depend on; where it is missing, the preparation says so."""
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _code_hash() -> str:
    """The code that makes documents; what only shows them or lays them out, or cleans files before, may change."""
    shows = ("page", "cleaning", "clean.py", "commands.py", "preview.py", "show.py")
    filters = ("filter.py", "filter_report.py", "filter_rows.py", "filter_verb.py")
    lays_out = ("balance.py", "batches.py", "ends.py", "others.py")
    files = [*(PACKAGE / "data").rglob("*.py"), *(PACKAGE / "tokenizer").rglob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        if path.relative_to(PACKAGE).parts[1] not in (*shows, *filters, *lays_out):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    state = tokenizer.backend_tokenizer.to_str() + json.dumps(tokenizer.special_tokens_map, sort_keys=True)
    return hashlib.sha256(state.encode()).hexdigest()
