"""HumanEval and MBPP: their rows read, what a model is asked, and the program that its answer makes with the tests.

HumanEval (arXiv 2107.03374) in the format of openai/human-eval: task_id, prompt, entry_point, canonical_solution, test.
MBPP (arXiv 2108.07732) in the format of google-research: task_id, text, code, test_list, test_setup_code; of its
sanitised file `prompt` and `test_imports` are read in their place.
"""

from __future__ import annotations

import ast
import gzip
import json
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llama_ft.errors import Problem, UserError
from llama_ft.sandbox.fences import before_fences, blocks_in

Kind = Literal["HumanEval", "MBPP"]
KEYS: dict[Kind, frozenset[str]] = {
    "HumanEval": frozenset({"task_id", "prompt", "entry_point", "canonical_solution", "test"}),
    "MBPP": frozenset({"task_id", "code", "test_list"}),
}
"""What a row of each has, by which its file is known."""
HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Where a continued function ends: arXiv 2107.03374, section 3.2."""
MBPP_STOPS = ("[DONE]",)
MBPP_SHOTS, MBPP_TEST = (2, 3, 4), range(11, 511)
"""Tasks that the prompt shows, and those that are asked: google-research/mbpp, README."""
_SHOWN = 10


@dataclass(frozen=True)
class Task:
    """One task. `asked`: what it wants, for people; `complete`: what a base model continues up to one of `stops`;
    `chat`: what a chat model is told; `before`: what a continuation stands behind in its program; `entry`: the function
    that is tested; `tests`: what runs after it; `solution`: the data set's own continuation or code."""

    id: str
    kind: Kind
    asked: str
    complete: str
    chat: str
    stops: tuple[str, ...]
    before: str
    entry: str
    tests: str
    solution: str

    def program(self, answer: str, *, chat: bool) -> tuple[str, ...]:
        """The parts that run one after the other (llama_ft/sandbox): the answer's code, then the tests.

        Of a chat answer the first fenced block counts that defines the function; else what stands before the first
        fence if that does (a model that was given the opening fence to read closes it alone); else the first block that
        is not blank, else all of it up to a fence.
        Imports and helpers of HumanEval's prompt are there for it; a block that holds but a body continues the prompt.
        """
        if not chat:
            return (self.before + answer, self.tests)
        code = self._code(answer)
        if self.before and not _defines(code, self.entry):
            return (self.before + textwrap.indent(textwrap.dedent(code), "    "), self.tests)
        return (self.before, code, self.tests) if self.before else (code, self.tests)

    def _code(self, answer: str) -> str:
        before, blocks = before_fences(answer), [block for block in blocks_in(answer) if block.strip()]
        fit = [text for text in (*blocks, before) if _defines(text, self.entry)]
        return next(iter([*fit, *blocks, before]))


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async +)?(?:def|class) +{re.escape(name)}\b", code, re.MULTILINE) is not None


def kind_of(path: str) -> Kind | None:
    """Which of the two a file of JSON lines holds, packed with gzip or not; None for any other file."""
    try:
        with open_text(path) as file:
            first = json.loads(next(line for line in file if line.strip()))
    except (OSError, EOFError, ValueError, StopIteration):
        return None
    return next((kind for kind, keys in KEYS.items() if isinstance(first, dict) and keys <= first.keys()), None)


def read_tasks(path: str, kind: Kind) -> list[Task]:
    """All tasks of a file that are asked, in its order. UserError naming the rows that cannot be read.

    Of an MBPP file that holds its test split (tasks 11 to 510) these are asked, else all but the three that the prompt
    of base models shows.
    """
    rows: list[dict[str, Any]] = []
    tasks: list[Task] = []
    problems: list[Problem] = []
    for place, row in _rows(path, problems):
        try:
            tasks.append(_human_eval(row) if kind == "HumanEval" else _mbpp(row, ""))
            rows.append(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            problems.append(Problem(f"this is no row of {kind}: {what}", f"{path}, row {place}"))
    if len({task.id for task in tasks}) < len(tasks):
        problems.append(Problem("two rows have the same task_id", path))
    if problems or not tasks:
        raise UserError(problems[:_SHOWN] or [Problem("it holds no rows", path)])
    if kind == "HumanEval":
        return tasks
    shown = "".join(_shot(row) for row in rows if row["task_id"] in MBPP_SHOTS)
    asked = [row for row in rows if row["task_id"] in MBPP_TEST]
    return [_mbpp(row, shown) for row in asked or (row for row in rows if row["task_id"] not in MBPP_SHOTS)]


def open_text(path: str) -> Any:
    """A file of UTF-8 text to read, packed with gzip or not."""
    return gzip.open(path, "rt", encoding="utf-8") if path.endswith(".gz") else Path(path).open(encoding="utf-8")


def _rows(path: str, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with open_text(path) as file:
            for place, line in enumerate(file):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                    yield place, row
    except (OSError, EOFError, ValueError) as error:
        problems.append(Problem(f"it cannot be read: {error}", path))


def _human_eval(row: dict[str, Any]) -> Task:
    prompt, entry = str(row["prompt"]), str(row["entry_point"])
    tests = f"{row['test']}\ncheck({entry})\n"
    _readable(prompt + str(row["canonical_solution"]), tests)
    chat = (
        "Complete this Python function. Answer with the whole function, its imports included, in one fenced block.\n\n"
        f"```python\n{prompt.rstrip()}\n```"
    )
    asked, solution = prompt.strip(), str(row["canonical_solution"])
    return Task(str(row["task_id"]), "HumanEval", asked, prompt, chat, HUMANEVAL_STOPS, prompt, entry, tests, solution)


def _mbpp(row: dict[str, Any], shown: str) -> Task:
    text, code, listed = _text(row), str(row["code"]).replace("\r\n", "\n"), [str(test) for test in row["test_list"]]
    setup = [*(row.get("test_imports") or []), row.get("test_setup_code") or ""]
    tests = "\n".join([*filter(None, setup), *listed]) + "\n"
    _readable(code, tests)
    defined = [one.name for one in ast.parse(code).body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    entry = next((name for name in defined if re.search(rf"\b{re.escape(name)}\b", tests)), "")
    if not listed or not entry:
        raise ValueError("its tests name nothing that its code defines")
    chat = f"{text} Your code must pass these tests:\n\n```python\n{chr(10).join(listed)}\n```\n\n"
    chat += "Answer with the code, in one fenced block."
    complete = f"{shown}{_head(text, listed)}[BEGIN]\n"
    return Task(f"MBPP/{row['task_id']}", "MBPP", text, complete, chat, MBPP_STOPS, "", entry, tests, code)


def _text(row: dict[str, Any]) -> str:
    return str(row["text"] if "text" in row else row["prompt"]).strip()


def _head(text: str, tests: list[str]) -> str:
    """The prompt of arXiv 2108.07732, section 4.1 (figure 1), as far as the code."""
    task = f"You are an expert Python programmer, and here is your task: {text}"
    return "\n".join([f"{task} Your code should pass these tests:\n", *tests, ""])


def _shot(row: dict[str, Any]) -> str:
    code = str(row["code"]).replace("\r\n", "\n").strip()
    return f"{_head(_text(row), row['test_list'])}[BEGIN]\n{code}\n[DONE]\n\n"


def _readable(*parts: str) -> None:
    """ValueError for what is no Python: a task that nothing can pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in other people's strings
        try:
            for part in parts:
                compile(part, "<task>", "exec", dont_inherit=True)
        except SyntaxError as error:
            raise ValueError(f"its code is no Python ({error.msg}, line {error.lineno})") from error
