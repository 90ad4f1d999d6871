"""llm-compressor on a merged model. Runs by itself, in the environment that llama_ft/export/compressed/tools.py makes.

Argument: a file with a JSON object: `model` and `out` folders, `dtype` of what stays unrounded, `method` (awq, gptq,
smoothquant+gptq, round), `scheme` (compressed-tensors' arguments of weights and input_activations), `ignore` (modules
left as they are), `rows` (a file of JSON: lists of ids to calibrate on, or null), `shard_bytes`, `threads`, `answer`
file.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

SMOOTHING = 0.8
"""Of SmoothQuant before GPTQ: llm-compressor's own example of W8A8."""


def modifiers(task: dict[str, Any]) -> list[Any]:
    """The steps of llm-compressor's recipe."""
    quantised = {"config_groups": {"group_0": {"targets": ["Linear"], **task["scheme"]}}, "ignore": task["ignore"]}
    transform = import_module("llmcompressor.modifiers.transform")
    gptq = import_module("llmcompressor.modifiers.gptq")
    rounding = import_module("llmcompressor.modifiers.quantization")
    match task["method"]:
        case "awq":
            return [transform.AWQModifier(), rounding.QuantizationModifier(**quantised)]
        case "gptq":
            return [gptq.GPTQModifier(**quantised)]
        case "smoothquant+gptq":
            return [transform.SmoothQuantModifier(smoothing_strength=SMOOTHING), gptq.GPTQModifier(**quantised)]
        case "round":
            return [rounding.QuantizationModifier(**quantised)]
    raise SystemExit(f"no such method: {task['method']}")


def batches(file: str | None) -> Any:
    """One document each, and so without padding; None where nothing is calibrated."""
    if file is None:
        return None
    torch: Any = import_module("torch")
    rows = json.loads(Path(file).read_text(encoding="utf-8"))
    found = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=int)} for ids in rows]
    return torch.utils.data.DataLoader(found, batch_size=None)


def without_pinning() -> None:
    """Leaves out what AWQ does to move documents to a GPU faster, and what ends it where there is none.

    llm-compressor 0.14.0.1 pins memory without looking: "Cannot access accelerator device when none is available".
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    cache: Any = import_module("llmcompressor.pipelines.cache")
    cache.IntermediatesCache.pin_memory = nothing


def main() -> None:
    """Compresses; ends with a traceback where llm-compressor does."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    llmcompressor: Any = import_module("llmcompressor")
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        without_pinning()
    model = transformers.LlamaForCausalLM.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"]), local_files_only=True
    )
    llmcompressor.oneshot(model=model, dataset=batches(task["rows"]), recipe=modifiers(task))
    model.save_pretrained(task["out"], max_shard_size=task["shard_bytes"])
    found = {"version": llmcompressor.__version__, "device": "cpu" if device is None else device.type}
    Path(task["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
