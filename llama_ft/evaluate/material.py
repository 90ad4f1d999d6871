"""What a model is measured on: a run's held-out documents, documents of a file or a card, and multiple choice."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llama_ft.data.cards import load_card
from llama_ft.data.documents import DocumentMaker, read_documents
from llama_ft.data.examples import Conversation
from llama_ft.data.problems import Problems
from llama_ft.data.render import MASKED, Renderer
from llama_ft.data.sources import Source, open_sources
from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.evaluate.code_tasks import open_text
from llama_ft.recipe.schema import Data
from llama_ft.recipe.schema import Sequence as Limits

if TYPE_CHECKING:
    from llama_ft.data.prepare import Prepared
    from llama_ft.evaluate.subject import Subject
    from llama_ft.evaluate.suites import Context

CHOICE_KEYS = ("query", "choices", "gold")
"""Keys of a row of multiple choice, as llm-foundry writes them; `gold` is the 0-based number of the right one."""
KINDS = (
    ("choices", set(CHOICE_KEYS)),
    ("code", {"task_id", "prompt", "entry_point", "canonical_solution", "test"}),
    ("code", {"task_id", "code", "test_list"}),
    ("questions", {"question_id", "turns"}),
    ("questions", {"instruction", "instances"}),
    ("questions", {"instruction", "generator"}),
    ("references", {"question_id", "choices"}),
)
"""Files that are no documents, by keys of their rows."""
ROW = 2**20
"""Letters that the first row of a JSON list is looked for in."""
HELD_OUT_SPLITS = ("heldout", "test", "validation", "eval")
"""Splits of a card that are taken where none is named, the first of these that it has."""
T = TypeVar("T")


@dataclass(frozen=True)
class Held:
    """A held-out document. ids and labels [tokens], −100 = not scored; turns: its conversation, of text empty."""

    id: str
    source: str
    ids: Sequence[int]
    labels: Sequence[int]
    turns: Conversation
    text: str = ""

    @property
    def asked(self) -> str:
        """What its users ask; of text all of it. A training row that holds it has been asked the same."""
        if not self.turns:
            return self.text
        parts = [part for turn in self.turns if turn["role"] == "user" for part in (turn["content"], turn.get("input"))]
        return "\n\n".join(part for part in parts if part)


@dataclass(frozen=True)
class Choice:
    """A question with its possible answers, of which number `gold` is right."""

    id: str
    query: str
    choices: tuple[str, ...]
    gold: int


def kind_of(name: str) -> str:
    """What `--data` names, by the keys of a file's first row: `choices` (multiple choice), `code` (HumanEval, MBPP),
    `questions` (of chat benchmarks), `references` (answers to them); else `documents`, as a card does."""
    keys = set(_first_row(name)) if Path(name).is_file() else set()
    return next((kind for kind, own in KINDS if own <= keys), "documents")


def holds_choices(name: str) -> bool:
    """Whether a `--data` file holds multiple choice."""
    return kind_of(name) == "choices"


def holds_documents(name: str) -> bool:
    """Whether `--data` names documents: a card, or a file that is nothing else."""
    return kind_of(name) == "documents"


@cache
def _first_row(name: str) -> tuple[str, ...]:
    """Keys of the first row of JSON lines or of a JSON list; none for another file."""
    import gzip

    try:
        with (
            gzip.open(name, "rt", encoding="utf-8")
            if name.endswith(".gz")
            else Path(name).open(encoding="utf-8") as file
        ):
            head = file.readline()
            if head.lstrip().startswith("["):
                head = (head + file.read(ROW)).lstrip()[1:].lstrip()
        row, _ = json.JSONDecoder().raw_decode(head.lstrip())
    except (OSError, ValueError, EOFError):
        return ()
    return tuple(map(str, row)) if isinstance(row, dict) else ()


def data_problems(context: Context) -> list[Problem]:
    """What is wrong with the names that `--data` gave."""
    problems = []
    for name in context.data:
        if not Path(name).exists():
            try:
                data_entry(name, context.layout)
            except UserError as error:
                problems += [replace(one, key="--data", what=_no_file(name, one.what)) for one in error.problems]
    return problems


def _no_file(name: str, what: str) -> str:
    return what if "split" in what else f"there is no file and no card '{name}'"


def data_entry(name: str, layout: str | None) -> Data:
    """A recipe's entry of what `--data` names: a file, CARD or CARD:SPLIT. UserError where there is no such thing."""
    if Path(name).exists():
        return Data.model_validate({"path": name, "layout": layout})
    if "/" in name or Path(name).suffix:
        raise UserError(f"there is no file '{name}'", key="--data", hint="name a file of rows, CARD or CARD:SPLIT")
    card, _, split = name.partition(":")
    splits = load_card(card, key="--data").splits
    chosen = split or next((one for one in HELD_OUT_SPLITS if one in splits), splits[0])
    if chosen not in splits:
        raise UserError(f"the card '{card}' has no split '{chosen}'", hint=did_you_mean(chosen, splits, kind="splits"))
    return Data(use=card, split=chosen)


