"""Presets: counts equal transformers', memory equals its formula, and the list prints on any terminal without torch."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Reference

from llama_ft.adapters.sizes import trained_weights
from llama_ft.llama.init import meta_model, weight_shapes
from llama_ft.llama.shapes import KINDS, PRESETS, Shape
from llama_ft.recipe import schema_model
from llama_ft.recipe.schema import Adapter
from tests.conftest import ROOT

MODELS = "from llama_ft.cli import app; app(['models'{}])"


@pytest.mark.parametrize("name", PRESETS)
def test_the_closed_formula_counts_what_transformers_builds(name):
    shape = PRESETS[name]
    config = LlamaConfig(**shape.config_dict())
    start = time.perf_counter()
    ours = meta_model(config)
    assert time.perf_counter() - start < 3
    with torch.device("meta"):
        reference = Reference(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, reference)]
    assert counts == [shape.parameters] * 2
    assert {n: tuple(p.shape) for n, p in reference.named_parameters()} == weight_shapes(config)
    linear = sum(m.weight.numel() for n, m in ours.model.named_modules() if isinstance(m, torch.nn.Linear))
    assert linear == shape.linear_weights


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama-1-7b", 6.7), ("llama-1-13b", 13.0), ("llama-1-33b", 32.5), ("llama-1-65b", 65.2),  # paper's table 2
        ("llama-3-8b", 8.0), ("llama-3-70b", 70.6), ("llama-3.1-405b", 405.9), ("llama-3.2-1b", 1.24),
        ("llama-3.2-3b", 3.21), ("code-llama-34b", 33.7), ("tinyllama-1.1b", 1.10), ("smollm2-135m", 0.135),
        ("smollm2-360m", 0.362), ("smollm2-1.7b", 1.71),
    ],
)  # fmt: skip
def test_counts_are_the_published_ones(name, billions):
    assert PRESETS[name].parameters / 1e9 == pytest.approx(billions, abs=0.1 if billions > 10 else 0.05)


def test_the_preset_of_smollm2_is_the_real_model(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    real, preset = Shape.of_config(config), PRESETS["smollm2-135m"]
    for name in ("hidden", "layers", "heads", "kv_heads", "intermediate", "vocabulary", "context", "theta", "tied"):
        assert getattr(real, name) == getattr(preset, name), name
    assert real.eps == pytest.approx(preset.eps)  # the GGUF file rounds it to float32
    assert real.dim == preset.dim == 64
    assert real.parameters == preset.parameters == 134_515_008


@pytest.mark.parametrize("name", PRESETS)
def test_a_shape_survives_its_config(name):
    assert Shape.of_config(LlamaConfig(**PRESETS[name].config_dict()).to_dict()).as_dict() == PRESETS[name].as_dict()


def test_biases_are_counted():
    config = LlamaConfig(**PRESETS["tiny"].config_dict() | {"attention_bias": True, "mlp_bias": True})
    assert Shape.of_config(config.to_dict()).parameters == sum(p.numel() for p in meta_model(config).parameters())


def test_memory():
    """PERFORMANCE: 8B takes 14.96 GiB in bfloat16, 5.3 in NF4 with double quantisation; LoRA r16 has 41.9M weights."""
    shape = PRESETS["llama-3-8b"]
    gib = {kind: shape.memory(kind) / 2**30 for kind in KINDS}
    assert gib["bfloat16"] == pytest.approx(14.96, abs=0.005)
    assert gib["nf4"] == pytest.approx(5.3, abs=0.05)
    assert gib["float32"] == 2 * gib["bfloat16"]
    rows = 32 * (4096 + 1024 + 1024 + 4096 + 2 * 14336 + 4096)
    embeddings_and_norms = 2 * 128_256 * 4096 + 65 * 4096
    assert shape.memory("int8") == 6_979_321_856 + 4 * rows + 2 * embeddings_and_norms
    assert trained_weights(shape, Adapter(r=16)) == 41_943_040
    with pytest.raises(KeyError):
        shape.memory("q4")


def test_recipes_and_shapes_know_the_same_presets():
    assert {name: (shape.original_context, shape.context) for name, shape in PRESETS.items()} == schema_model.PRESETS
    assert list(schema_model.PRESETS) == list(PRESETS)


def run_models(arguments: str = "") -> str:
    """What `llama-ft models` prints into a pipe; fails if it loaded torch."""
    code = f"import sys\ntry: {MODELS.format(arguments)}\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_list_in_a_pipe_is_one_line_per_model():
    head, *rows = run_models().splitlines()
    assert [row.split()[0] for row in rows] == list(PRESETS)
    assert head.split()[:8] == ["preset", "hidden", "layers", "heads", "mlp", "vocab", "context", "rope"]
    assert len({len(line) for line in [head, *rows]}) == 1
    row = next(row for row in rows if row.startswith("llama-3.1-8b"))
    assert row.split() == [
        "llama-3.1-8b", "4096", "32", "32/8", "14336", "128256", "131072", "500k", "llama3x8", "8.03B", "29.92",
        "14.96", "8.46", "5.31",
    ]  # fmt: skip


def test_the_list_as_json():
    models = {entry["name"]: entry for entry in json.loads(run_models(", '--json'"))}
    assert list(models) == list(PRESETS)
    assert models["llama-3.2-1b"]["parameters"] == 1_235_814_400
    assert models["llama-3.2-1b"]["rope_scaling"]["factor"] == 32
    assert models["llama-2-7b"]["memory"] == {kind: PRESETS["llama-2-7b"].memory(kind) for kind in KINDS}
    assert (models["code-llama-7b"]["vocabulary"], models["code-llama-34b"]["vocabulary"]) == (32_016, 32_000)


@pytest.mark.parametrize(("columns", "blocks"), [(80, 2), (200, 1)])
def test_the_list_fits_the_terminal(columns, blocks):
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen([sys.executable, "-c", MODELS.format("")], stdout=child, env=environment)
    os.close(child)
    raw = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        raw += part
    assert process.wait() == 0
    lines = raw.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) <= columns
    assert sum(line.startswith("preset ") for line in lines) == blocks
    assert sum(line.startswith("llama-2-7b ") for line in lines) == blocks
    docs = ROOT / "docs" / "models.md"
    if columns == 80 and docs.is_file():  # not shipped with the package
        assert "\n".join(lines) in docs.read_text(encoding="utf-8")
