"""The reward model against transformers' LlamaForSequenceClassification: scores, gradients, files, adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as ReferenceCausal
from transformers import LlamaForSequenceClassification as Reference

from llama_ft.adapters.fused import can_fuse
from llama_ft.adapters.lora import attach_lora
from llama_ft.adapters.sizes import trained_weights, weight_names
from llama_ft.errors import UserError
from llama_ft.llama.load import load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.llama.reward import (
    LlamaForSequenceClassification,
    as_reward_model,
    first_score,
    is_reward_model,
    last_tokens,
    load_reward_model,
)
from llama_ft.llama.shapes import Shape
from llama_ft.recipe.schema import Adapter
from tests.llama.conftest import SHAPES

PAD = 0


def reward_model(shape: str = "llama-2-70b-like", **changes) -> LlamaForSequenceClassification:
    """A random one in float32, whose scores differ by about 1."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**SHAPES[shape].to_dict(), "pad_token_id": PAD, "initializer_range": 0.1, **changes})
    return as_reward_model(LlamaForCausalLM(config), seed=7).eval()


def batch(side: str | None = None, lengths: tuple[int, ...] = (13, 9, 4)) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask [3, 13]; `side`: where the padding of the shorter ones stands, None for no mask."""
    ids = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        tokens = torch.randint(1, 300, (length,), generator=torch.Generator().manual_seed(row))
        ids[row, -length if side == "left" else 0 : None if side == "left" else length] = tokens
    return {"input_ids": ids} | ({"attention_mask": (ids != PAD).long()} if side else {})


def saved(model: LlamaForSequenceClassification, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_opens_our_folder_with_equal_scores(shape, tmp_path):
    model = reward_model(shape)
    theirs, report = Reference.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        for side in ("left", "right", None):
            ours, expected = model(**batch(side)).logits, theirs.eval()(**batch(side)).logits
            assert ours.shape == (3, 1)
            assert ours.std() > 0.1, "scores that are all the same say nothing"
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_their_folder_opens_here_with_equal_scores(tmp_path):
    config = LlamaConfig(**{**SHAPES["llama-3.1"].to_dict(), "pad_token_id": PAD, "initializer_range": 0.1})
    config.num_labels = 1
    theirs = Reference(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_reward_model(tmp_path, torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch("left")).logits, theirs(**batch("left")).logits, rtol=0, atol=1e-5)


def pair_layouts(prompt: list[int], ends: list[list[int]]) -> tuple[dict, dict]:
    """The same ends of a prompt: the prompt once and shared, and copied in front of each."""
    bounds, copied = [0, len(prompt)], [0]
    for end in ends:
        bounds.append(bounds[-1] + len(end))
        copied.append(copied[-1] + len(prompt) + len(end))
    shared = {
        "input_ids": torch.tensor([prompt + [token for end in ends for token in end]]),
        "cu_seqlens": torch.tensor(bounds),
        "shared": torch.tensor([-1] + [0] * len(ends)),
        "rows": torch.tensor(bounds[2:]) - 1,
    }
    plain = {
        "input_ids": torch.tensor([[token for end in ends for token in prompt + end]]),
        "cu_seqlens": torch.tensor(copied),
        "rows": torch.tensor(copied[1:]) - 1,
    }
    return shared, plain


PROMPT, ENDS = [5, 9, 77, 31], [[8, 201, 3], [44], [6, 7, 8, 9, 10]]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_scores_and_gradients_of_pairs_equal_theirs(tmp_path, checkpointed):
    """A packed batch with the prompt once, one with copies, and transformers on each answer alone."""
    model = reward_model()
    theirs = Reference.from_pretrained(saved(model, tmp_path))
    documents = [torch.tensor([PROMPT + end]) for end in ENDS]
    expected = torch.cat([theirs(ids).logits.squeeze(-1) for ids in documents])
    (-F.logsigmoid(expected[0] - expected[1:]).sum()).backward()
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layout in pair_layouts(PROMPT, ENDS):
        model.zero_grad()
        scores = model(**layout).scores
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
        (-F.logsigmoid(scores[0] - scores[1:]).sum()).backward()
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_rows_may_stand_anywhere():
    model = reward_model()
    ids = batch()["input_ids"][:1]
    with torch.no_grad():
        found = model(ids, rows=torch.tensor([12, 3, 12])).scores
        alone = [model(ids[:, : last + 1]).logits.item() for last in (12, 3, 12)]
    torch.testing.assert_close(found, torch.tensor(alone), rtol=0, atol=1e-5)


def test_the_last_token_is_neither_padding_nor_masked():
    ids = torch.tensor([[5, 6, 7, PAD], [PAD, 5, 6, 7], [5, PAD, 6, PAD]])
    assert last_tokens(ids, None, PAD).tolist() == [2, 4 + 3, 8 + 2]
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    assert last_tokens(ids, mask, PAD).tolist() == [1, 4 + 3, 8 + 2]
    assert last_tokens(ids, mask, None).tolist() == [1, 4 + 3, 8 + 3]
    assert last_tokens(ids, None, None).tolist() == [3, 7, 11]


def test_the_backbone_is_taken_over_and_the_score_is_drawn_by_the_seed():
    causal = LlamaForCausalLM(SHAPES["llama-3.2-tied"]).to(torch.bfloat16)
    weight = causal.model.layers[1].mlp.up_proj.weight
    model = as_reward_model(causal, seed=3)
    assert model.model.layers[1].mlp.up_proj.weight is weight
    assert weight.dtype == torch.bfloat16
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.score.weight, first_score(64, 3))
    assert not torch.equal(model.score.weight, first_score(64, 4))
    many = first_score(40_000, 0)
    assert many.std().item() == pytest.approx(1 / math.sqrt(40_001), rel=0.02)
    assert abs(many.mean().item()) < 3 / 40_000
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert not any("lm_head" in name for name, _ in model.named_parameters())


def test_scores_are_float32_under_16_bits_and_autocast():
    """The last product is not rounded: it equals the one made by hand from the hidden states."""
    model = reward_model().to(torch.bfloat16)
    model.score.float()
    ids = batch()["input_ids"][:1]
    rows = torch.tensor([12])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.model.hidden_of(ids, rows)
        scores = model(ids, rows=rows).scores
    assert scores.dtype == torch.float32
    assert torch.equal(scores, (hidden.float() @ model.score.weight.T).squeeze(-1))


def test_embeddings_grow(tmp_path):
    model = reward_model(tie_word_embeddings=True)
    with torch.no_grad():
        before = model(**batch("right")).logits
        model.resize_token_embeddings(320)
        assert torch.equal(model(**batch("right")).logits, before)
        assert model(torch.tensor([[5, 319]])).logits.isfinite()
    theirs, report = Reference.from_pretrained(saved(model, tmp_path), output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.vocab_size == 320


@pytest.mark.parametrize("name", ["inputs_embeds", "labels"])
def test_what_it_cannot_be_asked(name):
    model = reward_model()
    with pytest.raises(ValueError, match="reward model"):
        model(torch.tensor([[5, 6]]), **{name: torch.zeros(1, 2, 64)})


# Folders


def test_a_loaded_model_is_rounded_and_its_score_is_float32(tmp_path):
    model = reward_model()
    folder = saved(model, tmp_path)
    assert is_reward_model(folder)
    found = load_reward_model(folder, torch.bfloat16, compute_dtype=torch.float32)
    assert torch.equal(found.model.norm.weight, model.model.norm.weight.bfloat16().float())
    assert load_reward_model(folder, torch.bfloat16).score.weight.dtype == torch.float32
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert (config["id2label"], config["problem_type"], config["pad_token_id"]) == ({"0": "LABEL_0"}, "regression", PAD)


def test_other_folders_are_refused_by_what_they_are(tmp_path, tiny_base):
    with pytest.raises(UserError, match=r"holds a LlamaForCausalLM, not a reward model .*objective: reward"):
        load_reward_model(tiny_base, torch.float32)
    assert not is_reward_model(tiny_base)
    config = LlamaConfig(**{**SHAPES["llama-1"].to_dict(), "pad_token_id": PAD})
    config.num_labels = 3
    Reference(config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="is a classifier of 3 labels, not a reward model: that has one"):
        load_reward_model(tmp_path / "three", torch.float32)
    causal = ReferenceCausal(SHAPES["llama-1"])
    causal.save_pretrained(tmp_path / "named")
    (tmp_path / "named" / "config.json").write_text(
        json.dumps({**reward_model("llama-1").config.to_dict(), "architectures": ["LlamaForSequenceClassification"]})
    )
    with pytest.raises(UserError, match=r"missing keys: score\.weight; unexpected keys: lm_head\.weight"):
        load_reward_model(tmp_path / "named", torch.float32)
    with pytest.raises(UserError, match=r"unexpected keys: score\.weight"):
        load_model(saved(reward_model("llama-3.2-tied"), tmp_path / "scores"), torch.float32)


# Adapters


def adapted(folder: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> PeftModel:
    model = attach_lora(as_reward_model(load_model(folder, dtype), seed=5), adapter)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide everything
            torch.nn.init.normal_(parameter, std=0.1)
        elif "modules_to_save" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_what_an_adapter_trains(tiny_base):
    model = adapted(tiny_base, Adapter(r=4), torch.bfloat16)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    assert all(p.dtype == torch.float32 for p in trained.values())
    shape = Shape.of_config(model.config.to_dict())
    assert sum(p.numel() for p in trained.values()) == trained_weights(shape, Adapter(r=4), reward=True)
    assert all(can_fuse(layer.self_attn.q_proj) for layer in model.get_base_model().model.layers)
    model.train()
    scores = model(input_ids=torch.tensor([[5, 6, 7, 8]]), rows=torch.tensor([1, 3])).scores
    scores.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
    with model.disable_adapter():
        plain = model(input_ids=torch.tensor([[5, 6, 7, 8]]), rows=torch.tensor([1, 3])).scores
    assert not torch.equal(plain, scores)


@pytest.mark.parametrize("tied", [False, True])
def test_full_tuning_counts_a_score_in_the_place_of_the_head(tied):
    model = reward_model("llama-3.2-tied", tie_word_embeddings=tied)
    shape = Shape.of_config(model.config.to_dict())
    assert weight_names(shape, reward=True) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert trained_weights(shape, Adapter(method="full"), reward=True) == model.num_parameters()


@pytest.mark.parametrize("saves", [[], ["embed_tokens", "norms"]], ids=["score alone", "embedding and norms too"])
def test_plain_peft_opens_the_adapter_with_equal_scores(tiny_base, tmp_path, saves):
    model = adapted(tiny_base, Adapter(r=4, modules_to_save=saves))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["task_type"] == "SEQ_CLS"
    assert said["modules_to_save"][-1] == "score"
    assert "classifier" not in said["modules_to_save"]
    plain = PeftModel.from_pretrained(Reference.from_pretrained(tiny_base, num_labels=1), tmp_path)
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    with torch.no_grad():
        ours = model.eval()(**batch("left")).logits
        base = model.get_base_model()
        assert (
            ours - as_reward_model(load_model(tiny_base, torch.float32), 5)(**batch("left")).logits
        ).abs().max() > 0.1
        assert torch.equal(base(**batch("left")).logits, ours)
        for theirs in (plain, auto):
            torch.testing.assert_close(theirs.eval()(**batch("left")).logits, ours, rtol=0, atol=1e-5)


def test_a_reward_model_has_no_head_to_save(tiny_base):
    with pytest.raises(UserError, match="a reward model has no lm_head"):
        adapted(tiny_base, Adapter(modules_to_save=["lm_head"]))
