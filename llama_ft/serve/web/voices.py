"""Who speaks on the page: one model, a run beside its base, or two models."""

from __future__ import annotations

from dataclasses import dataclass

from llama_ft.errors import UserError
from llama_ft.serve.source import Opened, find_run, open_base, open_source


@dataclass(frozen=True)
class Voice:
    """A model with the name that the page gives it."""

    name: str
    opened: Opened


def open_voices(source: str, other: str | None, *, compare: bool) -> list[Voice]:
    """One model; with `compare` a run's base and the run; with `other` these two, in the order named.

    Raises UserError as open_source does, and when a comparison is asked of something that is no run.
    """
    if other is not None:
        names = (source, other)
        if len({_short(name) for name in names}) == len(names):
            return [Voice(_short(name), open_source(name)) for name in names]
        return [Voice(f"{name} ({number})", open_source(name)) for number, name in enumerate(names, 1)]
    if not compare:
        return [Voice(_short(source), open_source(source))]
    run = find_run(source)
    if run is None:
        raise UserError(
            f"{source} is no run: there is no base to compare it with",
            hint=f"name the other model: llama-ft chat {source} OTHER --web",
        )
    tuned = open_source(source)
    return [
        Voice(f"base: {_short(run.recipe.model.base)}", open_base(run, tuned)),
        Voice(f"tuned: {_short(source)}", tuned),
    ]


def _short(source: str) -> str:
    """The last part of a path or hub id."""
    return source.rstrip("/").rpartition("/")[2] or source
