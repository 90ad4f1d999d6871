"""LLaMA-Factory's supervised fine-tuning, by its own `run_exp`.

    python -m benchmarks.peers.llamafactory SPEC.json

llamafactory 0.9.5 on transformers 5.6.0, peft 0.18.1 (it refuses transformers > 5.6.0); for qlora bitsandbytes 0.50.2.
It reads ids and labels from `tokenized_path`, in order with `disable_shuffling`; the adapter's first weights from
`adapter_name_or_path`. Its loader takes the weights' type from the model's config alone, so the harness gives it a
folder whose config names the spec's type and whose other files are links. Its collator pads to multiples of 8.

Tuning: weights in the spec's type, no gradient checkpointing, sdpa. For bfloat16 also `bf16: true`, which is autocast
over bfloat16 weights: packed rows ran at 98 tokens/s with it and 91 without, padded ones took 3.7 and 4.0 GiB (one run
of three steps each, one thread). The trained weights it makes float32; `pure_bf16`, which would not, it refuses without
a GPU ("This device does not support `pure_bf16`").

Packed rows are its `neat_packing`: numbers of documents in the attention mask, of which its collator makes a mask of
blocks [rows, 1, length, length] for sdpa. The trainer divides by the labelled tokens of the whole step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.peers.common import MASKED, Clock, Spec, main, timed, weights_of
from benchmarks.peers.hf import LINEAR, arguments, stop_after


class MaskClock(Clock):
    """The clock for micro-batches whose mask has a row and a column for every position."""

    def saw(self, ids: Any, labels: Any, real: Any = None, position_ids: Any = None) -> None:
        if real is not None and real.dim() == 4:
            # Positions see themselves (0 is added to their score), unless they are padding.
            real = real[:, 0].diagonal(dim1=-2, dim2=-1) == 0
        super().saw(ids, labels, real, position_ids)


def model_folder(spec: Spec, folder: Path) -> Path:
    """The model's files by links, and a config that names the spec's type."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in Path(spec.model).iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"dtype": spec.dtype}), encoding="utf-8")
    return folder


def adapter_folder(spec: Spec, folder: Path) -> Path:
    """The adapter's first weights as PEFT saves an adapter."""
    from peft import LoraConfig

    config = LoraConfig(task_type="CAUSAL_LM", r=spec.r, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=LINEAR)
    config.base_model_name_or_path = spec.model
    config.save_pretrained(str(folder))
    assert spec.adapter is not None
    (folder / "adapter_model.safetensors").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").symlink_to(Path(spec.adapter).resolve())
    return folder


def packed_rows(spec: Spec, pad: int) -> Iterator[dict[str, list[int]]]:
    """Rows as its packing writes them, but padded to a multiple of 8 instead of to one more than the length that it
    cuts at: its collator would pad that on, and position_ids not with it."""
    for row, joined in zip(spec.rows(), spec.joined(), strict=True):
        rest = -len(joined["input_ids"]) % 8
        mask = [n for n, document in enumerate(row, start=1) for _ in document["input_ids"]]
        yield {
            "input_ids": [*joined["input_ids"], *[pad] * rest],
            "labels": [*joined["labels"], *[MASKED] * rest],
            "position_ids": [*joined["position_ids"], *[0] * rest],
            "attention_mask": [*mask, *[0] * rest],
        }


def write_data(spec: Spec, folder: Path) -> Path:
    """A folder of `datasets` with the split "train"."""
    from datasets import Dataset, DatasetDict
    from transformers import AutoTokenizer

    if spec.packed:
        tokenizer = AutoTokenizer.from_pretrained(spec.model)
        rows = list(packed_rows(spec, tokenizer.pad_token_id or 0))
    else:
        rows = [
            {
                "input_ids": document["input_ids"],
                "labels": document["labels"],
                "attention_mask": [1] * len(document["input_ids"]),
            }
            for [document] in spec.rows()
        ]
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(folder))
    return folder


def settings(spec: Spec) -> dict[str, Any]:
    """What a user's yaml would say."""
    work = Path(spec.out).with_suffix("")
    found: dict[str, Any] = arguments(spec) | {
        "overwrite_output_dir": True,
        "report_to": "none",
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(model_folder(spec, work / "model")),
        "dataset": "given",
        "tokenized_path": str(write_data(spec, work / "data")),
        "template": "empty",
        "cutoff_len": spec.max_length,
        "disable_shuffling": True,
        "flash_attn": "sdpa",
        "use_kv_cache": False,
        "disable_gradient_checkpointing": True,
        "bf16": spec.dtype == "bfloat16",
        "finetuning_type": "full" if spec.method == "full" else "lora",
        "neat_packing": spec.packed,
    }
    if spec.method != "full":
        found |= {"lora_rank": spec.r, "lora_alpha": spec.alpha, "lora_dropout": 0.0, "lora_target": ",".join(LINEAR)}
        if spec.adapter is not None:
            found["adapter_name_or_path"] = str(adapter_folder(spec, work / "adapter"))
    if spec.method == "qlora":
        found |= {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}
    return found


def hide_broken() -> None:
    """The wheels of torchvision and torchaudio that it requires are built for CUDA and do not load beside a torch for
    CPUs, and then nothing imports. Text needs neither: transformers does without the one, and in place of the other,
    which LLaMA-Factory imports for its audio models, stands an empty module."""
    for name, replacement in (("torchvision", None), ("torchaudio", ModuleType("torchaudio"))):
        try:
            __import__(name)
        except (RuntimeError, OSError, ImportError):
            for module in [module for module in sys.modules if module.split(".")[0] == name]:
                del sys.modules[module]
            if replacement is not None:
                replacement.__spec__ = ModuleSpec(name, None)
            sys.modules[name] = replacement  # type: ignore[assignment]


def run(spec: Spec, clock: Clock) -> None:
    """Trains `spec.steps` steps."""
    hide_broken()
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    clock.__class__ = MaskClock
    trainer = timed(workflow.CustomSeq2SeqTrainer, clock)

    def tell(*args: Any, **kwargs: Any) -> Any:
        clock.about["weights"] = weights_of(kwargs["model"])
        return trainer(*args, **kwargs)

    workflow.CustomSeq2SeqTrainer = tell
    run_exp(settings(spec), [stop_after(spec.steps)])


if __name__ == "__main__":
    main(run)
