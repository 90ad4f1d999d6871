"""Documents and tokens of rows that are not here: from the cards' rows and mean tokens, and from a file's first rows.

Estimated figures are marked so wherever they are shown. What the rows would lose (too long, empty, copies) is not known
and not taken off, so they lie high rather than low.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

from llama_ft.data.cards import Files, Python, load_card
from llama_ft.data.files import count_rows, find_files, read_rows
from llama_ft.data.mixture import plan_counts
from llama_ft.data.problems import Problems
from llama_ft.data.template import Template
from llama_ft.errors import UserError
from llama_ft.plan.data import DataFacts
from llama_ft.plan.shape import vocabulary_of
from llama_ft.recipe.objectives import PAIRS
from llama_ft.recipe.schema import Data, Holdout, Recipe

CHARACTERS = 4.2
"""Characters of English per token: Llama 2's tokenizer on the instructions and answers of 5,000 Alpaca rows."""
FIRST_ROWS = 200
SPREAD = 2.0
"""Σℓ²/Σℓ over the mean: what documents of exponentially distributed lengths have; Alpaca's have 1.6."""
_CONTROL = re.compile(r"<\|[^|<>]*\|>|</?s>")
_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@dataclass(frozen=True)
class _Rows:
    """Rows of one source and their mean tokens, None where nothing says it."""

    rows: int | None
    prompt: float | None
    answer: float | None


def estimated(recipe: Recipe, why: str) -> DataFacts:
    """The facts of one epoch by estimate; `why` says what is missing to count them."""
    found = [_source(entry) for entry in recipe.data if entry.weight]
    notes = []
    longest = recipe.sequence.max_length
    around = template_tokens(recipe.template)
    rows = [one.rows for one in found]
    documents = sum(count for count in rows if count is not None) if all(rows) else None
    if documents is None:
        notes.append("the cards do not say how many rows there are")
    used = [entry for entry in recipe.data if entry.weight]
    passes = [float(entry.epochs) if entry.epochs is not None else None for entry in used]
    weights = [float(entry.weight) for entry in used]
    drawn = plan_counts([one.rows or 1 for one in found], weights, passes, float(recipe.mixture.temperature))
    documents = sum(drawn) if documents is not None else None
    prompt = answer = 0.0
    for one, taken in zip(found, drawn, strict=True):
        share = taken / sum(drawn)
        if one.prompt is None or one.answer is None:
            prompt, answer = prompt + share * longest / 2, answer + share * longest / 2
        else:
            whole = one.prompt + one.answer + around
            kept = min(1.0, longest / whole) if recipe.sequence.overlong != "split" else 1.0
            prompt, answer = prompt + share * kept * (one.prompt + around), answer + share * kept * one.answer
    if any(one.prompt is None for one in found):
        notes.append(
            f"where a card has no mean, every document counts as {longest:,} tokens, the longest: an upper bound"
        )
    mean = prompt + answer
    if recipe.sequence.overlong == "split" and mean > longest / 2 and documents is not None:
        parts = max(1.0, mean / (0.75 * longest))  # cut at turn borders, parts are three quarters full
        documents, prompt, answer, mean = round(documents * parts), prompt / parts, answer / parts, mean / parts
    pairs = _are_pairs(recipe)
    if pairs:
        answer *= 2
        mean = prompt + answer
        notes.append("a pair counts its prompt once and both its answers")
    if isinstance(recipe.eval_data, Holdout) and documents is not None:
        held = max(1, round(float(recipe.eval_data.holdout) * documents))
        documents -= held
    else:
        held = sum(_source(entry).rows or 0 for entry in recipe.eval_data or [] if isinstance(entry, Data))
    labelled = mean if recipe.sequence.train_on == "all" or recipe.training.objective == "pretrain" else answer
    squares = mean * min(SPREAD * mean, max(mean, float(longest)))
    if recipe.mixture.streaming and recipe.training.objective == "pretrain":
        mean, labelled, squares = float(longest), float(longest), float(longest) ** 2
    return DataFacts(
        exact=False,
        source=f"estimated: {why}",
        documents=documents,
        mean_tokens=mean,
        mean_labelled=labelled,
        mean_squares=squares,
        vocabulary=vocabulary_of(recipe.model.tokenizer or recipe.model.base, recipe.model.revision)
        if recipe.model.tokenizer
        else None,
        evaluated=(held * mean, held * labelled, held * squares) if held else None,
        eval_documents=held,
        notes=tuple(notes),
        pairs=pairs,
    )


def _are_pairs(recipe: Recipe) -> bool:
    """Whether the rows are pairs, by their layout; by the objective where a layout is only guessed later."""
    used = [entry for entry in recipe.data if entry.weight]
    layouts = {entry.layout or (load_card(entry.use).layout if entry.use is not None else None) for entry in used}
    return layouts == {"preference"} or (layouts == {None} and recipe.training.objective in PAIRS)


def _source(entry: Data) -> _Rows:
    card = load_card(entry.use) if entry.use is not None else None
    if entry.path is not None:
        found = _of_files(str(entry.path), entry.unit)
    elif card is not None and isinstance(card.source, Files):
        found = _of_files(str(card.file(entry.split)), entry.unit)
    elif card is not None and isinstance(card.source, Python):
        from llama_ft.data.python_code import open_python

        found = _of_rows(value for _, value in open_python(card.source.python, entry.split).rows(Problems()))
    else:
        assert card is not None
        tokens = card.tokens
        rows = (card.rows or {}).get(entry.split)
        found = _Rows(rows, tokens.prompt if tokens else None, tokens.answer if tokens else None)
    if entry.limit is not None:
        found = _Rows(min(entry.limit, found.rows or entry.limit), found.prompt, found.answer)
    return found


def _of_files(path: str, unit: str) -> _Rows:
    """Rows of local files, and the mean of the first of them; half of a row's characters count as its answer."""
    found = find_files(path)
    problems = Problems()
    first: list[Any] = []
    with suppress(StopIteration):
        reader = read_rows(found.files[0], problems, unit=unit, name=found.label, may_be_empty=True)
        first = [value for _, value in islice(reader, FIRST_ROWS)]
        reader.close()
    measured = _of_rows(iter(first))
    return _Rows(sum(count_rows(file, unit) for file in found.files), measured.prompt, measured.answer)


def _of_rows(values: Any) -> _Rows:
    rows, characters = 0, 0
    for value in values:
        rows, characters = rows + 1, characters + _characters(value)
    half = characters / max(1, rows) / CHARACTERS / 2
    return _Rows(rows, half, half)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(_characters(part) for part in value.values())
    return sum(_characters(part) for part in value) if isinstance(value, list) else 0


def template_tokens(name: str) -> float:
    """Tokens that a template writes around one question and its answer; control tokens count as one each."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        source = _TAGS.sub("", Template.load(name).source)
        template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        text = template.render(messages=turns, bos_token="<s>", eos_token="</s>", add_generation_prompt=False)
    except Exception as error:  # a template may refuse an empty turn, or be the base's own, which is not here
        if isinstance(error, UserError) and name != "base":
            raise
        return 10.0
    control = _CONTROL.findall(text)
    return len(control) + len(_CONTROL.sub("", text)) / CHARACTERS
