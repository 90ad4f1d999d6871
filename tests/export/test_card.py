"""The model card: what it says, and that it says nothing about this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llama_ft.export.card import write_card
from llama_ft.export.run import export_run
from llama_ft.files import write_json, write_text
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.run import Run

PROOF = {
    "ok": True,
    "faults": [],
    "dtype": "bfloat16",
    "tolerance": {"max_delta": None, "mean_kl": 1e-3, "top1": 0.99, "greedy": "near ties"},
    "measured": {
        "documents": 8,
        "positions": 640,
        "max_delta_logit": 0.31,
        "mean_kl": 6e-5,
        "top1_agreement": 0.9969,
        "labelled_tokens": 300,
        "nll_trained": 1.9,
        "nll_merged": 1.901,
    },
    "greedy": [{"equal": True}, {"equal": False}],
    "opened_with": "transformers 5 LlamaForCausalLM",
}


@pytest.fixture
def quickstart(tmp_path) -> Run:
    """What the quickstart leaves, without having run it."""
    run = Run(tmp_path / "runs" / "quickstart")
    write_text(run.recipe_file, dump(load_recipe("quickstart", ["training.global_batch=16"])))
    counts = {"rows": 422, "kept": 400, "held_out": 0, "dropped": {"longer than max_length": 22}}
    sources = [
        {"label": str(tmp_path / "train.jsonl"), "role": "train", **counts},
        {"label": str(tmp_path / "held.jsonl"), "role": "eval", "rows": 40, "kept": 40, "held_out": 0, "dropped": {}},
    ]
    write_json(
        run.lock_file,
        {
            "base_folder": str(tmp_path / "base"),
            "compute_dtype": "float32",
            "micro_batch": 8,
            "accumulation": 2,
            "world_size": 1,
            "versions": {"torch": "2.13.0", "peft": "0.21.2"},
            "data": {"sources": sources},
        },
    )
    lines = [
        {"step": 0, "eval_loss": 2.9},
        {"step": 1, "loss": 3.1},
        {"step": 80, "loss": 1.2},
        {"step": 80, "eval_loss": 1.75},
    ]
    write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 81, "lo')
    samples = [
        {
            "question": "What is\na | pipe?",
            "reference": "R1",
            "before": "before one",
            "after": "after <b>one</b>",
        }
    ]
    write_json(run.samples_file, samples)
    write_json(run.proof_file, PROOF)
    (run.path / "loss.png").write_bytes(b"png")
    return run


def front_of(text: str) -> dict:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter(quickstart):
    front = front_of(write_card(quickstart).read_text())
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
        "license": "apache-2.0",
        "tags": ["llama", "llama_ft", "sft", "lora"],
    }


def test_everything_that_was_measured_is_in_it(quickstart):
    text = write_card(quickstart).read_text()
    for line in (
        "| training loss | 3.1000 (step 1) | 1.2000 (step 80) |",
        "| held-out loss | 2.9000 (step 0) | 1.7500 (step 80) |",
        "| What is a \\| pipe? | before one | after &lt;b>one&lt;/b> | R1 |",
        "| max \\|Δ logit\\| | 0.31 |  |",
        "| mean KL (nats) | 6e-05 | ≤ 0.001 |",
        "| top-1 agreement | 99.69% | ≥ 99% |",
        "| equal greedy answers | 1 of 2 | all, but for near ties |",
        "| Apache-2.0 | train | 422 | 400 | 0 | 22 |",
        "16 documents = 8 × 2 × 1 processes",
        "torch 2.13.0, peft 0.21.2",
        "![losses](loss.png)",
        "llama-ft chat runs/quickstart",
        "(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) (Apache-2.0)",
    ):
        assert line in text, line


def test_a_refused_export_is_said_first(quickstart):
    write_json(quickstart.proof_file, PROOF | {"ok": False, "faults": ["mean KL is 3 nats, allowed 0.001"]})
    text = write_card(quickstart).read_text()
    assert "**The merged model was refused and is not part of this run** (mean KL is 3 nats, allowed 0.001)" in text


def test_a_bare_run_gives_a_card_too(quickstart):
    for file in (quickstart.lock_file, quickstart.metrics_file, quickstart.proof_file, quickstart.samples_file):
        file.unlink()
    text = write_card(quickstart).read_text()
    assert "## Training" in text
    assert "## Results" not in text
    assert "## Proof" not in text


def test_no_place_of_this_machine(run, tmp_path):
    """A run on a local base and local rows: neither their folders nor the run's are named."""
    export_run(run)
    text = run.card_file.read_text()
    assert "base_model" not in front_of(text)
    assert front_of(text)["license"] == "other"
    assert "A LLaMA from a local folder" in text
    assert "train.jsonl" in text
    for place in (str(tmp_path), str(Path.home()), "/tmp/"):
        assert place not in text


def test_a_hub_base_of_unknown_licence(tmp_path):
    run = Run(tmp_path / "run")
    recipe = load_recipe("alpaca/llama-7b-full", ["model.base=someone/llama-7b"], look_up=False)
    write_text(run.recipe_file, dump(recipe))
    text = write_card(run).read_text()
    front = front_of(text)
    assert front["base_model"] == "someone/llama-7b"
    assert front["license"] == "other"
    assert front["datasets"] == ["tatsu-lab/alpaca"]
    assert "The base model's own licence and terms apply" in text
    assert "It follows Stanford Alpaca 7B (https://github.com/tatsu-lab/stanford_alpaca)" in text
    assert "- documents are laid end to end without padding" in text
