"""A run folder: where everything that one training writes lies, and how another command finds it again."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llama_ft.errors import UserError, did_you_mean
from llama_ft.recipe.schema import Recipe


@dataclass(frozen=True)
class Run:
    """`runs/<name>/`. Properties name its parts; only `recipe` and `lock` read anything."""

    path: Path

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Run:
        """The run in an existing folder, or `runs/NAME` for a bare name. UserError if there is none."""
        for candidate in (Path(path), Path("runs", path)):
            if (candidate / "recipe.yaml").is_file():
                return cls(candidate.resolve())
        parent = Path(path).parent if Path(path).parent.is_dir() and Path(path).parent != Path() else Path("runs")
        others = sorted(str(found.parent) for found in parent.glob("*/recipe.yaml"))
        raise UserError(
            f"{path} is not a run: it has no recipe.yaml",
            hint=did_you_mean(str(path), others, kind="runs") if others else "train one: llama-ft train RECIPE",
        )

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def lock_file(self) -> Path:
        """Hashes, versions, seed and what `auto` became."""
        return self.path / "run.lock.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def base(self) -> Path:
        """The base of a run that started from new weights; other runs have none."""
        return self.path / "base"

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-N/`, each complete or absent."""
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter in PEFT's layout."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """The merged model in Hugging Face's layout."""
        return self.path / "merged"

    @property
    def proof_file(self) -> Path:
        """What `export` measured."""
        return self.path / "export.json"

    @property
    def samples_file(self) -> Path:
        """Answers to held-out questions before and after training."""
        return self.path / "eval" / "samples.json"

    @property
    def card_file(self) -> Path:
        """The model card."""
        return self.path / "README.md"

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe that the run was started with."""
        from llama_ft.recipe import load_recipe

        # The files it names may have moved since; the run no longer needs all of them.
        return load_recipe(str(self.recipe_file), look_up=False)

    @cached_property
    def lock(self) -> dict[str, Any]:
        """The contents of run.lock.json; UserError if it is missing or damaged."""
        try:
            return json.loads(self.lock_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.lock_file} cannot be read: {error}", hint="train again with --overwrite") from error

    def steps(self) -> list[int]:
        """Steps with a whole checkpoint, ascending."""
        found = (entry.name.removeprefix("step-") for entry in self.checkpoints.glob("step-*"))
        return sorted(int(step) for step in found if step.isdigit())

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint."""
        return self.checkpoints / f"step-{step}"
