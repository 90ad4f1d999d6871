"""One export under way: what it is made from, and the model that was trained, whole in memory, to be asked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from llama_ft.adapters.lora_file import LoraFile
from llama_ft.data.prepare import Prepared
from llama_ft.errors import UserError
from llama_ft.export.folder import stop_ids
from llama_ft.export.proof import pick_device
from llama_ft.export.streamed import too_large
from llama_ft.export.trained import check_live, check_quantised, full_model, newest_weights, read_back
from llama_ft.llama.checkpoints.shards import SHARD_BYTES, stored_tensors
from llama_ft.llama.load import DTYPES
from llama_ft.recipe.run import Run


@dataclass(frozen=True)
class Options:
    """What a caller may ask for: see :func:`llama_ft.export.run.export_run`."""

    dtype: str | None = None
    shard_bytes: int = SHARD_BYTES
    low_memory: bool | None = None


@dataclass(frozen=True)
class Job:
    """What is exported. `lora` is None for a fully tuned model; `live` is the model as training left it, or None."""

    run: Run
    base: Path
    lora: LoraFile | None
    prepared: Prepared
    dtype: str
    live: PreTrainedModel | PeftModel | None
    options: Options = field(default_factory=Options)

    @cached_property
    def streamed(self) -> bool:
        """Whether the proof reads both models from disk as it asks them: where asked for, or where memory is short."""
        if self.live is not None and self.lora is None:
            return False  # it is in memory as it is
        if self.options.low_memory is not None:
            return self.options.low_memory
        return too_large(stored_tensors(newest_weights(self.run) if self.lora is None else self.base))

    @property
    def reward(self) -> bool:
        """Whether a reward model is exported, which scores answers and writes none."""
        return self.run.recipe.training.objective == "reward"

    @property
    def device(self) -> torch.device:
        """Where a quantised base is made again: where it was trained if that is at hand."""
        if self.live is not None:
            return self.live.device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def compute(self) -> torch.dtype:
        """The type that training computed in."""
        return DTYPES[self.run.lock.get("compute_dtype", "float32")]

    @property
    def stop(self) -> list[int]:
        """Ids that end an answer."""
        return stop_ids(self.prepared.template.end_token_id(self.prepared.tokenizer), self.prepared.tokenizer)


def trained_model(job: Job) -> Any:
    """What was trained, in float32, on the device to ask it on: the live model, or base and adapter read back.

    An adapter is read back in any case, and compared bit for bit with the live one where there is one. UserError where
    they differ.
    """
    model: Any
    if job.lora is None:
        model = full_model(job.run, job.live)
    else:
        read = read_back(job.base, job.lora, job.run.recipe, job.compute, job.device)
        if job.live is not None:
            check_live(job.live, read)
        if job.run.recipe.adapter.method == "qlora":
            check_quantised(read, job.run, job.device)
        model = read.get_base_model()  # PEFT has put its layers into it
    return model if model is job.live else model.to(pick_device(model))


def reopen(folder: Path, model_class: Any) -> tuple[Any, Any]:
    """Model (float32) and tokenizer, opened with plain transformers' own class.

    UserError if weights and config do not fit.
    """
    opened: Any = model_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    model, report = opened
    faults = [f"{kind}: {', '.join(map(str, sorted(report[kind])[:3]))}" for kind in sorted(report) if report[kind]]
    if faults:
        raise UserError(f"the merged model does not open cleanly: {'; '.join(faults)}", where=str(folder))
    return model, AutoTokenizer.from_pretrained(folder, local_files_only=True)


def adapter_facts(job: Job) -> dict[str, Any] | None:
    """What was found out about the adapter: read_lora refuses a zero one, check_live one that differs from memory."""
    if job.lora is None:
        return None
    facts = {"tensors": job.lora.tensors, "nonzero": True, "scale": job.lora.scale, "sha256": job.lora.sha256}
    adapter = job.run.recipe.adapter
    if adapter.method == "qlora":
        double = " with double quantisation" if adapter.bits == 4 and adapter.double_quant else ""
        facts["merged_into"] = f"the base out of {'NF4' if adapter.bits == 4 else 'LLM.int8()'}{double}"
    return {**facts, "equals_memory": True if job.live is not None and not job.streamed else None}


def finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
