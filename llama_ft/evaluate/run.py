"""`llama-ft eval`: every suite on every subject, what was measured before taken over, results written as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from filelock import FileLock, Timeout
from rich.console import Console

from llama_ft.errors import MachineFault, Problem, UserError, did_you_mean
from llama_ft.evaluate.chat.judges import Judging
from llama_ft.evaluate.material import kind_of
from llama_ft.evaluate.opening import DEFAULT, check_subjects, find_source, open_model, open_subjects
from llama_ft.evaluate.page import by_suite, write_page
from llama_ft.evaluate.result import SuiteResult, file_name
from llama_ft.evaluate.subject import Subject
from llama_ft.evaluate.suites import Context, Suite, find_suites
from llama_ft.evaluate.table import print_results
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema_model import RopeScaling

PAGE = "eval.html"
SECONDS = 10
"""Between two lines of progress where stderr is no terminal."""


@dataclass(frozen=True)
class Asked:
    """What a user asked for: see the options of `llama-ft eval`."""

    source: str
    suites: list[str]
    subjects: list[str] | None = None
    data: list[str] = field(default_factory=list)
    layout: str | None = None
    template: str | None = None
    limit: int | None = None
    seed: int = 0
    samples: int = 1
    temperature: float | None = None
    unsandboxed: bool = False
    tasks: list[str] = field(default_factory=list)
    max_tokens: int | None = None
    judging: Judging | None = None
    apply_chat_template: bool = False
    lengths: list[int] = field(default_factory=list)
    rope: RopeScaling | None = None
    infilling_tokens: list[str] | None = None
    out: Path | None = None
    overwrite: bool = False


def evaluate_source(asked: Asked) -> list[SuiteResult]:
    """Measures, writes SUITE-SUBJECT.json for each pair and one page, prints the tables.

    Raises UserError with everything that stands in the way before a model is loaded, MachineFault where the disk is
    full: what is measured is kept, and the same command goes on. Ctrl-C leaves in the same way.
    """
    judged = ["judge"] if asked.judging is not None and "chat" in asked.suites else []
    suites = find_suites([*asked.suites, *judged])
    run = find_source(asked.source)
    names = _check(asked, run)
    home = run.path if run is not None else (asked.out or Path("runs", f"eval-{_plain(asked.source)}"))
    report = _Progress()
    context = Context(home / "eval", run, asked.data, asked.layout, asked.limit, asked.seed, report)
    context.tasks, context.chat = asked.tasks, asked.apply_chat_template
    context.max_tokens, context.judging = asked.max_tokens, asked.judging
    context.samples, context.temperature, context.unsandboxed = asked.samples, asked.temperature, asked.unsandboxed
    context.lengths, context.infilling_tokens = asked.lengths, asked.infilling_tokens
    problems = [problem for suite in suites for problem in suite.needs(context)] or _unused(suites, context)
    if problems:
        raise UserError(dict.fromkeys(problems))
    _make(context.folder)
    results: list[SuiteResult] = []
    try:
        with _held(context.folder, suites):
            for subject in _subjects(asked, run, names, context):
                for notice in subject.notices:
                    report.say(notice)
                for suite in suites:
                    report.begin(suite.name, subject.name)
                    results.append(_measured(suite, subject, context, asked.overwrite))
                del subject  # its memory is the next one's
    except KeyboardInterrupt:
        report.end()
        report.say("stopped; what is measured is kept, the same command goes on")
        raise
    report.end()
    print_results(by_suite(results))
    page = write_page(context.folder, run.recipe.name if run is not None else asked.source, home / PAGE)
    print(f"written: {context.folder}/*.json, {page}")
    return results


def _check(asked: Asked, run: Run | None) -> list[str]:
    """The subjects to measure. UserError for options that do not go together."""
    problems = []
    if run is None and asked.subjects is not None:
        problems.append(Problem("a model by itself has no subjects", key="--subjects", hint="leave it out"))
    unscaled = "leave it out; --subjects unscaled,base,tuned shows its base without any"
    for key, of_a_model, what, hint in (
        ("--out", asked.out, "a run's results go into its own eval/", "leave it out"),
        ("--template", asked.template, "a run is measured in the template that it was trained with", "leave it out"),
        ("--rope", asked.rope, "a run is measured with the RoPE scaling that it was trained with", unscaled),
    ):
        if run is not None and of_a_model is not None:
            problems.append(Problem(what, key=key, hint=hint))
    for key, value, needed in (
        ("--judge", asked.judging, {"chat", "judge"}),
        ("--max-tokens", asked.max_tokens, {"chat"}),
        ("--tasks", asked.tasks or None, {"academic"}),
        ("--apply-chat-template", asked.apply_chat_template or None, {"academic"}),
        ("--lengths", asked.lengths or None, {"positions", "passkey"}),
        ("--infilling-tokens", asked.infilling_tokens, {"infilling"}),
    ):
        if value is not None and not needed & set(asked.suites):
            problems.append(Problem(f"only the suite {min(needed)} has {key}", key=key, hint="leave it out"))
    judging = asked.judging
    if run is not None and judging is not None and judging.pairs and judging.against is None:
        there = (run.path / "eval" / file_name("chat", "base")).is_file()
        if not there and "base" not in (asked.subjects or DEFAULT):
            what = "there are no answers of the base to hold others against"
            problems.append(Problem(what, key="--pairs", hint="--subjects base,tuned, or --against FILE"))
    if asked.layout is not None:
        from llama_ft.data.layouts import LAYOUTS

        if asked.layout not in LAYOUTS:
            hint = did_you_mean(asked.layout, LAYOUTS, kind="layouts")
            problems.append(Problem(f"no such layout '{asked.layout}'", key="--layout", hint=hint))
    if asked.template is not None and run is None:
        from llama_ft.data.template import Template

        try:
            Template.load(asked.template if asked.template != "base" else "chatml", None)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems)
    return check_subjects(run, asked.subjects if asked.subjects is not None else DEFAULT) if run is not None else []


def _unused(suites: Sequence[Suite], context: Context) -> list[Problem]:
    """Data that was named and that no suite would look at."""
    kinds = {kind for suite in suites for kind in suite.kinds}
    names = ", ".join(suite.name for suite in suites)
    return [
        Problem(f"{name} holds {kind_of(name)}, which {names} does not measure on", key="--data", hint="leave it out")
        for name in context.data
        if kind_of(name) not in kinds
    ]


def _subjects(asked: Asked, run: Run | None, names: Sequence[str], context: Context) -> Iterator[Subject]:
    if run is None:
        yield open_model(asked.source, asked.template, asked.rope, max(asked.lengths, default=0))
    else:
        assert context.prepared is not None
        yield from open_subjects(run, names, context.prepared)


def _measured(suite: Suite, subject: Subject, context: Context, overwrite: bool) -> SuiteResult:
    """A suite's result of one subject, written. Items measured before with the same settings are not asked again."""
    path = context.path(suite.name, subject.name)
    part = path.with_suffix(".part.jsonl")
    try:
        if overwrite:
            path.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
        result = suite.run(subject, context)
        result.write(context.folder)
        part.unlink(missing_ok=True)
    except OSError as error:
        hint = "make room, then start the same command again: what is measured is kept"
        raise MachineFault(f"{path} cannot be written: {error.strerror or error}", hint=hint) from error
    return result


