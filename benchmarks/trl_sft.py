"""One TRL run over documents that are ids and labels already: the peer of `benchmarks.train`.

    python -m benchmarks.trl_sft SPEC.json

SPEC: {"model", "documents" (jsonl of input_ids and labels, in training order), "variant", "steps", "micro_batch",
"accumulation", "learning_rate", "seed", "method", "r", "alpha", "threads", "out"}. Writes {"steps": [{"seconds",
"tokens", "labelled", "loss"}], "start_up_seconds"} to `out`. Nothing of llama_ft is imported: it is what users of TRL
run.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

VARIANTS: dict[str, dict[str, Any]] = {
    # What SFTConfig does when nobody touches it: float32 weights under bf16 autocast, gradient checkpointing.
    "trl-default": {},
    # bf16 weights, no checkpointing, batches of like length: what a careful user changes first.
    "trl-tuned": {"dtype": "bfloat16", "gradient_checkpointing": False, "bf16": False, "grouped": True},
    # The same in float32, the faster type on CPUs whose bfloat16 is slow.
    "trl-tuned-fp32": {"dtype": "float32", "gradient_checkpointing": False, "bf16": False, "grouped": True},
    # The reference for losses: float32, same order of documents, nothing clever.
    "trl-fp32": {"dtype": "float32", "gradient_checkpointing": False, "bf16": False},
}


class Clock(TrainerCallback):
    """Seconds, tokens and labelled tokens of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.counts = [0, 0]
        self.begun = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.begun
        self.steps.append({"seconds": seconds, "tokens": self.counts[0], "labelled": self.counts[1]})
        self.counts = [0, 0]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.steps[-1]["loss"] = logs["loss"]


class CountingTrainer(SFTTrainer):
    """SFTTrainer that tells the clock what was in each micro-batch; everything else is TRL's."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any):
        self.clock = clock
        super().__init__(*args, callbacks=[clock], **kwargs)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.clock.counts[0] += int(inputs["attention_mask"].sum())
        self.clock.counts[1] += int((inputs["labels"][:, 1:] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)


def main(spec: dict[str, Any]) -> None:
    """Trains `spec["steps"]` steps and writes what was measured."""
    torch.set_num_threads(spec["threads"])
    changes = dict(VARIANTS[spec["variant"]])
    dtype = changes.pop("dtype", "float32")
    grouped = changes.pop("grouped", False)
    rows = [json.loads(line) for line in Path(spec["documents"]).read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=getattr(torch, dtype))
    clock = Clock()
    arguments = SFTConfig(
        output_dir=str(Path(spec["out"]).with_suffix("")),
        per_device_train_batch_size=spec["micro_batch"],
        gradient_accumulation_steps=spec["accumulation"],
        max_steps=spec["steps"],
        learning_rate=spec["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=spec["warmup"],
        max_grad_norm=1.0,
        seed=spec["seed"],
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length" if grouped else "sequential",
        **changes,
    )
    settings = {"r": spec["r"], "lora_alpha": spec["alpha"], "lora_dropout": 0.0, "target_modules": "all-linear"}
    adapter = LoraConfig(task_type="CAUSAL_LM", **settings) if spec["method"] == "lora" else None
    trainer = CountingTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["labels"]} for r in rows]),
        processing_class=tokenizer,
        peft_config=adapter,
        clock=clock,
    )
    start_up = time.perf_counter() - STARTED
    trainer.train()
    Path(spec["out"]).write_text(json.dumps({"start_up_seconds": start_up, "steps": clock.steps}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
