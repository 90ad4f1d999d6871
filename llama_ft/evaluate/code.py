"""Suite `code`: HumanEval and MBPP, each answer run with the task's tests behind walls; pass@k.

A model that converses is asked in its template, and the code of its fenced block counts; a base continues the
original's prompt up to the original's stop strings.
"""

from __future__ import annotations

import hashlib
import platform
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.data.examples import Conversation
from llama_ft.data.render import TemplateRefusal
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.code_tasks import KEYS, Kind, Task, kind_of, read_tasks
from llama_ft.evaluate.material import drawn
from llama_ft.evaluate.result import SuiteResult, scored
from llama_ft.evaluate.suites import Context
from llama_ft.sandbox.programs import Sandbox

if TYPE_CHECKING:
    from llama_ft.evaluate.subject import Subject

MAX_TOKENS = 512
"""Of an answer; HumanEval's longest solution takes 250 of Llama 2's."""
SECONDS = 10.0
"""Of the clock for a program with its tests. openai/human-eval gives 3, on a machine that does nothing else."""
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of several samples: arXiv 2107.03374, sections 3.2 and 3.3 (0.8 is best for pass@100). A single one is greedy."""
KS = (1, 10, 100)
AT_ONCE = 64
"""Tasks whose answers are drawn, run and kept together."""
UNSANDBOXED = "--unsandboxed runs it all the same, with your rights"


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The unbiased estimate that one of k samples passes, of `samples` ≥ k of which `passed` do.

    1 − C(samples − passed, k) / C(samples, k), as a product that does not overflow: arXiv 2107.03374, equation 1.
    ValueError for k > samples, of which the formula knows nothing.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} of {samples} samples")
    missed = 1.0
    for number in range(samples - passed + 1, samples + 1):
        missed *= max(0.0, 1.0 - k / number)
    return 1.0 - missed


class Code:
    """See the module."""

    name = "code"
    about = "HumanEval and MBPP from --data, pass@k; programs run in a sandbox"
    kinds = ("code",)

    def needs(self, context: Context) -> list[Problem]:
        """A file of tasks, and walls to run programs behind."""
        problems: list[Problem] = []
        files = _files(context)
        if not files:
            hint = "--data HumanEval.jsonl.gz (openai/human-eval) or --data mbpp.jsonl (google-research)"
            problems.append(Problem("suite code needs a file of HumanEval or MBPP", key="--data", hint=hint))
        seen: dict[str, str] = {}
        for name, kind in files:
            try:
                twice = [task.id for task in read_tasks(name, kind) if seen.setdefault(task.id, name) != name]
            except UserError as error:
                problems += error.problems
                continue
            if twice:
                what = f"{name} and {seen[twice[0]]} hold the same tasks ({twice[0]}, {len(twice)} in all)"
                problems.append(Problem(what, key="--data", hint="measure them one after the other"))
        try:
            Sandbox(1, bare=context.unsandboxed, hint=UNSANDBOXED).close()
        except UserError as error:
            problems += error.problems
        return problems

    def run(self, subject: Subject, context: Context) -> SuiteResult:
        """Measures one subject; see suites.Suite. MachineFault when no process for programs can be started."""
        samples = context.samples
        temperature = context.temperature if context.temperature is not None else TEMPERATURE if samples > 1 else 0.0
        chat = converses(subject, context)
        files = _files(context)
        settings = context.settings(
            self.name,
            subject,
            samples=samples,
            temperature=temperature,
            top_p=TOP_P if temperature else 1.0,
            max_tokens=MAX_TOKENS,
            seconds=SECONDS,
            asked="chat" if chat else "completion",
            template=subject.renderer.template.sha256[:16] if chat else None,
            system=subject.system if chat else None,
            walls=not context.unsandboxed,
            python=platform.python_version(),
            files={Path(name).name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name, _ in files},
        )
        rows: list[dict[str, Any]] = []
        asked: dict[str, str] = {}
        with Sandbox(bare=context.unsandboxed, hint=UNSANDBOXED) as sandbox:
            for name, kind in files:
                tasks = drawn(read_tasks(name, kind), context.limit, context.seed)
                asked |= {task.id: task.asked for task in tasks}
                work = _work(subject, sandbox, chat=chat, samples=samples, temperature=temperature, seed=context.seed)
                rows += context.items(subject, settings, kind, tasks, work, at_once=AT_ONCE)
        kinds = list(dict.fromkeys(kind for _, kind in files))
        names = [score_name(kind, k) for kind in kinds for k in KS if k <= samples]
        scores = [scored(rows, name, "share", "higher", context.seed) for name in names]
        leaks = context.leaks(asked)
        seconds = context.seconds(self.name, subject)
        return SuiteResult(self.name, subject.name, scores, rows, settings, seconds, leaks)


def score_name(kind: Kind, k: int) -> str:
    """`HumanEval: pass@1`."""
    return f"{kind}: pass@{k}"


def _files(context: Context) -> list[tuple[str, Kind]]:
    """Those of `--data` that hold tasks."""
    found = [(name, kind_of(name)) for name in context.data if Path(name).is_file()]
    return [(name, kind) for name, kind in found if kind in KEYS and kind is not None]


def converses(subject: Subject, context: Context) -> bool:
    """Whether a subject is asked in its template: not without one, and not a run's base that came without one."""
    try:
        subject.renderer.prompt_ids([{"role": "user", "content": "?"}])
    except TemplateRefusal:
        return False
    if subject.name != "base" or context.run is None:
        return True
    from llama_ft.export.trained import base_folder
    from llama_ft.tokenizer.load import load_tokenizer

    return bool(load_tokenizer(base_folder(context.run)).chat_template)


