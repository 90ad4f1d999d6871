"""Plans without a measurement: a CPU whose rates are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llama_ft.data.mixture import Mixture
from llama_ft.plan.data import DataFacts
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import CARDS, Hardware
from llama_ft.plan.memory import Case
from llama_ft.plan.probe import Rates
from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Adapter, Training

RATES = Rates({"float32": 190e9, "bfloat16": 90e9}, 20e9, 1.5, 2)


@pytest.fixture
def rates() -> Rates:
    return RATES


def case(
    shape: Any, *, engine: Engine | None = None, on_gpu: bool = True, dtype: str = "bfloat16", **keys: Any
) -> Case:
    """A case from a shape and dotted keys of adapter and training: `adapter__method="full"`."""
    parts: dict[str, dict[str, Any]] = {"adapter": {}, "training": {}}
    for key, value in keys.items():
        section, _, name = key.partition("__")
        parts[section][name] = value
    weights = Weights(shape, Adapter(**parts["adapter"]))
    return Case.of(weights, Training(**parts["training"]), dtype, engine or Engine("", 1), on_gpu=on_gpu)


def facts(lengths: list[int], labelled: list[int] | None = None, seed: int = 42) -> DataFacts:
    """Counted documents of one source."""
    sizes = np.array(lengths, dtype=np.int32)
    loss = np.array(labelled if labelled is not None else [n // 2 for n in lengths], dtype=np.int32)
    return DataFacts(
        exact=True,
        source="counted",
        documents=len(sizes),
        mean_tokens=float(sizes.mean()),
        mean_labelled=float(loss.mean()),
        mean_squares=float((sizes.astype(float) ** 2).mean()),
        lengths=sizes,
        labelled=loss,
        mixture=Mixture((len(sizes),), (len(sizes),), seed),
    )


def card(name: str, devices: int = 1) -> Hardware:
    return Hardware(name, devices, CARDS[name].memory, CARDS[name])
