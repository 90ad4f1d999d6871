"""RoPE scaling: transformers' numbers for every type, each document's own frequencies, configs that serve right."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as Reference
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils import logging

from llama_ft.llama.context import context_length, original_context, scale_rope
from llama_ft.llama.load import load_config, load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.rope import RotaryEmbedding
from llama_ft.recipe.schema_model import RopeScaling
from tests.llama.conftest import SMALL

CONTEXT = 64
SCALINGS = {
    "theta alone": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "linear": {"rope_type": "linear", "factor": 4},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic 1.5": {"rope_type": "dynamic", "factor": 1.5, "rope_theta": 500_000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn, all keys": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn, attention factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4},
}
LENGTHS = (7, CONTEXT, CONTEXT + 1, 3 * CONTEXT)
"""Below, at and beyond the original context."""


def config_of(name: str, max_length: int = 4 * CONTEXT) -> LlamaConfig:
    """A small LLaMA of CONTEXT tokens with a recipe's scaling on it."""
    config = LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT)
    return scale_rope(config, RopeScaling(**SCALINGS[name]), max_length)


def twins(name: str) -> tuple[Reference, LlamaForCausalLM]:
    """Hugging Face's model and ours, equal weights wide enough that attention matters."""
    torch.manual_seed(0)
    config = config_of(name)
    config.initializer_range = 0.15
    config.pad_token_id = 0
    reference = Reference(config).eval()
    ours = LlamaForCausalLM(config).eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, SMALL["vocab_size"], (1, 4 * CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", SCALINGS)
def test_cos_and_sin_are_transformers_own_to_the_bit(name, length):
    config = config_of(name)
    positions = torch.arange(length)
    expected = LlamaRotaryEmbedding(config)(torch.empty(0), positions[None])
    for found, wanted in zip(RotaryEmbedding(config)(positions, torch.float32, [0, length]), expected, strict=True):
        first, second = wanted[0].chunk(2, dim=-1)
        assert torch.equal(found[:, 0], first)
        assert torch.equal(found[:, 0], second)


def test_scaling_does_something():
    """So that equality with transformers cannot mean that neither scales."""
    tables = {
        name: RotaryEmbedding(config_of(name))(torch.arange(200), torch.float32, [0, 200])[0] for name in SCALINGS
    }
    for left, right in pairwise(sorted(SCALINGS)):
        assert not torch.equal(tables[left], tables[right]), (left, right)


@pytest.mark.parametrize("name", SCALINGS)
def test_logits_are_transformers_own(name, ids):
    for length in LENGTHS:
        reference, ours = twins(name)  # fresh: transformers' dynamic frequencies remember the last call
        with torch.no_grad():
            expected, found = reference(ids[:, :length]).logits, ours(ids[:, :length]).logits
        assert torch.allclose(found, expected, atol=1e-4), length


LAYOUTS = {
    "short beside long": [0, 20, 200, 240],
    "all short": [0, 20, 60, 100],
    "all long": [0, 90, 170],
    "one token, exactly the context, one more": [0, 1, 1 + CONTEXT, 2 + 2 * CONTEXT],
}


@pytest.mark.parametrize("bounds", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_packed_document_has_the_frequencies_of_its_own_length(bounds, ids):
    _, ours = twins("dynamic")
    with torch.no_grad():
        packed = ours(ids[:, : bounds[-1]], cu_seqlens=bounds).logits[0]
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])[None]
        by_position = ours(ids[:, : bounds[-1]], position_ids=positions).logits[0]
        assert torch.equal(packed, by_position)
        for start, stop in pairwise(bounds):
            reference, _ = twins("dynamic")
            assert torch.allclose(packed[start:stop], reference(ids[:, start:stop]).logits[0], atol=1e-4), start


def test_padded_rows_have_the_frequencies_of_their_own_length(ids):
    _, ours = twins("dynamic")
    rows = torch.stack([ids[0, :200], ids[0, 40:240]])
    mask = torch.ones_like(rows)
    mask[1, 30:] = 0
    with torch.no_grad():
        found = ours(rows, attention_mask=mask).logits[1, :30]
        reference, _ = twins("dynamic")
        assert torch.allclose(found, reference(rows[1:, :30]).logits[0], atol=1e-4)


def test_another_document_moves_no_bit(ids):
    """The same tokens after the first document, cut otherwise: its tables and logits are the same bits."""
    _, ours = twins("dynamic")
    seen, tables = [], []
    for bounds in ([0, 90, 200], [0, 90, 100, 200], [0, 90, 130, 160, 200]):
        positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)])
        with torch.no_grad():
            seen.append(ours(ids[:, :200], cu_seqlens=bounds).logits[0, :90])
        tables.append(torch.cat(ours.model.rotary_emb(positions, torch.float32, bounds), dim=-1)[:90])
    for other in (1, 2):
        assert torch.equal(seen[0], seen[other])
        assert torch.equal(tables[0], tables[other])
    longer = torch.cat([torch.arange(90), torch.arange(500)])
    again = torch.cat(ours.model.rotary_emb(longer, torch.float32, [0, 90, 590]), dim=-1)[:90]
    assert torch.equal(again, tables[0])


