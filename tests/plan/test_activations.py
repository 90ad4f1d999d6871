"""What autograd keeps per token of a small real model, against the formula."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from llama_ft.adapters.lora import attach_lora
from llama_ft.llama.load import build_random
from llama_ft.llama.shapes import Shape
from llama_ft.plan.engine import Engine
from llama_ft.plan.memory import Case, activations
from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Adapter, Training

SHAPE = Shape(256, 8, 4, 2, 768, 2048, 512, tied=True)


def kept(adapter: Adapter, dtype: torch.dtype, tokens: int) -> int:
    """Bytes of the distinct storages that a forward pass keeps, parameters apart."""
    model = build_random(LlamaConfig(**SHAPE.config_dict()), 0, dtype=dtype)
    model.config.use_cache = False
    trained = model if adapter.method == "full" else attach_lora(model, adapter)
    own = {parameter.untyped_storage().data_ptr() for parameter in trained.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # a storage that is freed would lend its address to another

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        trained.train()(input_ids=ids, labels=ids.clone())
    return sum(sizes.values())


ADAPTERS: list[dict] = [{}, {"r": 4}, {"dropout": 0.1}, {"dora": True}]
FULL = ({"method": "full"}, "float32")  # trained weights are float32


@pytest.mark.parametrize(
    ("adapter", "dtype"),
    [*((adapter, dtype) for adapter in ADAPTERS for dtype in ("float32", "bfloat16")), FULL],
    ids=lambda part: str(part or "lora"),
)
def test_activations_per_token(adapter, dtype):
    made = Adapter(**adapter)
    measured = (kept(made, getattr(torch, dtype), 256) - kept(made, getattr(torch, dtype), 128)) / 128
    case = Case.of(Weights(SHAPE, made), Training(), dtype, Engine("", 1), on_gpu=False)
    element = case.element
    backward = element * (3 * 768 + 2 * 256) + 3 * 4 * 256  # gradients, which a forward pass does not keep
    head = element * 256  # the labelled rows' gradient, counted with the head
    assert measured - head == pytest.approx(activations(case, 1) - backward, rel=0.02)
