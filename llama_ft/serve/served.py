"""What is to be served: runs, model folders, GGUF files and bases, each under a name of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_ft.errors import Problem, UserError, did_you_mean
from llama_ft.export.trained import base_folder
from llama_ft.llama.base import locate_base
from llama_ft.llama.reward import is_reward_model
from llama_ft.recipe.run import Run
from llama_ft.serve.source import _is_path, _known, _scores_only, find_run
from llama_ft.tokenizer.load import load_tokenizer

_NO_WORDS = ("adapter_config.json", "config.json", "model.safetensors.index.json")


@dataclass(frozen=True)
class Served:
    """One name. What a run lacks is None; which of them is used is the engine's choice.

    `folder`: the whole model in Hugging Face's layout. `gguf`: a GGUF file. `run`: where it comes from, if from a run.
    `base_of`: it is what that run started from, for a comparison.
    """

    name: str
    folder: Path | None
    gguf: Path | None = None
    run: Run | None = None
    base_of: Run | None = None

    @property
    def words(self) -> Path:
        """Where tokenizer, template and generation_config lie."""
        if self.folder is not None:
            return self.folder
        assert self.run is not None
        return self.run.adapter

    @property
    def dtype(self) -> str:
        """What the weights are stored in."""
        if self.folder is None:
            return "float32"
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config.get("dtype") or config.get("torch_dtype") or "float32"


def find_served(sources: Sequence[str], *, compare: bool = False) -> list[Served]:
    """Resolves what the user named. With `compare` every run is followed by its base, as NAME-base.

    Raises UserError with every problem: no such thing, nothing trained yet, a reward model, a name given twice, a
    model that has no base to compare it with.
    """
    found: list[Served] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            served = _find(source)
            found.append(served)
            if compare:
                found.append(_base(served))
        except UserError as error:
            problems += error.problems
    names = [served.name for served in found]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(Problem(f"two models would be called '{name}'", hint="name one of them through a link to it"))
    if problems:
        raise UserError(problems)
    return found


def _find(source: str) -> Served:
    run = find_run(source)
    path = Path(os.path.abspath(Path(source).expanduser()))  # noqa: PTH100 (a link keeps the name that it was given)
    if run is not None:
        return _of_run(run, path.name)
    if path.name == "merged" and (path.parent / "recipe.yaml").is_file():
        return _of_run(Run.open(path.parent), path.parent.name)
    if path.suffix == ".gguf" and path.is_file():
        return Served(path.stem, None, gguf=path.resolve())
    if not path.exists() and _is_path(source) and source not in _known():
        raise UserError(f"there is no run and no model '{source}'", hint=did_you_mean(source, _known(), kind="sources"))
    if (path / "config.json").is_file() and is_reward_model(path):
        raise _scores_only(path)
    folder = locate_base(source)
    return Served(path.name if path.exists() else source, folder)


def _of_run(run: Run, name: str) -> Served:
    if run.recipe.training.objective == "reward":
        raise _scores_only(run.path)
    merged = run.merged if (run.merged / "config.json").is_file() else None
    files = sorted((run.path / "gguf").glob("*.gguf"), key=lambda file: file.stat().st_size)
    if merged is None and not files and not (run.adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"{run.path} holds no merged/ and no adapter/ to serve yet", hint="finish its training")
    return Served(name, merged, files[-1] if files else None, run)


def _base(served: Served) -> Served:
    """What a run started from. Its own template is used; where it has none, the run's (see `staged`)."""
    if served.run is None:
        raise UserError(f"{served.name} is no run: there is no base to compare it with", hint="leave out --compare")
    folder = base_folder(served.run)
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{served.run.path} was trained from new weights: there is no base to compare it with")
    return Served(f"{served.name}-base", folder, base_of=served.run)


def staged(served: Served, place: Path) -> Path:
    """A folder `place` through which an engine opens the model: a link, or links to a base with its run's words.

    A base without a chat template cannot be asked the same questions; it then gets the tokenizer, template and
    generation_config that the run was trained with. UserError where the run has tokens that the base has not.
    """
    assert served.folder is not None
    run = served.base_of
    if run is None or load_tokenizer(served.folder).chat_template:
        place.symlink_to(served.folder, target_is_directory=True)
        return place
    words = run.merged if (run.merged / "config.json").is_file() else run.adapter
    config = json.loads((served.folder / "config.json").read_text(encoding="utf-8"))
    if len(load_tokenizer(words)) > config["vocab_size"]:
        what = f"the base of {run.path} has no chat template, and the run's has tokens that the base does not know"
        raise UserError(what, hint="leave out --compare")
    place.mkdir()
    for file in served.folder.glob("*.safetensors*"):
        (place / file.name).symlink_to(file)
    (place / "config.json").symlink_to(served.folder / "config.json")
    for file in words.iterdir():
        wanted = file.suffix in (".json", ".jinja", ".model") and file.name not in _NO_WORDS
        if wanted and not (place / file.name).exists():
            (place / file.name).symlink_to(file)
    return place
