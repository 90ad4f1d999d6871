"""Weights, memory and FLOP against numbers worked out by hand from the papers' formulas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from llama_ft.llama.head import CHUNK_BYTES
from llama_ft.llama.shapes import PRESETS, Shape
from llama_ft.plan.disk import disk
from llama_ft.plan.engine import Engine
from llama_ft.plan.flops import Tokens, forward, per_token, training
from llama_ft.plan.memory import HEAD_CHUNK, Case, activations, gathered, memory, optimizer
from llama_ft.plan.weights import Weights
from llama_ft.recipe import load_recipe
from llama_ft.recipe.schema import Adapter, Training
from tests.plan.conftest import case

EIGHT, TWO_7B, SMOL = PRESETS["llama-3.1-8b"], PRESETS["llama-2-7b"], PRESETS["smollm2-135m"]
GIB = 2**30


def test_published_counts():
    assert (SMOL.linear_weights, SMOL.vocabulary * SMOL.hidden) == (106_168_320, 28_311_552)
    assert round(TWO_7B.linear_weights / 1e6) == 6476 and round(TWO_7B.vocabulary * TWO_7B.hidden / 1e6) == 131
    assert round(EIGHT.linear_weights / 1e6) == 6979 and round(EIGHT.vocabulary * EIGHT.hidden / 1e6) == 525
    assert Weights(EIGHT, Adapter()).trained == 41_943_040


@pytest.mark.parametrize(
    ("adapter", "gib"),
    [({}, 14.96), ({"method": "qlora"}, 5.31), ({"method": "qlora", "bits": 8}, 8.46)],
    ids=["bf16", "nf4", "int8"],
)
def test_weights_of_8b(adapter, gib):
    assert Weights(EIGHT, Adapter(**adapter)).held(2) / GIB == pytest.approx(gib, abs=0.02)


def test_double_quantisation_saves_037_bits():
    with_, without = (Weights(EIGHT, Adapter(method="qlora", double_quant=on)).held(2) for on in (True, False))
    assert (without - with_) * 8 / EIGHT.linear_weights == pytest.approx(0.373, abs=0.001)


def test_lora_on_8b_takes_063_gib_with_adam():
    parts = memory(case(EIGHT), 1, 1)
    assert (parts.adapter + parts.gradients + parts.optimizer) / GIB == pytest.approx(0.625, abs=0.01)
    assert parts.weights / GIB == pytest.approx(14.96, abs=0.02)


def test_full_tuning_of_7b_keeps_float32_masters():
    made = case(TWO_7B, adapter__method="full", training__gradient_checkpointing=True)
    parts = memory(made, 1, 1)
    assert parts.gradients == 4 * TWO_7B.parameters and parts.optimizer == 8 * TWO_7B.parameters
    # one layer's cast in 16 bits and that of the head
    casts = 2 * (TWO_7B.linear_weights // 32 + TWO_7B.vocabulary * TWO_7B.hidden)
    assert parts.weights == pytest.approx(4 * TWO_7B.parameters + casts, rel=1e-6)


def test_sharding_divides_what_it_says():
    whole = case(TWO_7B, adapter__method="full")
    for name, shards in (("DDP", (1, 1, 1)), ("ZeRO-1", (1, 1, 8)), ("ZeRO-2", (1, 8, 8)), ("ZeRO-3", (8, 8, 8)),
                         ("FSDP2", (8, 8, 8))):  # fmt: skip
        made = case(TWO_7B, adapter__method="full", engine=Engine(name, 8))
        parts = memory(made, 1, 1)
        weights, gradients, states = shards
        masters = 4 * TWO_7B.parameters if name.startswith("ZeRO") else 0
        each = 2 if masters else 4  # DeepSpeed holds 16 bits and masters, 16 bytes a weight in all as in the paper's §3
        assert parts.weights - gathered(made) == each * TWO_7B.parameters // weights
        assert parts.gradients == each * TWO_7B.parameters // gradients
        assert parts.optimizer == (8 * TWO_7B.parameters + masters) // states
    assert memory(whole, 1, 1).gradients == 4 * TWO_7B.parameters
    offload = memory(case(TWO_7B, adapter__method="full", engine=Engine("ZeRO-3", 8, offload=True)), 1, 1)
    assert offload.optimizer == offload.gradients == 0 and offload.weights < 2 * GIB
    by_fsdp = memory(case(TWO_7B, adapter__method="full", engine=Engine("FSDP2", 8, offload=True)), 1, 1)
    assert by_fsdp.optimizer == by_fsdp.gradients == 0 and by_fsdp.weights == offload.weights


def test_deepspeed_on_a_cpu_trains_in_float32():
    made = case(SMOL, adapter__method="full", engine=Engine("ZeRO-1", 2), on_gpu=False, dtype="float32")
    parts = memory(made, 1, 1)
    assert parts.weights == parts.gradients == 4 * SMOL.parameters and parts.optimizer == 6 * SMOL.parameters


def test_optimizers_by_name():
    def size(name: str, **keys) -> float:
        return optimizer(case(EIGHT, adapter__method="full", training__optimizer=name, **keys)) / EIGHT.parameters

    assert size("adamw") == 8
    assert size("adamw_8bit") == pytest.approx(2 + 8 / 256)
    assert size("paged_adamw") == 0 and size("paged_adamw", on_gpu=False) == 8
    assert size("adafactor") < 0.01
    assert 4 < size("muon") < 5  # AdamW for embedding and head


def test_activations_of_8b_without_and_with_checkpointing():
    """By hand, per token and layer: 16 bits of 4h + 3·H·d + 3·KV·d + 3i; 2 reciprocals, 32 log-sums, 112 low ranks."""
    numbers = 4 * 4096 + 3 * 4096 + 3 * 1024 + 3 * 14336
    layer = 2 * numbers + 4 * (2 + 32) + 2 * 16 * 7
    backward = 2 * (3 * 14336 + 2 * 4096) + 12 * 4096
    ends = 2 * 4096 + 4 * 128
    assert activations(case(EIGHT), 1000) == 1000 * (32 * layer + backward + ends)
    again = case(EIGHT, training__gradient_checkpointing=True)
    assert activations(again, 1000) == 1000 * (32 * 2 * 4096 + layer + backward + ends)
    half = activations(case(EIGHT, training__gradient_checkpointing="selective"), 1000)
    assert activations(again, 1000) < half < activations(case(EIGHT), 1000)


def test_dropout_and_dora_leave_the_fused_product():
    plain = activations(case(SMOL, on_gpu=False, dtype="float32"), 500)
    dropped = activations(case(SMOL, on_gpu=False, dtype="float32", adapter__dropout=0.1), 500)
    assert dropped > 1.3 * plain


def test_the_head_is_what_the_code_has():
    assert (HEAD_CHUNK[False], HEAD_CHUNK[True]) == (CHUNK_BYTES["cpu"], CHUNK_BYTES["cuda"])
    assert memory(case(SMOL, on_gpu=False, dtype="float32"), 512, 400).head == 341 * 49_152 * 4 + 2 * 400 * 576 * 4


def test_flop_formulas():
    """PERFORMANCE: full 6B + 6f·Hd + 3.5a, LoRA 4B + 4f·Hd + 3.5a + 6P, R(2B − 2D + a) and R(2B + 2P + a) on top."""
    body, head, context = 106_168_320, 28_311_552, 200.0
    a = 2 * 30 * 576 * context
    full, lora = Weights(SMOL, Adapter(method="full")), Weights(SMOL, Adapter())
    factors = 4_884_480
    none, again = Training(), Training(gradient_checkpointing=True)
    kwargs = {"labelled": 0.5, "mean_context": context}
    assert per_token(full, none, **kwargs) == pytest.approx(6 * body + 3 * head + 3.5 * a)
    assert per_token(lora, none, **kwargs) == pytest.approx(4 * body + 2 * head + 3.5 * a + 6 * factors)
    down = 30 * 576 * 1536
    assert per_token(full, again, **kwargs) - per_token(full, none, **kwargs) == pytest.approx(2 * body - 2 * down + a)
    assert per_token(lora, again, **kwargs) - per_token(lora, none, **kwargs) == pytest.approx(
        2 * body + 2 * factors + a
    )
    # what PERFORMANCE measured its share of the machine with: about 0.52 GFLOP per token
    assert per_token(lora, none, labelled=0.6, mean_context=120) == pytest.approx(0.54e9, rel=0.05)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("again", [False, True])
def test_flops_equal_torchs_own_count(method, again):
    """Matrix products of a small real model to the last FLOP. Attention's kernel is none of torch's counted ops."""
    from transformers import LlamaConfig

    from llama_ft.adapters.lora import attach_lora
    from llama_ft.llama.load import build_random

    shape, tokens = Shape(256, 4, 4, 2, 768, 2048, 512, tied=True), 64
    model = build_random(LlamaConfig(**shape.config_dict()), seed=0)
    model.config.use_cache = False
    trained = attach_lora(model, Adapter()) if method == "lora" else model
    trained.train()
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.arange(tokens)[None]
    with FlopCounterMode(display=False) as counter:
        trained(input_ids=ids, labels=ids.clone()).loss.backward()
    weights = Weights(shape, Adapter(method=method))
    expected = training(weights, Tokens(tokens, tokens - 1, 0.0), Training(gradient_checkpointing=again))
    if method == "lora":  # the counter does not see addmm_ in place: B in each forward, A in the backward pass
        up = 16 * sum(out for out, _ in weights.targets)
        expected -= 2 * tokens * (up * (2 if again else 1) + weights.lora - up)
        if not again:  # nothing below the first layer asks for a gradient of its input
            into = sum(shape.projections[name][0] for name in ("q_proj", "k_proj", "v_proj")) * shape.hidden
            expected -= 2 * tokens * into
    assert counter.get_total_flops() == expected


def test_forward_is_a_third_of_full_training():
    weights = Weights(SMOL, Adapter(method="full"))
    seen = Tokens(1000, 1000, 0)
    assert training(weights, seen, Training()) == pytest.approx(3 * forward(weights, seen))


def test_a_checkpoint_has_twelve_bytes_per_trained_weight():
    recipe = load_recipe("quickstart", ["training.save_every=10"])
    made = Case.of(Weights(SMOL, recipe.adapter), recipe.training, "float32", Engine("", 1), on_gpu=False)
    stored = disk(recipe, made, steps=25)
    assert stored.checkpoint == 12 * 4_884_480 and stored.checkpoints == 3
    assert (stored.adapter, stored.merged) == (4 * 4_884_480, 4 * SMOL.parameters)
    kept = load_recipe("quickstart", ["training.save_every=10", "training.keep_checkpoints=1"])
    assert disk(kept, made, steps=25).checkpoints == 2  # the newest and the best
