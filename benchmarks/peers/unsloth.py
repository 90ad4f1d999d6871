"""Unsloth on a GPU: its model, its kernels and its trainer.

    python -m benchmarks.peers.unsloth SPEC.json

Unsloth 2026.10.9 with TRL 1.15.0 and transformers 5.17.0, the newest that it allows. Contenders: `unsloth` without
checkpointing, `unsloth-checkpointed` with its own, which keeps activations in main memory. Everything else is left as
Unsloth chooses it: batches without padding (its default for one document a row; for packed rows `packing`, with TRL's
column `seq_lengths` to say where documents end), its fused loss, compiled parts, its attention over documents. Set by
us: AdamW in 32 bits for its 8-bit default, for all contenders have the same; no requests to a hub, no statistics.

On a CPU Unsloth has no kernels of its own and says that it trains with stock transformers, PEFT and TRL: the
contender `unsloth-cpu` runs that, to try this harness; `unsloth` refuses there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Clock, Spec, main, timed, weights_of
from benchmarks.peers.hf import LINEAR, arguments, stop_after
from benchmarks.peers.trl import as_dataset

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_DISABLE_AUTO_UPDATES": "1",
    # What it generates: beside nothing that is ours.
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / f"unsloth-compiled-{os.getpid()}"),
}


def library() -> Any:
    """Unsloth, which has to be imported before the libraries that it changes."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import unsloth

    return unsloth


def open_model(spec: Spec, checkpointing: bool | str) -> tuple[Any, Any]:
    """The folder's weights with the adapter at the spec's first weights, and the tokenizer."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    made = library().FastLanguageModel
    model, tokenizer = made.from_pretrained(
        model_name=spec.model,
        max_seq_length=spec.max_length,
        dtype=spec.torch_dtype,
        load_in_4bit=spec.method == "qlora",
        full_finetuning=spec.method == "full",
        use_gradient_checkpointing=checkpointing,
        local_files_only=True,
    )
    if spec.method == "full":
        return model, tokenizer
    model = made.get_peft_model(
        model,
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=0.0,
        target_modules=LINEAR,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=spec.seed,
    )
    if spec.adapter is not None:
        found: Any = set_peft_model_state_dict(model, load_file(spec.adapter))
        lacking = [name for name in found.missing_keys if "lora_" in name]
        assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
    return model, tokenizer


def run(spec: Spec, clock: Clock) -> None:
    """Trains `spec.steps` steps."""
    if spec.device != "cuda" and spec.contender != "unsloth-cpu":
        raise SystemExit(
            'Unsloth has no kernels for a CPU: it says "no GPU found, training on CPU" and takes stock transformers, '
            "PEFT and TRL, which are rows of their own"
        )
    checkpointing: bool | str = "unsloth" if spec.contender.endswith("-checkpointed") else False
    model, tokenizer = open_model(spec, checkpointing)
    from trl import SFTConfig, SFTTrainer

    settings = arguments(spec) | {
        "optim": "adamw_torch_fused",
        "bf16": spec.dtype == "bfloat16",
        "max_length": spec.max_length,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
    }
    if not checkpointing:
        settings["gradient_checkpointing"] = False
    if spec.packed:
        settings |= {"packing": True}
    dataset: Any = as_dataset(spec.rows())
    if not spec.packed:
        dataset = dataset.remove_columns("seq_lengths")
        # No document is longer; unless it is told so, Unsloth pads batches of what has been tokenised before.
        dataset._unsloth_truncated_to = spec.max_length
    trainer = timed(SFTTrainer, clock)(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[stop_after(spec.steps)],
    )
    clock.about["weights"] = weights_of(trainer.model)
    clock.about["padding_free"] = bool(getattr(trainer.args, "padding_free", False))
    if spec.packed and not clock.about["padding_free"]:
        raise SystemExit("Unsloth has switched padding_free off: documents that share a row would see one another")
    trainer.train()


if __name__ == "__main__":
    main(run)