@pytest.mark.parametrize("name", SCALINGS)
def test_generation_follows_transformers_across_the_context(name, ids):
    """Greedy with a cache, from below the original context to beyond it: same ids, same logits at each step."""
    answers = []
    for model in twins(name):
        prompt = ids[:, : CONTEXT - 6]
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            min_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        answers.append((out.sequences, torch.stack(out.logits)))
    assert torch.equal(answers[0][0], answers[1][0])
    assert torch.allclose(answers[0][1], answers[1][1], atol=1e-4)


def test_a_later_short_text_is_not_stretched(ids):
    """No state stays behind: an answer does not depend on what the model read before."""
    _, ours = twins("dynamic")
    with torch.no_grad():
        before = ours(ids[:, :70], use_cache=True).logits
        ours(ids, use_cache=True)
        assert torch.equal(ours(ids[:, :70], use_cache=True).logits, before)


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_survive_a_cast_to_bfloat16(name):
    config = config_of(name)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    positions = torch.arange(200)
    expected = RotaryEmbedding(config)(positions, torch.float32, [0, 200])
    for found, wanted in zip(model.model.rotary_emb(positions, torch.float32, [0, 200]), expected, strict=True):
        assert torch.equal(found, wanted)


def test_an_unknown_type_is_refused():
    config = LlamaConfig(**SMALL, num_attention_heads=4)
    config.rope_parameters = {"rope_type": "proportional", "rope_theta": 10_000.0}
    with pytest.raises(ValueError, match="proportional"):
        RotaryEmbedding(config)


# What configs say. (max_position_embeddings, context that the model reads) for a base of 64 tokens.
LENGTHS_OF = {
    "theta alone": (256, 256),
    "linear": (64, 256),
    "dynamic": (64, 256),
    "dynamic 1.5": (64, 96),
    "yarn": (256, 256),
    "yarn, all keys": (128, 128),
    "yarn, attention factor": (256, 256),
    "llama3": (512, 512),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_the_lengths_in_a_config_follow_the_rule(name):
    config = config_of(name)
    assert (config.max_position_embeddings, context_length(config)) == LENGTHS_OF[name]
    before = json.loads(config.to_json_string())
    again = scale_rope(config, RopeScaling(**SCALINGS[name]), 4 * CONTEXT)
    assert json.loads(again.to_json_string()) == before  # a checkpoint's config is scaled already


def length_vllm_derives(config: dict) -> float:
    """vLLM's `_get_and_verify_max_len`, in short."""
    length, rope = config["max_position_embeddings"], config["rope_parameters"]
    if rope["rope_type"] not in ("su", "longrope", "llama3"):
        if rope["rope_type"] == "yarn":
            length = rope["original_max_position_embeddings"]
        length *= rope.get("factor", 1.0)
    return length


@pytest.mark.parametrize("name", SCALINGS)
def test_an_export_reopens_in_plain_transformers_with_the_same_logits(name, ids, tmp_path, caplog):
    logging.enable_propagation()
    _, ours = twins(name)
    ours.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert length_vllm_derives(written) == LENGTHS_OF[name][1]
    reopened = Reference.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(reopened(ids[:, :200]).logits, ours(ids[:, :200]).logits, atol=1e-4)
    logging.disable_propagation()
    assert not [record for record in caplog.records if "rope" in record.getMessage().lower()]
    scaled = load_model(tmp_path, torch.float32, rope_scaling=RopeScaling(**SCALINGS[name]), max_length=4 * CONTEXT)
    with torch.no_grad():
        assert torch.equal(scaled(ids[:, :200]).logits, ours(ids[:, :200]).logits)


def test_scaling_replaces_that_of_the_base(tmp_path):
    """Llama 3.1 (8,192 tokens, stretched to 131,072) under other scalings: from 8,192 on, and no key is left over."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    LlamaConfig(**SMALL, num_attention_heads=4, max_position_embeddings=131_072, rope_parameters=rope).save_pretrained(
        tmp_path
    )
    plain = load_config(tmp_path)
    assert (original_context(plain), context_length(plain)) == (8192, 131_072)
    linear = load_config(tmp_path, RopeScaling(rope_type="linear", factor=2))
    assert linear.rope_parameters == {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0}
    assert (linear.max_position_embeddings, context_length(linear)) == (8192, 16_384)
    yarn = load_config(tmp_path, RopeScaling(rope_type="yarn", factor=4, rope_theta=1e6))
    assert yarn.rope_parameters == {
        "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    assert context_length(yarn) == yarn.max_position_embeddings == 32_768
    same = load_config(tmp_path, RopeScaling(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0))
    assert same.rope_parameters == rope
    assert same.max_position_embeddings == 131_072
    theta = load_config(tmp_path, RopeScaling(rope_type="default", rope_theta=2e6), max_length=1000)
    assert theta.rope_parameters == {"rope_type": "default", "rope_theta": 2e6}
    assert theta.max_position_embeddings == 131_072
