"""Suite `academic`: tasks of lm-evaluation-harness, by name (from the hub) or with rows of local files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from numbers import Real
from typing import TYPE_CHECKING, Any

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.academic_tasks import Item, parse, problems_of_files, stamps
from llama_ft.evaluate.result import Score, SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

CLOSE = 1e-6
"""Of the harness's own value and the mean over rows: else the measure is no mean, and has no interval here."""
ASKED = 2000
"""Characters of a prompt that its row shows: those next to the answer."""


class Academic:
    """See the module."""

    name = "academic"
    about = "tasks of lm-evaluation-harness, named by --tasks"
    kinds: tuple[str, ...] = ()

    def needs(self, context: Context) -> list[Problem]:
        """The harness, tasks that it has, and what these need."""
        problems = []
        if find_spec("lm_eval") is None:
            hint = "pip install 'llama-ft[eval]'"
            problems.append(Problem("suite academic needs lm-evaluation-harness", hint=hint))
        if not context.tasks:
            hint = "--tasks arc_easy,hellaswag, or with rows of a file: --tasks ifeval=ROWS.jsonl, my_task.yaml"
            problems.append(Problem("suite academic needs tasks", key="--tasks", hint=hint))
        items = [parse(place) for place in context.tasks]
        problems += problems_of_files(items)
        if problems:
            return problems
        from llama_ft.evaluate.academic_check import check

        return [problem for item in items for problem in check(item)]

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. UserError for tasks that cannot be made, whose rows cannot be had, or
        that ask for what the subject cannot do."""
        from importlib.metadata import version

        items = [parse(place) for place in context.tasks]
        files = {name: at for item in items for name, at in stamps(item).items()}
        settings = context.settings(
            self.name,
            subject,
            tasks=[item.id for item in items],
            files=files,
            lm_eval=version("lm_eval"),
            template=_template(subject) if context.chat else None,
        )
        earlier = context.finished(subject, settings)
        if earlier is not None:
            return earlier
        tasks = [_measure(subject, context, settings, item) for item in items]
        rows = [row for task in tasks for row in task["documents"]]
        scores = [_score(measured, rows, context.seed) for task in tasks for measured in task["measured"]]
        leaks = context.leaks({row["id"]: row["asked"] for row in rows})
        return SuiteResult(self.name, subject.name, scores, rows, settings, context.seconds(self.name, subject), leaks)


def _template(subject: Subject) -> dict[str, Any]:
    """What requests are written in. UserError for a subject that has no template."""
    from llama_ft.evaluate.opening import UNSPOKEN

    template = subject.renderer.template
    if template.source == UNSPOKEN:
        what = f"{subject.name} has no chat template to ask tasks in"
        hint = "leave it out, or say which: --template chatml"
        raise UserError(what, key="--apply-chat-template", hint=hint)
    return {"sha256": template.sha256, "system": subject.system}


def _measure(subject: Subject, context: Context, settings: dict[str, Any], item: Item) -> dict[str, Any]:
    """One task by the harness: its measures, and a row for each of its documents.

    Its own seeds are left alone: they draw the examples in prompts, which are then those of `lm_eval`'s command line.
    What is kept are the answers to its requests, so a call that goes on asks the others alone.
    """
    from lm_eval import simple_evaluate

    from llama_ft.evaluate.academic_check import FAULTS, refused
    from llama_ft.evaluate.academic_tasks import opened
    from llama_ft.evaluate.harness import AT_ONCE, SubjectLM

    def keep(requests: Sequence[Any], work: Any) -> list[dict[str, Any]]:
        return context.items(subject, settings, f"{item.id}: requests", requests, work, at_once=AT_ONCE)

    try:
        with opened(item) as manager:
            found = simple_evaluate(
                model=SubjectLM(subject, keep, context.seed),
                tasks=[item.id],
                limit=context.limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=context.chat,
                system_instruction=subject.system if context.chat else None,
                task_manager=manager,
            )
    except FAULTS as error:
        raise UserError([refused(item, error)]) from error
    assert found is not None
    measured, documents = [], []
    for task, samples in found["samples"].items():
        rows = _rows(task, samples)
        documents += rows
        better = found["higher_is_better"].get(task, {})
        for key, value in found["results"][task].items():
            measure, comma, filtered = key.partition(",")
            if comma and isinstance(value, Real) and not measure.endswith("_stderr"):
                way = "lower" if better.get(measure) is False else "higher"
                name = _name(task, measure, filtered)
                measured.append({"name": name, "value": float(value), "rows": len(rows), "better": way})
    return {"measured": measured, "documents": documents}


def _rows(task: str, samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each document; where a task reads answers in several ways, with the values of all of them."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        asked = _first_argument(sample)
        row = rows.setdefault(
            sample["doc_id"],
            {
                "id": f"{task}:{sample['doc_id']}",
                "asked": asked[-ASKED:],
                "answer": str(sample["filtered_resps"])[:ASKED],
                "wanted": str(sample["target"])[:ASKED],
                "values": {},
            },
        )
        for measure in sample["metrics"]:
            value = sample.get(measure)
            if isinstance(value, Real):
                row["values"][_name(task, measure, sample["filter"])] = float(value)
    return list(rows.values())


def _first_argument(sample: dict[str, Any]) -> str:
    arguments: Any = sample["arguments"]
    while isinstance(arguments, dict | list | tuple) and arguments:
        arguments = next(iter(arguments.values() if isinstance(arguments, dict) else arguments))
    return str(arguments)


def _name(task: str, measure: str, filtered: str) -> str:
    return f"{task}: {measure}" + ("" if filtered == "none" else f" ({filtered})")


def _score(measured: dict[str, Any], rows: Sequence[dict[str, Any]], seed: int) -> Score:
    """The harness's own value, with our interval where it is the mean over rows."""
    name, value = measured["name"], measured["value"]
    unit = "share" if 0 <= value <= 1 else ""
    own = scored(rows, name, unit, measured["better"], seed)
    if own.rows and math.isclose(own.value, value, abs_tol=CLOSE):
        return own
    return Score(name, value, math.nan, math.nan, measured["rows"], unit, measured["better"])


SUITE = Academic()
