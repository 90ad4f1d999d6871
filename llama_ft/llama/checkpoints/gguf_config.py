"""A GGUF file's metadata as config.json: sizes, RoPE and its scaling, context, ends of text.

Keys: ggml's docs/gguf.md ("LLM"), as written by llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from llama_ft.errors import Problem

_SIZES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_ENDS = ("eos", "eot", "eom")
_FACTOR_ERROR = 1e-3
_LONG = 4096


def metadata_of(reader: GGUFReader) -> dict[str, Any]:
    """Every field by its key, without the long arrays (vocabulary, merges): the tokenizer has its own reader."""
    return {key: field.contents() for key, field in reader.fields.items() if len(field.data) < _LONG}


def config_of(
    metadata: dict[str, Any], path: Path, *, rows: int | None, tied: bool, factors: list[float] | None
) -> tuple[dict[str, Any], list[Problem]]:
    """config.json's entries, and what is missing or not of a plain LLaMA.

    `rows`: of the embedding. `tied`: no head of its own. `factors`: divisors of the rotary frequencies, if it has some.
    """
    problems = []
    config: dict[str, Any] = {"tie_word_embeddings": tied}
    for key, ours in _SIZES.items():
        config[ours] = metadata.get(f"llama.{key}")
        if not isinstance(config[ours], int):
            found = "missing" if config[ours] is None else f"{str(config[ours])[:40]}, one whole number is needed"
            problems.append(Problem(f"llama.{key} is {found}", str(path), hint="fetch it again"))
    stated = metadata.get("llama.vocab_size")
    if rows is None:
        problems.append(Problem("token_embd.weight is missing or no matrix", str(path)))
    elif stated is not None and stated != rows:
        problems.append(Problem(f"token_embd.weight has {rows} rows, llama.vocab_size is {stated}", str(path)))
    eps = metadata.get("llama.attention.layer_norm_rms_epsilon")
    if not isinstance(eps, float):
        problems.append(Problem("llama.attention.layer_norm_rms_epsilon is missing", str(path)))
    if problems:
        return config, problems
    heads = config["num_attention_heads"]
    dim = metadata.get("llama.attention.key_length") or config["hidden_size"] // max(heads, 1)
    config |= {
        "vocab_size": rows,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "head_dim": dim,
        "rms_norm_eps": _shortest(float(eps or 0)),
        **_ends(metadata),
    }
    for key in ("attention.value_length", "rope.dimension_count"):
        other = metadata.get(f"llama.{key}", dim)
        if other != dim:
            problems.append(Problem(f"llama.{key} is {other}, heads are {dim} wide: this is no plain LLaMA", str(path)))
    theta = _shortest(float(metadata.get("llama.rope.freq_base") or 10_000.0))
    rope, problem = _rope(metadata, theta, dim, factors)
    config["rope_parameters"] = rope
    return config, problems + ([Problem(problem, str(path))] if problem else [])


def _shortest(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 where the file's bits read as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _ends(metadata: dict[str, Any]) -> dict[str, Any]:
    """bos, and every token that ends an answer: eos, end of turn, end of message."""
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in _ENDS]
    ends = list(dict.fromkeys(token for token in ids if token is not None))
    eos = ends if len(ends) > 1 else next(iter(ends), None)
    return {"bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": eos}


def _rope(
    metadata: dict[str, Any], theta: float, dim: int, factors: list[float] | None
) -> tuple[dict[str, Any], str | None]:
    """`rope_parameters`, and what cannot be said in them."""
    kind = metadata.get("llama.rope.scaling.type", "none")
    factor = metadata.get("llama.rope.scaling.factor") or metadata.get("llama.rope.scale_linear") or 1.0
    original = metadata.get("llama.rope.scaling.original_context_length")
    if kind == "none" and "llama.rope.scale_linear" in metadata:  # what files said before scaling had a type
        kind = "linear"
    plain = {"rope_type": "default", "rope_theta": theta}
    if factors is not None and any(value != 1 for value in factors):
        if kind not in ("none", "linear") or factor != 1.0:
            return plain, f"rope_freqs.weight together with RoPE scaling of type {kind!r} is not known"
        found = llama3_scaling(factors, theta, dim)
        what = "rope_freqs.weight holds factors that are not LLaMA 3's scaling"
        return ({**found, "rope_theta": theta}, None) if found else (plain, what)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return plain, None
    scaled = {"rope_type": kind, "factor": float(factor), "rope_theta": theta}
    if kind == "linear":
        return scaled, None
    if kind == "yarn" and original:
        return {**scaled, "original_max_position_embeddings": original}, None
    return plain, f"RoPE scaling of type {kind!r} is not known, or lacks its original context"


def llama3_scaling(factors: list[float], theta: float, dim: int) -> dict[str, Any] | None:
    """The parameters behind LLaMA 3's factors, None if no set gives them.

    A frequency keeps its value while its wavelength is below original / high, is divided by `factor` above
    original / low, and in between by 1 / ((1 − s) / factor + s), s = (original / wavelength − low) / (high − low), with
    low 1 and high 4 (apply_scaling in Meta's model.py; convert_hf_to_gguf.py writes the divisors). The largest divisor
    is the factor; the original context is a power of two, and each is tried.
    """
    if len(factors) != dim // 2:
        return None
    factor, low, high = max(factors), 1.0, 4.0
    lengths = [2 * math.pi * theta ** (2 * j / dim) for j in range(dim // 2)]
    for original in (1 << power for power in range(4, 21)):
        smooth = [min(1.0, max(0.0, (original / length - low) / (high - low))) for length in lengths]
        expected = [1 / ((1 - s) / factor + s) for s in smooth]
        if all(abs(a - b) <= _FACTOR_ERROR * b for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": float(np.float32(factor)),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None