def _work(
    subject: Subject, sandbox: Sandbox, *, chat: bool, samples: int, temperature: float, seed: int
) -> Callable[[Sequence[Task], Callable[[int], None]], list[dict[str, Any]]]:
    def work(tasks: Sequence[Task], tick: Callable[[int], None]) -> list[dict[str, Any]]:
        prompts = [prompt_ids(subject, task, chat=chat) for task in tasks]
        # Answers are drawn by their number among these: another block of tasks gets other random numbers.
        drawn_by = (seed << 32) + zlib.crc32(tasks[0].id.encode())
        stops = [] if chat else list(dict.fromkeys(stop for task in tasks for stop in task.stops))
        top_p = TOP_P if temperature else 1.0
        answers = subject.answers(prompts, MAX_TOKENS, stops, temperature, top_p, drawn_by, samples, tick)
        programs = [
            task.program(answer.text, chat=chat) for task, group in zip(tasks, answers, strict=True) for answer in group
        ]
        outcomes = sandbox.run(programs, SECONDS)
        rows = []
        for number, (task, group) in enumerate(zip(tasks, answers, strict=True)):
            own = outcomes[number * samples : (number + 1) * samples]
            passed = own.count("passed")
            values = {score_name(task.kind, k): pass_at_k(samples, passed, k) for k in KS if k <= samples}
            row: dict[str, Any] = {"id": task.id, "asked": task.asked, "answer": group[0].text, "values": values}
            row |= {"outcomes": own, "ended": [one.ended for one in group], "passed": passed, "samples": samples}
            rows.append(row | ({"answers": [one.text for one in group]} if samples > 1 else {}))
        return rows

    return work


def prompt_ids(subject: Subject, task: Task, *, chat: bool) -> list[int]:
    """What a subject is asked, as ids: in its template, with the run's system prompt; or the text to be continued."""
    if chat:
        turns: Conversation = [{"role": "user", "content": task.chat}]
        if subject.system:
            turns.insert(0, {"role": "system", "content": subject.system})
        return subject.renderer.prompt_ids(turns)
    ids = [int(token) for token in subject.tokenizer(task.complete)["input_ids"]]
    # A tokenizer that closes texts would have the model begin another.
    return ids[:-1] if ids and ids[-1] == subject.tokenizer.eos_token_id else ids


SUITE = Code()