def held_out(subject: Subject, context: Context) -> list[Held]:
    """The documents to measure on: those that `--data` names, else the run's own held-out ones, as training saw them.

    Of each data set at most `context.limit`, drawn by the seed and in the order of their rows. UserError where nothing
    is held out, or nothing of a file can be rendered.
    """
    named = [name for name in context.data if holds_documents(name)]
    if named:
        found = _named(named, subject, context)
    else:
        found = _of_run(context.prepared) if context.prepared is not None else []
    if not found:
        raise UserError("there are no held-out documents to measure on", hint="name some: --data FILE or --data CARD")
    return [one for group in _by_source(found) for one in drawn(group, context.limit, context.seed)]


def _by_source(documents: Sequence[Held]) -> list[list[Held]]:
    groups: dict[str, list[Held]] = {}
    for one in documents:
        groups.setdefault(one.source, []).append(one)
    return list(groups.values())


def drawn(items: Sequence[T], limit: int | None, seed: int) -> list[T]:
    """At most `limit` items, drawn by a seed, in their own order."""
    if limit is None or limit >= len(items):
        return list(items)
    places = sorted(random.Random(seed).sample(range(len(items)), limit))
    return [items[place] for place in places]


def _of_run(prepared: Prepared) -> list[Held]:
    if prepared.eval is None:
        return []
    job = prepared.job
    sources = job.evaluation if isinstance(job.evaluation, list) else job.train
    labels = labels_of(sources)
    rows = zip(prepared.eval.with_format("numpy"), prepared.eval_conversations, strict=True)
    found = []
    for row, turns in rows:
        if not row.get("desirable", True):  # an answer that was judged bad is not one to be likely
            continue
        place = int(row["source"])  # among the held-out sources, or those that a share was held out of
        name = f"{labels[place]}:{int(row['row'])}" + (f".{int(row['part'])}" if row["part"] else "")
        text = "" if turns else str(prepared.tokenizer.decode(row["input_ids"].tolist(), skip_special_tokens=True))
        found.append(Held(name, labels[place], row["input_ids"].tolist(), row["labels"].tolist(), turns, text))
    return found


def labels_of(sources: Sequence[Source]) -> list[str]:
    """A short name for each source, numbered where two have the same."""
    return numbered([Path(source.label).name or source.label for source in sources])


def numbered(names: Sequence[str]) -> list[str]:
    """The names; of those that come again each with its number behind it."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[: place + 1].count(name)})"
        for place, name in enumerate(names)
    ]


def _named(names: Sequence[str], subject: Subject, context: Context) -> list[Held]:
    sources = open_sources([data_entry(name, context.layout) for name in names], "--data")
    # As the run's own rows: with its system prompt, and of a pair the better answer.
    systems = [None if source.layout == "text" else subject.system for source in sources]
    sources = [replace(one, alone=True, system=system) for one, system in zip(sources, systems, strict=True)]
    prepared = context.prepared
    alone = Limits(max_length=subject.context, overlong="drop")
    limits = prepared.job.sequence if prepared is not None else alone
    maker = DocumentMaker(Renderer(subject.renderer.template, subject.tokenizer), limits)
    found: list[Held] = []
    for source, label in zip(sources, labels_of(sources), strict=True):
        problems = Problems()
        refused = ""
        before = len(found)
        for one in read_documents(source, maker, problems):
            refused = refused or one.refusal or one.dropped or ""
            if one.dropped is None:
                name = f"{label}:{one.row}" + (f".{one.part}" if one.part else "")
                turns = one.conversation if one.example.text is None else []
                found.append(Held(name, label, one.ids.tolist(), one.labels.tolist(), turns, one.text))
        problems.raise_if_any()
        if len(found) == before:
            hint = "name a template: --template NAME" if "no chat template" in refused else None
            raise UserError(f"no document of {source.label} can be measured on: {refused or 'no rows'}", hint=hint)
    return found


def choices(context: Context) -> list[Choice]:
    """The rows of all `--data` files of multiple choice, at most `context.limit` of each. UserError naming bad rows."""
    found = []
    problems: list[Problem] = []
    names = [name for name in context.data if holds_choices(name)]
    for name, label in zip(names, numbered([Path(name).stem for name in names]), strict=True):
        found += drawn(_read_choices(Path(name), label, problems), context.limit, context.seed)
    if problems:
        raise UserError(problems[:10])
    return found


def _read_choices(path: Path, label: str, problems: list[Problem]) -> list[Choice]:
    found: list[Choice] = []
    try:
        with open_text(str(path)) as file:  # its lines, not those that signs within a text would make
            lines = list(file)
    except (OSError, EOFError, ValueError) as error:
        problems.append(Problem(f"it cannot be read: {error}", str(path)))
        return found
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            one = Choice(f"{label}:{number}", row["query"], tuple(row["choices"]), int(row["gold"]))
            texts = isinstance(row["choices"], list) and all(
                isinstance(said, str) for said in [one.query, *one.choices]
            )
            if not texts or not 0 <= one.gold < len(one.choices):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            what = "not a row of multiple choice: query (text), choices (texts) and gold (number of the right one)"
            problems.append(Problem(what, f"{path}, row {number}"))
            continue
        found.append(one)
    return found


def labelled_bytes(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> int:
    """UTF-8 bytes of what the scored tokens of a document say; control tokens say nothing."""
    own = [int(token) for token, label in zip(ids[1:], labels[1:], strict=True) if label != MASKED]
    return len(str(tokenizer.decode(own, skip_special_tokens=True)).encode())
