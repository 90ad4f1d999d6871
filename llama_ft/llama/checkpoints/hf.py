"""HF folders as a source: config.json and safetensors, in one file or several, checked against each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llama_ft.errors import Problem, UserError
from llama_ft.llama.checkpoints.layout import (
    Weights,
    config_problems,
    file_problem,
    llama_shapes,
    read_json,
    shape_problems,
)
from llama_ft.llama.checkpoints.shards import INDEX, Stored, stored_tensors
from llama_ft.tokenizer.convert import write_tokenizer

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""What travels with the weights, as it is."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_hf(folder: Path) -> Weights:
    """Checks a model folder. UserError with all that is wrong: files, tensors missing, extra or of another shape."""
    config_file = folder / "config.json"
    stated = read_json(config_file)
    if stated.get("model_type") != "llama":
        what = f"describes a model of type {stated.get('model_type')!r}, not 'llama'"
        raise UserError(
            what, where=str(config_file), hint="name a LLaMA: Llama 1 to 3, Code Llama, TinyLlama, SmolLM2 …"
        )
    if stated.get("quantization_config"):
        raise UserError("describes quantised weights, which are not read", where=str(config_file))
    config = _resolved(stated, config_file)
    stored = _stored(folder)
    ignored = {name for name in stored if _IGNORED.fullmatch(name)}
    if config["tie_word_embeddings"] and {HEAD, EMBEDDING} <= set(stored):
        if not _same(stored[EMBEDDING], stored[HEAD]):
            what = f"{HEAD} differs from {EMBEDDING}, and config.json says that they are one"
            raise UserError(what, where=str(folder), hint="set tie_word_embeddings to false if the head was trained")
        ignored.add(HEAD)
    stored = {name: entry for name, entry in stored.items() if name not in ignored}
    shapes = llama_shapes(config)
    problems = shape_problems({name: entry.shape for name, entry in stored.items()}, shapes, folder, "config.json")
    odd = sorted({entry.dtype for entry in stored.values()} - set(_TYPES))
    if odd:
        problems.append(Problem(f"holds {', '.join(odd)}: quantised weights are not read", str(folder)))
    if problems:
        raise UserError(problems)
    types = {_TYPES[entry.dtype] for entry in stored.values()}
    dtype = types.pop() if len(types) == 1 else torch.float32

    def read(name: str) -> Tensor:
        with safe_open(stored[name].file, framework="pt") as source:
            return source.get_tensor(name)

    companions = tuple(path for name in COMPANIONS if (path := folder / name).is_file())

    def tokenizer(dest: Path) -> Path | None:
        if (folder / "tokenizer.json").is_file():  # already in this layout: it travels as a companion
            return folder / "tokenizer.json"
        # A bare SentencePiece file would be converted by whoever opens it, and not by everyone rightly.
        return write_tokenizer(folder, dest, vocab_size=config["vocab_size"])

    return Weights("HF's layout", stated, shapes, dtype, read, tokenizer, folder, companions)


def _resolved(stated: dict[str, Any], path: Path) -> dict[str, Any]:
    """config.json with LlamaConfig's defaults for what it leaves out."""
    from transformers import LlamaConfig

    try:
        config = LlamaConfig.from_dict(stated).to_dict()
    except Exception as error:  # huggingface_hub's strict dataclasses raise their own kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
        raise UserError(f"describes no LLaMA: {line}", where=str(path)) from error
    problems = config_problems(config, path)
    if problems:
        raise UserError(problems)
    return config


def _stored(folder: Path) -> dict[str, Stored]:
    """Every stored tensor by name, once each file is known to be there and to be itself."""
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError("has no weight_map of tensors to files", where=str(folder / INDEX), hint="fetch it again")
        files = sorted({folder / name for name in weight_map.values()})
    if not files:
        pickled = sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pth")])
        if pickled:
            what = f"holds pickled weights alone ({pickled[0].name}), which are not read"
            call = "transformers.LlamaForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
            hint = f"convert them once in Python: {call}, then copy the tokenizer's files beside them"
            raise UserError(what, where=str(folder), hint=hint)
        raise UserError("holds no safetensors", where=str(folder), hint="a model folder has model.safetensors")
    problems = [problem for file in files if (problem := file_problem(file))]
    for file in files:
        try:
            if not any(problem.where == str(file) for problem in problems):
                with safe_open(file, framework="pt") as source:
                    source.keys()
        except Exception as error:  # SafetensorError for a damaged file, OSError for one cut off
            problems.append(Problem(f"is cut off or damaged: {error}", str(file), hint="fetch it again"))
    if problems:
        raise UserError(problems)
    return stored_tensors(folder)


def _same(one: Stored, other: Stored) -> bool:
    if one.shape != other.shape:
        return False
    with safe_open(one.file, framework="pt") as a, safe_open(other.file, framework="pt") as b:
        return bool(torch.equal(a.get_tensor(EMBEDDING), b.get_tensor(HEAD)))
