"""Files of questions, as their authors write them: MT-bench and Vicuna's 80, AlpacaEval, self-instruct; and references.

{"question_id": 81, "category": "writing", "turns": ["…", "…"]}           FastChat's llm_judge
{"question_id": 101, "choices": [{"turns": ["…", "…"]}], …}               its reference answers
{"instruction": "…", "output": "…", "generator": "…", "dataset": "…"}     AlpacaEval, as a JSON list
{"id": "…", "instruction": "…", "instances": [{"input": "…", …}]}         self-instruct, user oriented
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama_ft.data.examples import Conversation
from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.material import drawn, kind_of, numbered

if TYPE_CHECKING:
    from llama_ft.evaluate.suites import Context

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Of FastChat's questions by category, 0.7 for any other (fastchat/llm_judge/common.py, gen_model_answer.py)."""
OTHER = 0.7
REFERRED = {"math", "reasoning", "coding"}
"""Categories whose answers FastChat has judged beside a reference (common.py, NEED_REF_CATS)."""


@dataclass(frozen=True)
class Question:
    """What is asked, turn by turn. `input`: of a single turn, what its instruction is about; `category`: as the file
    has it; `temperature`: what its authors draw answers with, 0 where they say nothing; `reference`: answers.
    """

    id: str
    source: str
    turns: tuple[str, ...]
    input: str = ""
    category: str = ""
    temperature: float = 0.0
    reference: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """All of it in one text."""
        return "\n\n".join([*self.turns, *([self.input] if self.input else [])])

    def conversation(self, answers: Sequence[str], *, joined: bool = False) -> Conversation:
        """The turns up to the one after as many answers. joined: with its input in the text of the question."""
        found: Conversation = []
        for turn, answer in zip(self.turns, answers, strict=False):
            found += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        found.append({"role": "user", "content": self.turns[len(answers)]})
        if self.input and joined:
            found[0]["content"] = self.asked
        elif self.input:
            found[0]["input"] = self.input
        return found


def questions(context: Context) -> list[Question]:
    """Those of all `--data` files, at most `context.limit` of each. UserError naming bad rows."""
    names = [name for name in context.data if kind_of(name) == "questions"]
    problems: list[Problem] = []
    found: list[Question] = []
    for name, label in zip(names, numbered([_label(name) for name in names]), strict=True):
        own = list(_read(Path(name), label, problems))
        seen: set[str] = set()
        for one in own:
            if one.id in seen:
                problems.append(Problem(f"two questions are called {one.id.rpartition(':')[2]}", name))
            seen.add(one.id)
        if not own and not problems:
            problems.append(Problem("there is no question in it", name))
        found += drawn(own, context.limit, context.seed)
    if problems:
        raise UserError(problems[:10])
    return found


def references(context: Context) -> dict[str, tuple[str, ...]]:
    """The answers of `--data` files of references, by the number of their question. UserError naming bad rows."""
    found: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for name in context.data:
        if kind_of(name) == "references":
            for number, row in rows_of(Path(name), problems):
                try:
                    found[str(row["question_id"])] = _texts(row["choices"][0]["turns"])
                except (KeyError, IndexError, TypeError, ValueError):
                    what = "not a reference answer: question_id and choices, of which the first has turns (texts)"
                    problems.append(Problem(what, f"{name}, row {number}"))
    if problems:
        raise UserError(problems[:10])
    return found


def rows_of(path: Path, problems: list[Problem]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(0-based number, row) of a JSON list or of JSON lines, gzipped or not; what is no row goes to `problems`."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        problems.append(Problem(f"it cannot be read: {getattr(error, 'strerror', None) or error}", str(path)))
        return
    if text.lstrip().startswith("["):
        try:
            rows = list(enumerate(json.loads(text)))
        except ValueError as error:
            problems.append(Problem(f"not JSON: {error}", str(path)))
            return
    else:
        rows = []
        for number, line in enumerate(text.split("\n")):  # splitlines would also cut at U+2028, which JSON allows
            if line.strip():
                try:
                    rows.append((number, json.loads(line)))
                except ValueError as error:
                    problems.append(Problem(f"not JSON: {error}", f"{path}, row {number}"))
    for number, row in rows:
        if isinstance(row, dict):
            yield number, row
        else:
            problems.append(Problem("not a row: a JSON object is wanted", f"{path}, row {number}"))


def _label(name: str) -> str:
    """A file's name without its ending: `mt_bench_question`."""
    stem = Path(name).name
    for ending in (".gz", ".jsonl", ".json"):
        stem = stem.removesuffix(ending)
    return stem


def _read(path: Path, label: str, problems: list[Problem]) -> Iterator[Question]:
    for number, row in rows_of(path, problems):
        try:
            yield from _questions(row, label, number)
        except (KeyError, TypeError, ValueError, AttributeError):
            what = (
                "not a question: question_id and turns (texts), or instruction (text) with what its file has beside it"
            )
            problems.append(Problem(what, f"{path}, row {number}"))


def _questions(row: dict[str, Any], label: str, number: int) -> Iterator[Question]:
    if "turns" in row:
        category = str(row.get("category") or "")
        stated = row.get("reference")
        told = [text for text in stated if isinstance(text, str)] if isinstance(stated, list) else []
        reference = tuple(takewhile(str.strip, told))  # MT-bench's own have none of a second turn here and there
        temperature = TEMPERATURES.get(category, OTHER)
        yield Question(
            f"{label}:{row['question_id']}", label, _texts(row["turns"]), "", category, temperature, reference
        )
        return
    [instruction] = _texts([row["instruction"]])
    if "instances" not in row:
        yield Question(f"{label}:{number}", label, (instruction,), category=str(row.get("dataset") or ""))
        return
    for place, instance in enumerate(row["instances"]):
        name = f"{label}:{row.get('id', number)}" + (f".{place}" if place else "")
        wanted = (instance["output"],) if instance.get("output") else ()
        given = str(instance.get("input") or "").strip()
        yield Question(name, label, (instruction,), given, str(row.get("motivation_app") or ""), 0.0, wanted)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one.strip() for one in value):
        raise ValueError("a list of texts is wanted")
    return tuple(value)