def _plain(source: str) -> str:
    """A source as the name of a folder."""
    return Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source.replace("/", "-")


@contextmanager
def _held(folder: Path, suites: Sequence[Suite]) -> Iterator[None]:
    """Keeps other calls from measuring the same suites into the same files."""
    with ExitStack() as locks:
        for suite in suites:
            try:
                locks.enter_context(FileLock(folder / f".{suite.name}.lock", timeout=0))
            except Timeout:
                what = f"another llama-ft eval measures suite {suite.name} into {folder}"
                hint = "wait until it is done: the same command then takes its results over"
                raise UserError(what, hint=hint) from None
        yield


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}", hint="--out FOLDER") from error


class _Progress:
    """A line on stderr: redrawn on a terminal, else a new one when a part begins, ends, and every few seconds."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.what = ""
        self.last, self.shown, self.drawn = 0.0, "", False

    def begin(self, suite: str, subject: str) -> None:
        """A suite begins to measure a subject."""
        self.end()
        self.what = f"{suite} · {subject}"
        self.say(self.what)

    def __call__(self, what: str, done: int, total: int) -> None:
        """See suites.Report."""
        if not total:
            return
        line = f"{self.what} · {what}: {done:,} of {total:,}"
        if self.console.is_terminal:
            print(f"\r\033[K{line[: self.console.width - 1]}", end="", file=sys.stderr, flush=True)
            self.drawn = True
        elif (done == total or monotonic() - self.last > SECONDS) and line != self.shown:
            self.say(line)
            self.last, self.shown = monotonic(), line

    def say(self, text: str) -> None:
        """A line of its own."""
        self.end()
        print(text, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Takes the line that is redrawn away."""
        if self.drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
            self.drawn = False
