"""What the preview's page shows of a recipe, gathered: documents, a pack, dropped rows, lengths."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers.decoders import DecodeStream

from llama_ft.data.page.tokens import Token
from llama_ft.data.page.write import PageDocument, PageView, page_document, write_page
from llama_ft.data.prepare import Prepared, column
from llama_ft.data.preview import read_training
from llama_ft.data.render import MASKED
from llama_ft.data.shared import in_common, whole_lengths
from llama_ft.recipe.objectives import ONLINE
from llama_ft.recipe.schema import Recipe

DOCUMENTS = 40
"""Documents shown when no limit is given."""
PER_REASON = 5
"""Dropped rows shown of every reason."""
LOOKED_AT = 20_000
"""Rows that are looked at for dropped ones: the report counts them all, the page only shows some."""
IN_A_PACK = 16
"""Documents shown of the first step: a page end to end, not a whole batch."""


def write_preview_page(path: Path, recipe: Recipe, prepared: Prepared, *, limit: int | None = None) -> None:
    """Writes one HTML file, complete in itself, that shows a recipe's data."""
    end = prepared.template.end_token_id(prepared.tokenizer)
    kept, dropped = _documents(prepared, end, limit or DOCUMENTS)
    labels = [source.label for source in prepared.job.train]
    sources = column(prepared.train, "source")
    # What lies behind a prompt whose answers are yet to be sampled is not known.
    known = recipe.training.objective not in ONLINE
    packed = recipe.sequence.packing and known and len(prepared.mixture) > 0
    lengths = prepared.lengths
    if "rejected_ids" in prepared.train.column_names:
        lengths = whole_lengths(prepared.train).max(axis=1, initial=0)
    view = PageView(
        recipe_name=recipe.name,
        template=prepared.template.name,
        max_length=recipe.sequence.max_length,
        report=prepared.report,
        documents=kept,
        dropped=dropped,
        packs=[_first_pack(prepared, end, min(IN_A_PACK, recipe.training.global_batch))] if packed else [],
        lengths={
            label: lengths[np.isin(sources, [n for n, one in enumerate(labels) if one == label])].tolist()
            for label in dict.fromkeys(labels)
        },
        end_token_id=end,
    )
    write_page(path, view)


def _documents(prepared: Prepared, end: int | None, limit: int) -> tuple[list[PageDocument], list[PageDocument]]:
    """The first kept documents of every source, and the first dropped ones of every reason."""
    tokenizer = prepared.tokenizer
    kept: list[PageDocument] = []
    dropped: list[PageDocument] = []
    shown: Counter[str] = Counter()
    of_source: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for one in prepared.report.sources:
        if one.role == "train":
            wanted.update({reason: min(PER_REASON, number) for reason, number in one.dropped.items()})
    each = -(-limit // len(prepared.job.train))
    for looked_at, (document, source) in enumerate(read_training(prepared)):
        if looked_at >= LOOKED_AT:
            break
        if document.dropped is None and of_source[source.label] < each:
            of_source[source.label] += 1
            kept.append(page_document(document, source.label, end, tokenizer.decode))
        elif document.dropped is not None and shown[document.dropped] < PER_REASON:
            shown[document.dropped] += 1
            dropped.append(page_document(document, source.label, end, tokenizer.decode))
        if len(kept) >= limit and all(shown[reason] >= number for reason, number in wanted.items()):
            break
    return kept, dropped


def _first_pack(prepared: Prepared, end: int | None, documents: int) -> list[PageDocument]:
    """The first documents of the first step, laid end to end as a packed micro-batch lays them."""
    rows = prepared.train.select(prepared.mixture.order(0)[:documents].tolist()).with_format("numpy")
    labels = [source.label for source in prepared.job.train]
    pack = []
    for one in rows:
        ids, targets = one["input_ids"], one["labels"]
        tokens = _decoded(prepared, ids, targets, end)
        document = PageDocument(labels[one["source"]], int(one["row"]), tokens, None, False, None, ids.tolist())
        if "rejected_ids" in one:
            others, other_targets = one["rejected_ids"], one["rejected_labels"]
            document.rejected = _decoded(prepared, others, other_targets, end)
            document.rejected_ids = others.tolist()
            document.shared = in_common(ids, targets, others, other_targets)
        pack.append(document)
    return pack


def _decoded(prepared: Prepared, ids: np.ndarray, labels: np.ndarray, end: int | None) -> list[Token]:
    """The tokens of a prepared document, whose text is not kept."""
    stream = DecodeStream(skip_special_tokens=False)
    pieces = [stream.step(prepared.tokenizer.backend_tokenizer, token) or "" for token in ids.tolist()]
    labelled = (labels != MASKED).tolist()
    labelled[0] = False  # nothing predicts a document's first token
    return list(zip(pieces, labelled, (ids == end).tolist(), strict=True))
