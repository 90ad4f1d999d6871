"""Every method, optimizer and schedule learns from 200 real Alpaca rows, is exported and passes its proof.

On SmolLM2-135M cut to two layers; `python -m benchmarks.methods` does the same on the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from benchmarks.methods import METHODS, NEW_TOKENS, held_out, settings, write_tokenizer
from llama_ft import load_recipe, train_recipe
from llama_ft.errors import UserError
from llama_ft.recipe.run import Run

ROWS = "instruct/alpaca_5000.json"


@pytest.fixture(scope="session")
def grown_tokenizer(small_base, tmp_path_factory) -> Path:
    return write_tokenizer(small_base, tmp_path_factory.mktemp("grown"))


def overrides_for(base: Path, data: Path, folder: Path, *changes: str) -> list[str]:
    return [
        f"model.base={base}",
        f"data.0.path={data / ROWS}",
        "data.0.limit=200",
        "eval_data.holdout=0.1",
        "training.epochs=1",
        "training.global_batch=16",
        "training.learning_rate=2e-3",
        "training.eval_every=1000",
        f"output_dir={folder}",
        *changes,
    ]


def train(base: Path, data: Path, folder: Path, *changes: str) -> Run:
    return train_recipe(load_recipe("alpaca/smollm2-135m-lora", overrides_for(base, data, folder, *changes)))


TOGETHER = {
    "LoRA on attention, rsLoRA, LoRA+, linear, paged AdamW": [
        *["adapter.targets=attention", "adapter.rslora=true", "adapter.lora_plus=4", "training.schedule=linear"],
        "training.optimizer=paged_adamw",
    ],
    "DoRA by a regex, norms, NEFTune, WSD, Adafactor": [
        *["adapter.dora=true", r"adapter.targets=.*layers\.1\..*", "adapter.modules_to_save=[norms]"],
        *["training.neftune_alpha=5", "training.schedule=wsd", "training.optimizer=adafactor"],
    ],
    "QLoRA, dropout, 8-bit AdamW, constant": [
        *["adapter.method=qlora", "adapter.dropout=0.1", "training.optimizer=adamw_8bit", "training.schedule=constant"],
    ],
    "QLoRA with DoRA and plain scales, 8-bit paged AdamW, padded, checkpointed": [
        *["adapter.method=qlora", "adapter.dora=true", "adapter.double_quant=false", "training.micro_batch=4"],
        *["training.optimizer=paged_adamw_8bit", "sequence.packing=false", "training.gradient_checkpointing=true"],
    ],
    "8-bit LoRA, cosine to 10 %": ["adapter.method=qlora", "adapter.bits=8", "training.final_rate=0.1"],
    "full, frozen, Muon": ["adapter.method=full", "adapter.freeze=['layers.0']", "training.optimizer=muon"],
    "LoRA and embedding": ["adapter.modules_to_save=[embed_tokens]"],
}
"""Every method, optimizer and schedule at least once; one at a time they are marked slow."""


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow) if name == "LoRA and embedding" else name for name in TOGETHER],
)
def test_they_learn_together_and_their_export_is_proven(small_base, real_data, tmp_path, method):
    learns(train(small_base, real_data, tmp_path / "run", *TOGETHER[method]))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_learns_and_its_export_is_proven(small_base, real_data, grown_tokenizer, tmp_path, method):
    # Two layers of thirty want larger steps than the whole model.
    changes = [change for change in settings(method, grown_tokenizer) if "learning_rate" not in change]
    if "adapter.method=full" in changes:
        changes.append("training.learning_rate=3e-4")
    learns(train(small_base, real_data, tmp_path / "run", *changes))


def learns(run: Run) -> None:
    losses = held_out(run.path)
    assert losses[-1] < losses[0] - 0.02, f"nothing was learnt: {losses}"
    assert json.loads(run.proof_file.read_text())["ok"] is True


def test_qlora_on_the_whole_model_merges_to_what_it_answers(smollm2, real_data, tmp_path):
    """SmolLM2-135M in NF4: merged, it answers as base and adapter did, and no nll moves by 1e-3."""
    changes = [
        "adapter.method=qlora",
        "training.max_steps=3",
        "data.0.limit=48",
        "eval_data=null",
        "export.dtype=float32",
    ]
    run = train(smollm2, real_data, tmp_path / "run", *changes)
    proof = json.loads(run.proof_file.read_text())
    assert proof["ok"] and all(answer["equal"] for answer in proof["greedy"])
    assert abs(proof["measured"]["nll_trained"] - proof["measured"]["nll_merged"]) < 1e-3
    assert proof["measured"]["max_delta_logit"] < 1e-3
    assert proof["adapter"]["merged_into"] == "the base out of NF4 with double quantisation"


@pytest.mark.parametrize(
    ("method", "tied"),
    [
        ("lora", True),
        ("qlora", False),
        pytest.param("qlora", True, marks=pytest.mark.slow),
        pytest.param("lora", False, marks=pytest.mark.slow),
        pytest.param("full", True, marks=pytest.mark.slow),
    ],
)
def test_new_tokens_are_trained_saved_merged_and_served(small_base, real_data, grown_tokenizer, tmp_path, method, tied):
    base = small_base if tied else untied(small_base, tmp_path / "untied")
    rows = [{"instruction": f"Say {token}.", "input": "", "output": f"{token} {token}"} for token in NEW_TOKENS] * 60
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = [
        f"model.tokenizer={grown_tokenizer}",
        f"adapter.method={method}",
        f"data.0.path={tmp_path / 'rows.json'}",
    ]
    changes += ["data.0.limit=null", "mixture.dedupe=none", "eval_data=null"]
    run = train(base, real_data, tmp_path / "run", *changes)
    merged = LlamaForCausalLM.from_pretrained(run.merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    ids = tokenizer.convert_tokens_to_ids([*NEW_TOKENS])
    assert ids == [49_152, 49_153] == list(range(len(tokenizer)))[-2:]
    assert merged.get_input_embeddings().weight.shape[0] == merged.get_output_embeddings().weight.shape[0] == 49_154
    assert merged.config.tie_word_embeddings is tied
    old = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32).get_input_embeddings().weight
    mean = old.mean(0)
    assert all((row - mean).norm() > 1e-3 for row in merged.get_input_embeddings().weight[ids]), (
        "new rows were not trained"
    )
    if method != "full":
        plain = AutoPeftModelForCausalLM.from_pretrained(run.adapter, dtype=torch.float32)
        assert plain.get_base_model().get_input_embeddings().weight.shape[0] == 49_154


def untied(base: Path, folder: Path) -> Path:
    """The same model with a head of its own."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def test_frozen_weights_stay_and_the_others_move(small_base, real_data, tmp_path):
    changes = ["adapter.method=full", r"adapter.freeze=['embed_tokens', 'layers\.0\.']", "training.max_steps=3"]
    run = train(small_base, real_data, tmp_path / "run", *changes)
    before, after = load_file(small_base / "model.safetensors"), load_file(run.merged / "model.safetensors")
    for name in before:
        frozen = "embed_tokens" in name or "layers.0." in name
        assert torch.equal(before[name], after[name]) == frozen, name


