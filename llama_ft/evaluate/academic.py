"""Suite `academic`: tasks of lm-evaluation-harness, by name (from the hub) or as YAML files (from local rows)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.result import Score, SuiteResult, scored
from llama_ft.evaluate.suites import Context

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

CLOSE = 1e-6
"""Of the harness's own value and the mean over rows: else the measure is no mean, and has no interval here."""
ASKED = 2000
"""Characters of a prompt that its row shows: those next to the answer."""


@dataclass(frozen=True)
class Item:
    """A task: `id` is its name; `place` the name or the YAML file that was given."""

    id: str
    place: str


class Academic:
    """See the module."""

    name = "academic"
    about = "tasks of lm-evaluation-harness, named by --tasks"
    kinds: tuple[str, ...] = ()

    def needs(self, context: Context) -> list[Problem]:
        """The harness, and tasks."""
        problems = []
        if find_spec("lm_eval") is None:
            hint = "pip install 'llama-ft[eval]'"
            problems.append(Problem("suite academic needs lm-evaluation-harness", hint=hint))
        if not context.tasks:
            hint = "--tasks arc_easy,hellaswag, or files: --tasks my_task.yaml"
            problems.append(Problem("suite academic needs tasks", key="--tasks", hint=hint))
        for place in context.tasks:
            if _is_file(place) and not Path(place).is_file():
                problems.append(Problem(f"there is no file '{place}'", key="--tasks"))
        return problems

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. UserError for tasks that there are none of, or whose rows cannot be
        had."""
        from importlib.metadata import version

        items = [Item(Path(place).stem if _is_file(place) else place, place) for place in context.tasks]
        settings = context.settings(
            self.name, subject, tasks=[item.id for item in items], lm_eval=version("lm_eval"), template=None
        )
        tasks = context.items(subject, settings, "tasks", items, _work(subject, context), at_once=1)
        rows = [row for task in tasks for row in task["documents"]]
        scores = [_score(measured, rows, context.seed) for task in tasks for measured in task["measured"]]
        leaks = context.leaks({row["id"]: row["asked"] for row in rows})
        return SuiteResult(self.name, subject.name, scores, rows, settings, context.seconds(self.name, subject), leaks)


def _is_file(place: str) -> bool:
    return Path(place).suffix in (".yaml", ".yml")


def _work(
    subject: Subject, context: Context
) -> Callable[[Sequence[Item], Callable[[int], None]], list[dict[str, Any]]]:
    def work(items: Sequence[Item], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        return [_measure(subject, context, item) for item in items]

    return work


def _measure(subject: Subject, context: Context, item: Item) -> dict[str, Any]:
    """One task by the harness: its measures, and a row for each of its documents.

    Its own seeds are left alone: they draw the examples in prompts, which are then those of `lm_eval`'s command line.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from llama_ft.evaluate.harness import SubjectLM

    file = _is_file(item.place)
    answered = 0

    def told(more: int) -> None:
        nonlocal answered
        answered += more
        context.report(f"{item.id}: requests answered", answered, answered)

    try:
        # A file brings itself and what lies beside it; the harness's own tasks are thousands of files to read.
        manager = TaskManager(include_path=str(Path(item.place).resolve().parent), include_defaults=False)
        found = simple_evaluate(
            model=SubjectLM(subject, told),
            tasks=[item.id],
            limit=context.limit,
            bootstrap_iters=0,
            log_samples=True,
            task_manager=manager if file else TaskManager(),
        )
    except (KeyError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        what = f"the task '{item.place}' cannot be run: {reason}"
        hint = "its file must be named as the task in it" if file else "see `lm_eval ls tasks`; rows come from the hub"
        raise UserError(what, key="--tasks", hint=hint) from error
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
    return {"id": item.id, "measured": measured, "documents": documents}


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
