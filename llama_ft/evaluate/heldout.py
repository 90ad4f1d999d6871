"""Suite `heldout`: what held-out documents cost, in nats per labelled token and in bits per byte, per data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from llama_ft.errors import Problem
from llama_ft.evaluate.material import Held, data_problems, held_out, holds_documents, labelled_bytes
from llama_ft.evaluate.result import Score, SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

NLL, PERPLEXITY, BITS, HITS = "nll per token", "perplexity", "bits per byte", "next-token accuracy"
ASKED = 400
"""Characters of a document that its row shows."""


class HeldOut:
    """The run's own held-out documents, prepared as in training, or those that `--data` names."""

    name = "heldout"
    about = "loss on held-out documents: nats per token, perplexity, bits per byte"
    kinds = ("documents",)

    def needs(self, context: Context) -> list[Problem]:
        """Held-out documents."""
        return data_problems(context) or held_out_problems(context, self.name)

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite."""
        documents = held_out(subject, context)
        settings = context.settings(
            self.name, subject, documents=len(documents), template=template_of(subject, documents)
        )
        rows = context.items(subject, settings, "held-out documents", documents, measure(subject))
        sources = list(dict.fromkeys(one.source for one in documents))
        if len(sources) > 1:
            rows = [row | {"values": row["values"] | _of_source(row)} for row in rows]
        names = ["", *(f"{source}: " for source in sources if len(sources) > 1)]
        scores = [score for name in names for score in loss_scores(rows, name, context.seed)]
        leaks = context.leaks({one.id: one.asked for one in documents})
        seconds = context.seconds(self.name, subject)
        return SuiteResult(self.name, subject.name, scores, rows, settings, seconds, leaks)


def template_of(subject: Subject, documents: Sequence[Held]) -> str | None:
    """What tells the templates of two subjects apart, by whatever name they go; None where documents are mere text."""
    return subject.renderer.template.sha256[:16] if any(one.turns for one in documents) else None


def held_out_problems(context: Context, suite: str) -> list[Problem]:
    """The problem of a run that held nothing out, or a model by itself, where `--data` names no documents either."""
    if any(holds_documents(name) for name in context.data):
        return []
    if context.run is None:
        hint = "--data FILE --layout messages, or --data CARD"
        return [Problem(f"a model by itself has no held-out documents for the suite {suite}", key="--data", hint=hint)]
    if context.run.recipe.eval_data is None:
        what = f"{context.run.path} held nothing out (its recipe has no eval_data), which the suite {suite} needs"
        return [Problem(what, key="--data", hint="name documents that it was not trained on: --data FILE or CARD")]
    return []


def measure(subject: Subject) -> Callable[[Sequence[Held], Callable[[int], None]], list[dict[str, Any]]]:
    """Measures documents, as Context.items asks."""

    def work(documents: Sequence[Held], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        costs = subject.costs([(one.ids, one.labels) for one in documents], tick)
        rows = []
        for one, cost in zip(documents, costs, strict=True):
            size = labelled_bytes(one.ids, one.labels, subject.tokenizer)
            values: dict[str, Any] = {}
            if cost.tokens:
                values = {NLL: [cost.nats / cost.tokens, cost.tokens], HITS: [cost.hits / cost.tokens, cost.tokens]}
            if size:
                values[BITS] = [cost.nats / math.log(2) / size, size]
            row = {"id": one.id, "source": one.source, "asked": _shown(one), "answer": "", "tokens": cost.tokens}
            rows.append({**row, "nats": cost.nats, "values": values})
        return rows

    return work


def _of_source(row: dict[str, Any]) -> dict[str, Any]:
    own = {name: row["values"][name] for name in (NLL, HITS, BITS) if name in row["values"]}
    return {f"{row['source']}: {name}": value for name, value in own.items()}


def _shown(document: Held) -> str:
    asked = [turn for turn in document.turns if turn["role"] == "user"]
    said = asked[-1]["content"] if asked else document.text
    return said if len(said) <= ASKED else said[:ASKED] + " …"


def loss_scores(rows: Sequence[dict[str, Any]], prefix: str, seed: int) -> list[Score]:
    """The four scores of documents, under names with a prefix; those without a value are left out.

    Perplexity is e to the nats per token, and its interval that of the nats. Bits per byte compares models whose
    tokenizers differ: nats / ln 2 over the UTF-8 bytes of the scored text (The Pile, arXiv 2101.00027, section 3.1);
    the cost of control tokens is in it, for which there are no bytes.
    """
    nll = scored(rows, prefix + NLL, "nats", "lower", seed)
    e = [_exp(value) for value in (nll.value, nll.low, nll.high)]
    found = [
        nll,
        Score(prefix + PERPLEXITY, e[0], e[1], e[2], nll.rows, "", "lower"),
        scored(rows, prefix + BITS, "bits", "lower", seed),
        scored(rows, prefix + HITS, "share", "higher", seed),
    ]
    return [score for score in found if score.rows]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


SUITE = HeldOut()
