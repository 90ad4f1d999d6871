"""The machine's rate: measured elsewhere, with the model's own products."""

from __future__ import annotations

import pytest

from llama_ft.llama.load import choose_compute_dtype
from llama_ft.llama.shapes import PRESETS
from llama_ft.plan import probe
from llama_ft.plan.probe import Rates, measure, rates_here, spec


def test_what_is_measured():
    asked = spec(PRESETS["smollm2-135m"], "float32")
    weights = sum(out * into * count for out, into, count in asked["products"])
    assert weights == 106_168_320 + 28_311_552 and asked["tokens"] == 512
    assert spec(PRESETS["llama-3.1-8b"], "bfloat16")["tokens"] < 64


def test_rates_of_this_machine():
    here, there = measure(spec(PRESETS["tiny"], "bfloat16")), rates_here(PRESETS["tiny"], "float32")
    assert set(here.flops) == {"float32", "bfloat16"} and set(there.flops) == {"float32"}
    assert min(*here.flops.values(), *there.flops.values(), here.bandwidth, there.imported) > 0


def test_a_type_is_chosen_as_training_chooses(monkeypatch):
    import torch

    for fast, expected in ((250e9, "bfloat16"), (200e9, "float32")):
        rates = {torch.float32: 190e9, torch.bfloat16: fast}
        monkeypatch.setattr("llama_ft.llama.load.gemm_rate", lambda dtype, rates=rates: rates[dtype])
        assert Rates({"float32": 190e9, "bfloat16": fast}, 1.0, 1.0, 2).chosen("bfloat16") == expected
        assert choose_compute_dtype(torch.bfloat16, torch.device("cpu")) == getattr(torch, expected)


def test_a_probe_that_fails_is_told(monkeypatch):
    from llama_ft.errors import MachineFault

    monkeypatch.setattr(probe.sys, "executable", "/bin/false")
    with pytest.raises(MachineFault, match="speed could not be measured"):
        rates_here(PRESETS["tiny"], "float32")
