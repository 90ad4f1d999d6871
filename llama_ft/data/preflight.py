"""Checks that a prepared set can teach what the recipe wants; each fault has a name under which it can be allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_ft.data.benchmarks import Leak
from llama_ft.data.chunks import Chunk
from llama_ft.data.documents import EXCHANGE_OVERLONG, NO_LABEL, OVERLONG, SAME_WHEN_CUT
from llama_ft.data.render import Renderer, TemplateRefusal
from llama_ft.data.report import NO_DOCUMENTS, Fault, SourceReport
from llama_ft.data.sources import Source
from llama_ft.errors import UserError

if TYPE_CHECKING:
    from llama_ft.data.build import Job

_CLOSE = "put the end token inside the {% generation %} block"
_ASKED = "Which animal of the Andes hums?"
TOO_LONG = (OVERLONG, NO_LABEL, SAME_WHEN_CUT, EXCHANGE_OVERLONG)
"""Reasons to drop a row that a larger max_length would keep."""


def check_template(renderer: Renderer, train_on: str) -> list[Fault]:
    """Faults that the template and the tokenizer show before any row is read.

    Raises :class:`UserError` when the template cannot say what the assistant said although labels need it.
    """
    template = renderer.template
    if train_on != "all" and not template.has_generation:
        hint = "name a shipped template (such as chatml), mark the answers in a copy of this one, or set train_on: all"
        why = f" ({template.unmarked})" if template.unmarked else ""
        what = f"the template '{template.name}' does not mark answers with {{% generation %}}{why}"
        raise UserError(f"{what}: nothing could be labelled", key="template", hint=hint)
    try:
        end = renderer.end_token_id
        probe = renderer.render([{"role": "user", "content": _ASKED}, {"role": "assistant", "content": "It hums."}])
    except TemplateRefusal as refusal:
        what = f"the template '{template.name}' refuses one question with one answer: {refusal}"
        raise UserError(what, key="template") from refusal
    if train_on != "all" and any(_ASKED in probe.text[start:stop] for start, stop in probe.spans):
        what = f"the template '{template.name}' marks what the user says with {{% generation %}}, not the answer alone"
        raise UserError(what, key="template", hint="mark the answers alone, or set train_on: all")
    faults = []
    missing = renderer.missing_control()
    if missing:
        what = f"the template '{template.name}' writes {', '.join(missing)}, not tokens of this tokenizer"
        hint = "name another template, or a tokenizer that has them"
        faults.append(Fault("control-tokens", f"{what}: they would be cut into letters", None, hint))
    if end is None and train_on != "all":
        what = f"an answer of the template '{template.name}' ends without a labelled control token"
        faults.append(Fault("end-token-unlabelled", f"{what}: the model would not learn to stop", None, _CLOSE))
    return faults


class Findings:
    """The faults of a preparation, each with how often it was met and the first place."""

    def __init__(self, of_template: list[Fault], job: Job):
        self._of_template = of_template
        self._job = job
        self._met: dict[str, tuple[int, str, str]] = {}

    def look(self, chunk: Chunk, source: Source) -> None:
        """Takes over what was noticed in a chunk of a source."""
        for name, (count, row, detail) in chunk.faults.items():
            self._note(name, count, source.where(row), detail)

    def leak(self, leak: Leak, place: str) -> None:
        """A training row at `place` overlaps a held-out row or a benchmark's prompt."""
        if not self._job.mixture.decontaminate:
            self._note(f"{leak.kind}-in-train", 1, place, leak.where)

    def faults(self, reports: list[SourceReport]) -> list[Fault]:
        """One fault per kind, those of the template first."""
        named = {fault.name for fault in self._of_template}
        met = [self._fault(name, *found) for name, found in self._met.items() if name not in named]
        return [*self._of_template, *met, *self._truncated(reports), *self._no_documents(reports)]

    def _note(self, name: str, count: int, where: str, detail: str) -> None:
        before, place, first = self._met.get(name, (0, where, detail))
        self._met[name] = (before + count, place, first)

    def _fault(self, name: str, count: int, where: str, detail: str) -> Fault:
        template = self._job.renderer.template.name
        said = {
            "end-token-unlabelled": ("an answer's end token carries no loss", _CLOSE),
            "two-bos": ("two BOS tokens in a row", "write {{ bos_token }} once in the template"),
            "vocabulary": (
                f"id {detail} is beyond the model's vocabulary of {self._job.vocabulary or 0:,}",
                "use the base model's own tokenizer, or adapter: {method: full}, which learns new tokens",
            ),
            "template-refuses": (f"refused by the template '{template}': {detail}", "name another template"),
            "no-label": (
                "answers without a labelled token",
                f"is every answer inside {{% generation %}} in the template '{template}'?",
            ),
            "eval-in-train": (
                f"what {detail} says, which is held out, is also trained on",
                "take it out of one side, or set mixture.decontaminate: true",
            ),
            "benchmark-in-train": (
                f"holds a benchmark's prompt, {detail}",
                "set mixture.decontaminate: true to drop such rows",
            ),
        }
        what, hint = said[name]
        documents = f" ({count:,} {'document' if count == 1 else 'documents'})"
        return Fault(name, what + documents, where, hint)

    def _truncated(self, reports: list[SourceReport]) -> list[Fault]:
        """Sources of which more rows were cut than the recipe allows: what is cut loses its end token."""
        limit = self._job.sequence.max_truncated
        faults = []
        for one in reports:
            cut = one.truncated + sum(one.dropped.get(reason, 0) for reason in (NO_LABEL, SAME_WHEN_CUT))
            if cut <= limit * one.rows:
                continue
            what = f"{cut:,} of {one.rows:,} rows ({cut / one.rows:.0%}) were cut at sequence.max_length"
            what += f" {self._job.sequence.max_length}, more than max_truncated {limit:.0%}"
            hint = (
                "raise max_length, write overlong: drop (or split, for conversations and text), or raise max_truncated"
            )
            faults.append(Fault("truncated", what, one.label, hint))
        return faults

    def _no_documents(self, reports: list[SourceReport]) -> list[Fault]:
        """Nothing left on a side that the recipe asks for."""
        faults = []
        for role in dict.fromkeys(one.role for one in reports):
            side = [one for one in reports if one.role == role]
            if any(one.kept for one in side):
                continue
            rows = sum(one.rows for one in side)
            reasons: dict[str, int] = {}
            for one in side:
                for reason, n in one.dropped.items():
                    reasons[reason] = reasons.get(reason, 0) + n
            listed = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
            what = f"no {role} documents are left: all {rows:,} rows were dropped ({listed})"
            too_long = any(reason in TOO_LONG for reason in reasons)
            hint = "raise sequence.max_length" if too_long else "llama-ft preview shows the rows"
            faults.append(Fault(NO_DOCUMENTS, what, side[0].label, hint))
        return faults
