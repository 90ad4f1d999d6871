"""Runs and models to measure."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.evaluate.opening import open_subjects
from llama_ft.evaluate.subject import Subject
from llama_ft.evaluate.suites import Context
from llama_ft.export.run import export_run
from llama_ft.recipe.run import Run
from tests.tiny_run import make_run


@pytest.fixture(scope="session")
def tiny_run(tiny_base, tmp_path_factory) -> Run:
    """A tiny run that was trained a little, with merged/; 8 held-out conversations."""
    run, _, _ = make_run(tmp_path_factory.mktemp("run"), tiny_base)
    export_run(run)
    return run


@pytest.fixture(scope="session")
def subjects(tiny_run) -> dict[str, Subject]:
    """Its base, what was trained, and its export."""
    prepared = Context(tiny_run.path / "eval", tiny_run).prepared
    assert prepared is not None
    return {one.name: one for one in open_subjects(tiny_run, ("base", "tuned", "merged"), prepared)}


@pytest.fixture
def context(tiny_run, tmp_path: Path) -> Context:
    """A call that writes elsewhere than into the shared run."""
    return Context(tmp_path / "eval", tiny_run)
