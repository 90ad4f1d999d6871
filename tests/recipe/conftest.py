"""A recipe in an otherwise empty working directory, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe

GOOD = "name: x\nmodel: {base: smollm2-135m}\ndata: [{use: llama-qa}]\ntemplate: chatml\n"
"""The shortest useful recipe; cases add lines from line 5 on."""

ONLINE = ("grpo", "rloo", "rejection_sampling")
REWARD = "rewards: [{function: exact_match}]\n"

Report = Callable[..., list[str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def report(here: Path) -> Report:
    """Writes r.yaml and returns every problem as the user reads it, [] for a valid recipe."""

    def problems(text: str | bytes, overrides: Iterable[str] = ()) -> list[str]:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            load_recipe("r.yaml", overrides)
        except UserError as error:
            assert error.exit_code == 2
            return [str(problem) for problem in error.problems]
        return []

    return problems


def recipe(objective: str, *lines: str, rewards: bool | None = None) -> str:
    """GOOD with an objective, what it needs, and more lines from line 6 on."""
    with_rewards = objective in ONLINE if rewards is None else rewards
    return (
        GOOD
        + f"training: {{objective: {objective}}}\n"
        + "".join(f"{line}\n" for line in lines)
        + REWARD * with_rewards
    )
