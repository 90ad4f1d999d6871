"""What `--tasks` names: tasks of lm-evaluation-harness, YAML files of its format, or its tasks with rows of a file.

NAME=FILE is the harness's own task NAME with the rows of FILE as its test split: the task that a YAML file with
`include:` and another `dataset_path` would make, which is what the harness is given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llama_ft.errors import Problem, UserError
from llama_ft.evaluate.suites import stamp

ROWS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Files of rows, and how the library `datasets` calls their format."""


@dataclass(frozen=True)
class Item:
    """A task. `id`: its name; `place`: what was given: NAME, FILE.yaml, NAME=ROWS or NAME=ROWS+EXAMPLES."""

    id: str
    place: str
    rows: Path | None = None
    examples: Path | None = None

    @property
    def yaml(self) -> Path | None:
        """The file that describes the task."""
        path = Path(self.place).expanduser()
        return path if self.rows is None and path.suffix in (".yaml", ".yml") else None

    def given(self) -> list[Path]:
        """The files that were named."""
        return [path for path in (self.yaml, self.rows, self.examples) if path is not None]


def parse(place: str) -> Item:
    """One entry of `--tasks`. A file may hold a `+` in its name."""
    path = Path(place)
    if path.suffix in (".yaml", ".yml"):
        return Item(path.stem, place)
    name, equals, files = place.partition("=")
    if not equals:
        return Item(place, place)
    rows, plus, examples = files.rpartition("+")
    if not plus or Path(files).expanduser().is_file():
        rows, examples = files, ""
    return Item(name, place, Path(rows).expanduser(), Path(examples).expanduser() if examples else None)


def problems_of_files(items: Sequence[Item]) -> list[Problem]:
    """Files that are not there or hold no rows, and tasks that are named twice."""
    names = [item.id for item in items]
    found = [Problem(f"the task '{name}' is named twice", key="--tasks") for name in _twice(names)]
    for item in items:
        for path in item.given():
            if not path.is_file():
                found.append(Problem(f"there is no file '{path}'", key="--tasks"))
            elif path != item.yaml and path.suffix not in ROWS:
                hint = f"rows are in files that end in {', '.join(ROWS)}"
                found.append(Problem(f"'{path}' is of no format that is read here", key="--tasks", hint=hint))
        if item.rows is not None and item.examples is not None and item.rows.suffix != item.examples.suffix:
            what = f"{item.rows} and {item.examples} are of different formats"
            found.append(Problem(what, key="--tasks", hint="write both in one"))
    return found


def _twice(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def stamps(item: Item) -> dict[str, str]:
    """Size and time of the files that a task is made of: those named, and the local ones that a YAML file names."""
    paths = list(item.given())
    if item.yaml is not None:
        entry = manager(item).task_index.get(item.id)
        named: Any = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files") if entry is not None else None
        parts = list(named.values()) if isinstance(named, dict) else [named]
        flat = [one for part in parts for one in (part if isinstance(part, list) else [part])]
        paths += [Path(one) for one in flat if isinstance(one, str) and Path(one).is_file()]
    return {str(path): stamp(path) for path in paths}


def manager(item: Item) -> Any:
    """The harness's TaskManager that knows a task. A YAML file brings itself and what lies beside it."""
    from lm_eval import tasks

    if item.yaml is not None:
        return tasks.TaskManager(include_path=str(item.yaml.resolve().parent), include_defaults=False)
    # The harness's own tasks are 15,000 files to read; those of a folder of the task's name are few.
    folder = Path(tasks.__file__).parent / item.id
    if item.id and folder.is_dir():
        own = _index(folder)
        if item.id in own.all_subtasks:
            return own
    return _index(None)


@cache
def _index(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager() if folder is None else TaskManager(include_path=str(folder), include_defaults=False)


@contextmanager
def opened(item: Item) -> Iterator[Any]:
    """A TaskManager that makes the task under its name. UserError where rows cannot be given to it."""
    if item.rows is None:
        yield manager(item)
        return
    from lm_eval.tasks import TaskManager

    cfg, place = config(item)
    with TemporaryDirectory() as folder:
        text = json.dumps({"include": str(place), **_overrides(item, cfg)})  # JSON is YAML
        (Path(folder) / "task.yaml").write_text(text, encoding="utf-8")
        yield TaskManager(include_path=folder, include_defaults=False)


def config(item: Item) -> tuple[dict[str, Any], Path]:
    """What the harness's file says of a task, functions unread, and that file. UserError for groups of tasks and for
    those that are written in Python."""
    found = manager(item)
    entry = found.task_index[item.id]
    cfg = dict(entry.cfg or {})
    if item.id not in found.all_subtasks or "class" in cfg or entry.yaml_path is None:
        what = f"'{item.id}' is a group of tasks, or written in Python: rows of a file cannot be given to it"
        raise UserError(what, key="--tasks", hint="name one of its tasks, or leave the file out")
    return cfg, entry.yaml_path


def _overrides(item: Item, cfg: dict[str, Any]) -> dict[str, Any]:
    """Where the rows are, for a task that had them elsewhere; see :func:`problems_of_examples` for what is allowed."""
    test, shots, _ = splits(cfg)
    assert item.rows is not None
    files = {test: str(item.rows.resolve())}
    if item.examples is not None:
        files[shots] = str(item.examples.resolve())
    return {
        "task": item.id,
        "custom_dataset": None,
        "dataset_path": ROWS[item.rows.suffix],
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
        "validation_split": None,
        "test_split": test,
        "fewshot_split": shots if shots in files else None,
    }


def splits(cfg: dict[str, Any]) -> tuple[str, str, int]:
    """(the split that is asked, the one that examples are drawn from, how many examples a prompt has).

    The rules are TaskConfig's and Task.fewshot_docs's. No examples are needed (0) where the task brings its own.
    """
    test = cfg.get("test_split") or cfg.get("validation_split") or "test"
    own = cfg.get("fewshot_config")
    own = own if isinstance(own, dict) else {}
    if own.get("samples") and not own.get("split"):
        return test, test, 0
    shots = own.get("split") or cfg.get("fewshot_split") or cfg.get("training_split") or cfg.get("validation_split")
    return test, shots or test, int(cfg.get("num_fewshot") or 0)


def problems_of_examples(item: Item, cfg: dict[str, Any]) -> list[Problem]:
    """A file of examples that is missing, or that nobody would look at."""
    test, shots, count = splits(cfg)
    split = (cfg.get("fewshot_config") or {}).get("split") if isinstance(cfg.get("fewshot_config"), dict) else None
    needed = shots != test and (count > 0 or split is not None)
    if needed and item.examples is None:
        what = (
            f"the task '{item.id}' puts {count} examples of its split '{shots}' into prompts, which {item.rows} lacks"
        )
        return [Problem(what, key="--tasks", hint=f"name a file of them too: {item.place}+EXAMPLES")]
    if not needed and item.examples is not None:
        what = f"the task '{item.id}' takes no examples from a file"
        return [Problem(what, key="--tasks", hint=f"leave out +{item.examples}")]
    return []
