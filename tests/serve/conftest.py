"""A finished, exported tiny run to talk to."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.export.run import export_run
from llama_ft.recipe.run import Run
from tests.tiny_run import make_base, make_run


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Prepared data and chat history of these tests stay out of the user's cache."""
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def finished(base: Path, folder: Path, cache: Path, **overrides) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_FT_CACHE", str(cache))
        run, _, _ = make_run(folder, base, **overrides)
        export_run(run)
    return run


@pytest.fixture(scope="session")
def run(base, tmp_path_factory) -> Run:
    """ChatML, float32."""
    return finished(base, tmp_path_factory.mktemp("chatml"), tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def alpaca_run(base, tmp_path_factory) -> Run:
    """The single-turn template."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return finished(base, tmp_path_factory.mktemp("alpaca"), cache, template="alpaca")
