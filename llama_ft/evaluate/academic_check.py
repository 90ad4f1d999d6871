"""What stands in the way of tasks, found before a model is loaded: unknown names, data that is missing, other columns.

A task with rows of a file is made once here as the harness makes it, and its reading of answers tried on an empty one:
a column that is not there would else be found after all answers are drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetsError
from jinja2 import TemplateError, UndefinedError, meta

from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.evaluate.academic_tasks import ROWS, Item, config, manager, opened, problems_of_examples

FAULTS = (LookupError, ValueError, OSError, ImportError, TemplateError, DatasetsError)
"""What the harness raises for tasks that it cannot make, or rows that are none of a task's."""
PUNKT = "punkt_tab"
"""Data of nltk that tasks load when they are imported (IFEval counts sentences with it)."""


def check(item: Item) -> list[Problem]:
    """What keeps a task from being asked."""
    if item.yaml is not None:
        return _data(item)  # what else is wrong with a file is told when it is made
    found = manager(item)
    if item.id not in found.task_index:
        hint = did_you_mean(item.id, found.all_tasks, kind="tasks")
        return [Problem(f"lm-evaluation-harness has no task '{item.id}'", key="--tasks", hint=hint)]
    lacking = _data(item)
    if lacking or item.rows is None:
        return lacking
    try:
        cfg, _ = config(item)
        return problems_of_examples(item, cfg) or _columns(item, cfg) or _tried(item)
    except UserError as error:
        return error.problems
    except (*FAULTS, TypeError, AssertionError) as error:  # no code of ours is in here
        return [refused(item, error)]


def refused(item: Item, error: BaseException) -> Problem:
    """What the harness could not do, in one line."""
    if isinstance(error, ImportError):
        hint = "install what it names; IFEval's packages come with pip install 'llama-ft[eval]'"
    elif item.yaml is not None:
        hint = "its file must be named as the task in it"
    elif item.rows is None:
        hint = f"see `lm_eval ls tasks`; rows come from the hub, or from a file: --tasks {item.id}=ROWS.jsonl"
    else:
        hint = "its rows must be those of the task's own data set"
    return Problem(f"the task '{item.place}' cannot be run: {_said(error)}", key="--tasks", hint=hint)


def _said(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _data(item: Item) -> list[Problem]:
    """Data of nltk that a task would fetch, and fail without when all answers are drawn."""
    folders = set(_folders(manager(item), item.id))
    wanted = any(PUNKT in file.read_text(encoding="utf-8") for folder in folders for file in folder.glob("*.py"))
    if not wanted:
        return []
    try:
        import nltk

        nltk.data.find(f"tokenizers/{PUNKT}")
    except ImportError:
        hint = "pip install 'llama-ft[eval]'"
        return [Problem(f"the task '{item.id}' needs the package nltk", key="--tasks", hint=hint)]
    except LookupError:
        hint = f"python -m nltk.downloader {PUNKT}; elsewhere than in ~/nltk_data: set NLTK_DATA to the folder"
        return [Problem(f"the task '{item.id}' needs nltk's data {PUNKT}, which is not here", key="--tasks", hint=hint)]
    return []


def _folders(found: Any, name: str) -> Iterator[Path]:
    """Where the Python files of a task lie, or of all tasks of a group or tag."""
    entry = found.task_index.get(name)
    if entry is None:
        return
    cfg = entry.cfg or {}
    if name not in found.all_subtasks:
        members = cfg.get("task") if name in found.all_groups else sorted(entry.tags)
        for member in members if isinstance(members, list) else []:
            yield from _folders(
                found, member if isinstance(member, str) else str(member.get("task") or member.get("group"))
            )
        return
    if entry.yaml_path is not None:
        yield entry.yaml_path.parent
    reads = cfg.get("process_results")  # FOLDER/MODULE.FUNCTION: of an included task, elsewhere
    if isinstance(reads, str):
        yield Path(reads).parent


def _columns(item: Item, cfg: dict[str, Any]) -> list[Problem]:
    """Columns that the task's prompts name and the files lack. A task that makes its own columns is not looked at."""
    needed: set[str] = set() if cfg.get("process_docs") else _named(cfg)
    problems = []
    for path in (item.rows, item.examples):
        if path is not None:
            have = _header(path)
            lacking = sorted(name for name in needed if name not in have)
            if not have:
                problems.append(Problem(f"{path} holds no rows", key="--tasks"))
            elif lacking:
                what = f"{path} lacks columns of the task '{item.id}': {', '.join(lacking)}"
                problems.append(Problem(what, key="--tasks", hint=f"it has {', '.join(have)}"))
    return problems


def _header(path: Path) -> list[str]:
    """The columns of a file of rows; none if it holds no rows. UserError for one that cannot be read."""
    from datasets import load_dataset

    try:
        rows = load_dataset(ROWS[path.suffix], data_files=str(path), split="train")
    except StopIteration:  # what an empty file of JSON gives
        return []
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as rows: {_said(error.__cause__ or error)}", key="--tasks") from error
    return list(rows.column_names) if len(rows) else []


def _named(cfg: dict[str, Any]) -> set[str]:
    """Columns in the templates of a task's prompt and answer. A bare name is a column's, too: without it, the harness
    would ask the name itself. Those of a template that minds what is not there are left out."""
    from lm_eval.utils import env

    found: set[str] = set()
    for text in (cfg.get("doc_to_text"), cfg.get("doc_to_target"), cfg.get("doc_to_choice")):
        if not isinstance(text, str) or " is defined" in text or "default(" in text:
            continue
        if "{" in text:
            found |= meta.find_undeclared_variables(env.parse(text)) - set(env.globals)
        elif text.isidentifier():
            found.add(text)
    return found


def _tried(item: Item) -> list[Problem]:
    """What making the task and reading an empty answer trips over."""
    with opened(item) as own:
        try:
            task = own.load([item.id])["tasks"][item.id]
            if task.OUTPUT_TYPE == "generate_until" and callable(task.config.process_results):
                task.process_results(next(iter(task.eval_docs)), [""])
        except (KeyError, UndefinedError) as error:
            what = f"{item.rows} lacks what the task '{item.id}' looks for in a row: {error}"
            return [Problem(what, key="--tasks", hint="its rows must have the columns of the task's own data set")]
    return []
