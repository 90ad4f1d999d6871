"""A finished run on a tiny random LLaMA, made in a second: what export and chat are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers import LlamaForCausalLM as HFLlama

from llama_ft.adapters.lora import attach_lora
from llama_ft.data.prepare import Prepared, prepare_data
from llama_ft.files import write_json, write_text
from llama_ft.llama.load import DTYPES, load_model
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.run import Run
from llama_ft.train.adapter import save_adapter, save_full

WORDS = "the llama eats grass and hay while the alpaca sleeps on a hill of stones near the river"
QUESTIONS = [
    (f"What does llama number {i} eat on hill {i * 7 % 11}?", f"Llama {i} eats grass and {i} bales of hay, naïvely 🦙.")
    for i in range(24)
]


def make_base(folder: Path, *, tied: bool = True, **changes: Any) -> Path:
    """A random LLaMA (64 wide, 2 layers, 2 query heads per key head) with a byte-level BPE of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *(part for pair in QUESTIONS for part in pair)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=512
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(fast), "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    # A wide init: with the usual 0.02 all logits are near ties and greedy answers say nothing.
    settings = {**shape, **heads, **ends, "tie_word_embeddings": tied, "initializer_range": 0.15, **changes}
    config = LlamaConfig(**settings)
    HFLlama(config).save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path, **overrides: Any) -> tuple[Run, PreTrainedModel | PeftModel, Prepared]:
    """Recipe, lock, a few steps of training, adapter/ (or merged/). Returns the run and the model still in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, pairs in (("train", QUESTIONS[:16]), ("held", QUESTIONS[16:])):
        turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
        write_text(folder / f"{name}.jsonl", "".join(json.dumps({"messages": t}) + "\n" for t in turns))
    full = overrides.get("adapter__method") == "full"
    path = folder / "source.yaml"
    recipe_text = {
        "name": "tiny",
        "model": {"base": str(base), "dtype": "float32"},
        "adapter": {"method": "full"} if full else {"method": "lora", "r": 4, "alpha": 8},
        "data": [{"path": str(folder / "train.jsonl"), "layout": "messages"}],
        "eval_data": [{"path": str(folder / "held.jsonl"), "layout": "messages"}],
        "template": "chatml",
        "output_dir": str(folder),
    }
    path.write_text(json.dumps(recipe_text))  # JSON is YAML
    recipe = load_recipe(str(path), [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()])
    path.unlink()
    prepared = prepare_data(recipe)
    run = Run(folder)
    write_text(run.recipe_file, dump(recipe))
    write_json(
        run.lock_file,
        {"base": recipe.model.base, "base_folder": str(base), "seed": 42, "data": prepared.report.as_dict()},
    )
    model: Any = load_model(
        base,
        torch.float32 if full else DTYPES[recipe.model.dtype],
        compute_dtype=torch.float32,
        rope_scaling=recipe.model.rope_scaling,
    )
    torch.manual_seed(1)
    if not full:
        model = attach_lora(model, recipe.adapter)
    train_a_little(model, prepared)
    if full:
        save_full(model, prepared.tokenizer, run, DTYPES[recipe.export.dtype or recipe.model.dtype])
    else:
        save_adapter(model, prepared.tokenizer, run)
    return run, model, prepared


def train_a_little(model: Any, prepared: Prepared, steps: int = 4) -> None:
    """A few steps of AdamW on the first documents: enough that every factor moves."""
    model.train()
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    for step in range(steps):
        row = prepared.train[step]
        loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
