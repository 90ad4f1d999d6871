"""TRL's SFTTrainer: as its configuration stands, tuned, and tuned with Liger's kernels.

    python -m benchmarks.peers.trl SPEC.json

TRL 1.16.0, transformers 5.23.0, peft 0.21.2; for qlora bitsandbytes 0.50.2. The contender's name picks one of
`VARIANTS`. `SFTTrainer` divides by the labelled tokens of the whole step, so its tokens weigh equally.

Packed rows: `padding_free` with a column `seq_lengths`, from which TRL's collator makes position_ids that start anew
with every document, and no attention mask. transformers then makes sdpa a mask of blocks, but only without a cache;
this TRL sets `use_cache=False` itself in `compute_loss`. For qlora TRL casts the adapter to bfloat16, whatever the
spec's type; the adapter of a lora stays float32, as PEFT makes it (why not bfloat16: see hf.py).
On a CPU TRL's head scores every position, labelled or not, and its entropy too: tuned or not, it offers nothing else.
"""

from __future__ import annotations

import random
from typing import Any

from benchmarks.peers.common import Clock, Spec, main, timed, weights_of
from benchmarks.peers.hf import arguments, open_model, stop_after, with_adapter

TUNED: dict[str, Any] = {"gradient_checkpointing": False, "bf16": False}
VARIANTS: dict[str, dict[str, Any]] = {
    # SFTConfig as it stands: float32 weights under bf16 autocast, gradient checkpointing, rows in random order.
    "trl-default": {},
    # Weights in the spec's type, no checkpointing, the order as given (batches of like length).
    "trl-tuned": TUNED,
    # The same with Liger's norm, rotary and SwiGLU kernels; its fused loss is what TRL 1.16 forbids.
    "liger": {**TUNED, "use_liger_kernel": True},
}


def shuffled(rows: list[Any], spec: Spec) -> list[Any]:
    """The rows behind the first step in random order, as TRL's own sampler takes them; the first step stays."""
    first = spec.micro_batch * spec.accumulation
    rest = rows[first:]
    random.Random(spec.seed).shuffle(rest)
    return [*rows[:first], *rest]


def as_dataset(rows: list[list[dict[str, list[int]]]]) -> Any:
    """What TRL's preparation would have made of the rows; seq_lengths is what its packing writes."""
    from datasets import Dataset

    def column(name: str) -> list[list[int]]:
        return [[i for document in row for i in document[name]] for row in rows]

    lengths = [[len(document["input_ids"]) for document in row] for row in rows]
    return Dataset.from_dict({"input_ids": column("input_ids"), "labels": column("labels"), "seq_lengths": lengths})


def run(spec: Spec, clock: Clock) -> None:
    """Trains `spec.steps` steps."""
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    default = spec.contender == "trl-default"
    if spec.contender == "liger" and spec.device == "cpu":
        raise SystemExit("Liger's kernels need a GPU; Triton says: 0 active drivers ([]). There should only be one.")
    rows = spec.rows()
    model = open_model(spec, torch.float32 if default else spec.torch_dtype)
    if spec.method != "full":
        model = with_adapter(model, spec)
    settings = arguments(spec) | {
        "max_length": None,
        "padding_free": spec.packed,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
    }
    if default:
        settings["per_device_train_batch_size"] = spec.micro_batch
        settings["gradient_accumulation_steps"] = spec.accumulation
    trainer = timed(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(**settings, **VARIANTS[spec.contender]),
        train_dataset=as_dataset(shuffled(rows, spec) if default else rows),
        processing_class=AutoTokenizer.from_pretrained(spec.model),
        callbacks=[stop_after(spec.steps)],
    )
    clock.about["weights"] = weights_of(trainer.model)
    trainer.train()


if __name__ == "__main__":
    main(run)
