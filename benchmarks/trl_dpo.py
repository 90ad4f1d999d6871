"""One run of TRL's DPOTrainer over pairs that are ids already: the peer of `benchmarks.preference`.

    python -m benchmarks.trl_dpo SPEC.json

SPEC: {"model" (a folder) or "config" (a LLaMA's, for random weights), "tokenizer", "pairs" (jsonl of prompt, chosen and
rejected, ids, in training order), "adapter" (the first weights, or null), "variant", "steps", "batch", "micro_batch",
"learning_rate", "beta", "seed", "r", "alpha", "threads", "device", "out"}. Writes {"steps": [{"seconds", "labelled",
"tokens", "computed" (with padding), "rows", "loss", "grad_norm"}], and on a GPU "allocated", "reserved" (bytes)} to
`out`. Nothing of llama_ft is imported: it is what users of TRL run.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

TUNED: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False}
VARIANTS: dict[str, dict[str, Any]] = {
    # DPOConfig as it stands: float32 weights under bf16 autocast, gradient checkpointing, eight pairs a pass, shuffled.
    "trl-default": {"micro_batch": 8, "shuffled": True},
    # bf16 weights, no checkpointing, batches of like length: what a careful user changes first.
    "trl-tuned": {"dtype": "bfloat16", **TUNED},
    # The same in float32, the faster type on CPUs whose bfloat16 is slow; the reference for losses.
    "trl-tuned-fp32": {"dtype": "float32", **TUNED},
    # What fits a GPU with long pairs.
    "trl-tuned-checkpointed": {"dtype": "bfloat16", **TUNED, "gradient_checkpointing": True},
}
COLUMNS = ("prompt", "chosen", "rejected")


def digest(ids: Sequence[int], start: int) -> str:
    """Names a document: its ids, and the place where its answer starts."""
    return hashlib.sha256(json.dumps([list(ids), start]).encode()).hexdigest()[:16]


class Clock(TrainerCallback):
    """What was in every optimizer step, how long it took, and what the trainer said of it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.begun = 0.0
        self.now: dict[str, Any] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.now = {"labelled": 0, "tokens": 0, "computed": 0, "rows": []}
        self.begun = time.perf_counter()

    def add(self, inputs: dict[str, torch.Tensor]) -> None:
        """One micro-batch, as the trainer is about to read it."""
        real, answers = inputs["attention_mask"].bool(), inputs["completion_mask"]
        self.now["tokens"] += int(real.sum())
        self.now["labelled"] += int(answers.sum())
        self.now["computed"] += real.numel()
        for ids, kept, answer in zip(inputs["input_ids"], real, answers, strict=True):
            own = ids[kept].tolist()
            self.now["rows"].append(digest(own, len(own) - int(answer.sum())))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.steps.append({"seconds": time.perf_counter() - self.begun, **self.now})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.steps[-1] |= {name: float(logs[name]) for name in ("loss", "grad_norm")}


class CountingTrainer(DPOTrainer):
    """DPOTrainer on ids, which tells the clock what was in each micro-batch; everything else is TRL's."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any):
        self.clock = clock
        super().__init__(*args, callbacks=[clock], **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.clock.add(inputs)
        return super().training_step(model, inputs, *args, **kwargs)


def open_model(spec: dict[str, Any], dtype: torch.dtype) -> Any:
    """The folder's weights, or random ones of a shape."""
    if spec.get("config") is None:
        return AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).to(spec["device"])
    torch.set_default_dtype(dtype)
    try:
        with torch.device(spec["device"]):
            return LlamaForCausalLM(LlamaConfig(**spec["config"]))
    finally:
        torch.set_default_dtype(torch.float32)


def in_order(pairs: list[dict[str, Any]], spec: dict[str, Any], *, shuffled: bool) -> Dataset:
    """The pairs as TRL's collator reads them; shuffled: those behind the first step, which stays what it is."""
    if shuffled:
        rest = pairs[spec["batch"] :]
        random.Random(spec["seed"]).shuffle(rest)
        pairs = [*pairs[: spec["batch"]], *rest]
    return Dataset.from_list([{f"{name}_ids": pair[name] for name in COLUMNS} for pair in pairs])


def make_trainer(spec: dict[str, Any], clock: Clock) -> CountingTrainer:
    """The trainer of a variant, its adapter set to the first weights that the spec names."""
    changes = dict(VARIANTS[spec["variant"]])
    dtype = getattr(torch, changes.pop("dtype", "float32"))
    shuffled = changes.pop("shuffled", False)
    micro_batch = min(changes.pop("micro_batch", spec["micro_batch"]), spec["batch"])
    pairs = [json.loads(line) for line in Path(spec["pairs"]).read_text().splitlines()]
    arguments = DPOConfig(
        output_dir=str(Path(spec["out"]).with_suffix("")),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=spec["batch"] // micro_batch,
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="cosine",
        beta=spec["beta"],
        max_grad_norm=1.0,
        seed=spec["seed"],
        use_cpu=spec["device"] == "cpu",
        dataloader_pin_memory=spec["device"] != "cpu",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        train_sampling_strategy="sequential",
        **changes,
    )
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=spec["r"], lora_alpha=spec["alpha"], lora_dropout=0.0, target_modules="all-linear"
    )
    trainer = CountingTrainer(
        model=open_model(spec, dtype),
        args=arguments,
        train_dataset=in_order(pairs, spec, shuffled=shuffled),
        processing_class=AutoTokenizer.from_pretrained(spec["tokenizer"]),
        peft_config=adapter,
        clock=clock,
    )
    if spec["adapter"] is not None:
        found = set_peft_model_state_dict(trainer.model, load_file(spec["adapter"]))
        lacking = [name for name in found.missing_keys if "lora_" in name]
        assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
    return trainer


def main(spec: dict[str, Any]) -> None:
    """Trains `spec["steps"]` steps and writes what was measured."""
    torch.set_num_threads(spec["threads"])
    clock = Clock()
    make_trainer(spec, clock).train()
    found: dict[str, Any] = {"steps": clock.steps}
    if spec["device"] != "cpu":
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    Path(spec["out"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