def test_a_pattern_that_freezes_nothing_or_everything_is_refused(small_base, real_data, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(small_base, real_data, folder, "adapter.method=full", "adapter.freeze=[embed_tokns, '.']")
    assert "no weight like 'embed_tokns'" in str(caught.value)
    assert "did you mean 'embed_tokens'" in str(caught.value)
    with pytest.raises(UserError, match="every weight is frozen"):
        train(small_base, real_data, folder, "adapter.method=full", "adapter.freeze=['.']")


def test_a_regex_beyond_the_base_is_refused(small_base, real_data, tmp_path):
    with pytest.raises(UserError, match="matches no projection of this base's 2 layers"):
        train(small_base, real_data, tmp_path / "run", r"adapter.targets=.*layers\.7\..*")


def test_noise_on_the_embeddings_is_a_documents_own(small_base):
    """NEFTune's size goes by the document's length, and does nothing in an evaluation."""
    from llama_ft.llama.noise import add_noise

    torch.manual_seed(0)
    tokens = torch.zeros(50, 64)
    noisy = add_noise(tokens, [0, 10, 50], 5.0)
    for part, length in ((noisy[:10], 10), (noisy[10:], 40)):
        reach = 5.0 / (length * 64) ** 0.5
        assert part.abs().max() <= reach
        assert part.abs().max() > 0.95 * reach
        assert abs(part.mean()) < 0.1 * reach
