"""The reference without a second model: what the model says with its adapter off is what it said at the start."""

from __future__ import annotations

import pytest
import torch

from llama_ft.adapters.lora import attach_lora
from llama_ft.adapters.quantised import load_quantised
from llama_ft.data.ends import lay_out
from llama_ft.llama.load import load_model
from llama_ft.recipe.schema_model import Adapter
from llama_ft.train.answering import LAYOUT
from llama_ft.train.objectives.reference import without_adapter


def said(model, batch) -> torch.Tensor:
    with torch.no_grad():
        layout = {name: batch[name] for name in LAYOUT}
        return model(**layout, rows=batch["rows"], targets=batch["targets"]).log_probs


@pytest.mark.parametrize("held", ["float32", "bfloat16", "nf4"])
def test_an_adapter_that_is_off_is_the_start(small_base, held):
    """Bit for bit also in 16 bits: a first step of DPO has a loss of log 2, and a first KL is 0."""
    dtype = torch.bfloat16 if held == "bfloat16" else torch.float32
    if held == "nf4":
        adapter = Adapter(method="qlora", r=4, alpha=8)
        base = load_quantised(small_base, adapter, dtype, compute=dtype, device=torch.device("cpu"))
    else:
        adapter = Adapter(r=4, alpha=8)
        base = load_model(small_base, dtype)
    model = attach_lora(base, adapter).eval()
    words = torch.randint(1000, 40_000, (8, 90), generator=torch.Generator().manual_seed(1)).tolist()
    batch = lay_out([(one[:40], [one[40:70], one[70:]]) for one in words], share=True)
    start = said(model, batch)
    with without_adapter(model):
        off = said(model, batch)
    assert torch.equal(off, start)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    moved = said(model, batch)
    with without_adapter(model):
        assert torch.equal(said(model, batch), start)
    assert not torch.equal(moved, start) and torch.equal(said(model, batch), moved)
