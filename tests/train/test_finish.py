"""The end of a run whose engine cuts weights: what the main process asks the model that it puts together."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llama_ft.data.prepare import Prepared
from llama_ft.recipe.run import Run
from llama_ft.train import finish
from llama_ft.train.samples import Samples

ANSWERED = {"question": "1 + 1?", "reference": "2", "before": "3"}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs whole_model for a run that was resumed from a step, and returns at which moments its model was asked."""
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    prepared = SimpleNamespace(eval=[1], eval_conversations=[turns], train=[])
    run = Run(tmp_path / "run")
    run.samples_file.parent.mkdir(parents=True)
    moments: list[Any] = []
    monkeypatch.setattr(Samples, "answer", lambda self, model, when: moments.append(when))
    monkeypatch.setattr(finish, "document_losses", lambda *_: [])
    monkeypatch.setattr(finish, "losses_of", lambda *_: [])
    monkeypatch.setattr(finish, "whole_weights", lambda *_, **__: torch.nn.Linear(1, 1).state_dict())
    monkeypatch.setattr(finish, "load_for_training", lambda *_: SimpleNamespace(model=model))
    monkeypatch.setattr(finish, "pick_device", lambda _: torch.device("cpu"))
    model: Any = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")

    def of(step: int | None, written: list[dict] | None) -> list[Any]:
        moments.clear()
        if written is not None:
            run.samples_file.write_text(json.dumps(written))
        start: Any = SimpleNamespace(step=step, prepared=prepared, main=True, run=run, base=None)
        start.state = SimpleNamespace(device=torch.device("cpu"))
        trainer: Any = SimpleNamespace(parts=SimpleNamespace(cut=True), model=model)
        kept: Prepared = prepared  # type: ignore[assignment]
        assert finish.whole_model(trainer, start, torch.float32, Samples(run, kept)) is model
        return list(moments)

    return of


def test_a_resumed_run_is_asked_before_where_that_was_never_done(asked):
    assert asked(None, None) == ["before"]
    assert asked(4, None) == ["before"]  # stopped under an engine that cuts weights: nobody could ask
    assert asked(4, [ANSWERED]) == []  # it began under another one, which asked
