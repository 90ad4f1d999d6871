"""Compressed checkpoints without llm-compressor: rounded row by row here, in its format, to be kept or damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from llama_ft.adapters.quantised import is_projection

LARGEST = {"int": (127, torch.int8), "float": (448, torch.float8_e4m3fn)}
"""Of 8 bits, by compressed-tensors' name of their type."""


def compress(task: dict[str, Any]) -> dict[str, Any]:
    """What scripts/compress.py writes, by rounding each row to its largest weight."""
    merged, out = Path(task["model"]), Path(task["out"])
    out.mkdir()
    largest, dtype = LARGEST[task["scheme"]["weights"]["type"]]
    tensors = {}
    for name, weight in load_file(merged / "model.safetensors").items():
        if not is_projection(name):
            tensors[name] = weight.to(getattr(torch, task["dtype"]))
            continue
        scale = (weight.abs().amax(1, keepdim=True) / largest).to(torch.bfloat16)
        rounded = weight / scale.float()
        tensors[name] = (rounded.round() if dtype == torch.int8 else rounded).clamp(-largest, largest).to(dtype)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((merged / "config.json").read_text())
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, **task["scheme"]}
    said = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None}
    said |= {"config_groups": {"group_0": group}, "ignore": task["ignore"]}
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    (out / "recipe.yaml").write_text("what llm-compressor leaves there: {}\n")
    return {"version": "0", "device": "cpu"}


def decompress(task: dict[str, Any]) -> dict[str, Any]:
    """What scripts/decompress.py writes."""
    folder, out = Path(task["model"]), Path(task["out"])
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    plain = {}
    for name, value in tensors.items():
        if f"{name}_scale" in tensors:
            plain[name] = (value.float() * tensors[f"{name}_scale"].float()).to(getattr(torch, task["dtype"]))
        elif not name.endswith("_scale"):
            plain[name] = value
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config))
    return {"version": "0"}


def ask(task: dict[str, Any]) -> dict[str, Any]:
    """What scripts/ask.py says, activations as they are."""
    plain = Path(task["model"]).with_name("plain")
    model: Any = LlamaForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for number, ids in enumerate(task["documents"]):
        with torch.inference_mode():
            np.save(Path(task["logits"], f"{number}.npy"), model(torch.tensor([ids])).logits[0].numpy())
    answers = []
    for ids in task["prompts"]:
        said = model.generate(torch.tensor([ids]), max_new_tokens=task["new_tokens"], do_sample=False)
        answers.append(said[0, len(ids) :].tolist())
    return {"version": "0", "answers": answers}


def stand_in(damage: Callable[[dict[str, Any]], None] = lambda task: None) -> Callable[..., dict[str, Any]]:
    """In place of the processes of llm-compressor's environment; `damage` has the task of what was just compressed."""
    done = {"compress": compress, "decompress": decompress, "ask": ask}

    def run_script(script: str, task: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        answer = done[script](task)
        if script == "compress":
            damage(task)
        return answer

    return run_script


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Changes the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def swap(tensors: dict[str, torch.Tensor], left: str, right: str) -> None:
    """Exchanges two projections, scales and all."""
    for end in (".weight", ".weight_scale"):
        one, other = f"model.layers.{left}{end}", f"model.layers.{right}{end}"
        tensors[one], tensors[other] = tensors[other], tensors[one]


def say(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
