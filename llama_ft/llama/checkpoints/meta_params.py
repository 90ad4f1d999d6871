"""params.json, Meta's description of a model, as the entries of config.json.

What it leaves out (the training length, the factor of scaled RoPE) follows from rules, each said where it stands.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llama_ft.errors import Problem
from llama_ft.llama.checkpoints.layout import LLAMA_3_VOCABULARY, ends_of_text

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""`use_scaled_rope` of LLaMA 3.1 and later: the constants of apply_scaling in Meta's model.py."""
_NEEDED = ("dim", "n_layers", "n_heads", "norm_eps")
_FRACTIONS = {"norm_eps", "ffn_dim_multiplier", "rope_theta"}
_NUMBERS = {*_NEEDED, *_FRACTIONS, "n_kv_heads", "vocab_size", "multiple_of", "max_seq_len"}
_FLAG = "use_scaled_rope"
_RUN_KEYS = {"max_batch_size", "model_parallel_size"}


def param_problems(params: dict[str, Any], path: Path) -> list[Problem]:
    """Everything in params.json that is missing, of another kind, or not of a plain LLaMA."""
    problems = [Problem(f"{key} is missing", str(path), hint="fetch it again") for key in _NEEDED if key not in params]
    for key, value in sorted(params.items()):
        if key not in _NUMBERS | _RUN_KEYS | {_FLAG}:
            if value:
                what = f"{key} is {str(value)[:60]}: this is no plain LLaMA, its weights would compute something else"
                hint = "remove the key only if you know that it changes nothing"
                problems.append(Problem(what, str(path), hint=hint))
        elif (value is None and key not in _NEEDED) or key in _RUN_KEYS:
            continue
        elif key == _FLAG:
            if not isinstance(value, bool):
                problems.append(Problem(f"{key} is {value!r}, true or false is needed", str(path)))
        elif isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            problems.append(Problem(f"{key} is {value!r}, a number is needed", str(path)))
        elif key == "vocab_size" and value == -1:
            continue  # LLaMA 1 and 2: the tokenizer's size, which the embedding tells too
        elif value <= 0 or (key not in _FRACTIONS and value != int(value)):
            kind = "number" if key in _FRACTIONS else "whole number"
            problems.append(Problem(f"{key} is {value}, a {kind} above 0 is needed", str(path)))
    return problems


def config_of(params: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """config.json from params.json. The MLP's width is the formula of FeedForward in Meta's model.py."""
    dim, heads = int(params["dim"]), int(params["n_heads"])
    multiple = int(params.get("multiple_of") or 256)
    inner = int(2 * 4 * dim / 3)
    if params.get("ffn_dim_multiplier") is not None:
        inner = int(params["ffn_dim_multiplier"] * inner)
    return {
        "hidden_size": dim,
        "intermediate_size": multiple * -(-inner // multiple),
        "num_hidden_layers": int(params["n_layers"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "rms_norm_eps": float(params["norm_eps"]),
        "vocab_size": vocabulary,
        **ends_of_text(vocabulary),
    }


def rope_of(params: dict[str, Any], *, tied: bool) -> dict[str, Any]:
    """`rope_parameters` of config.json. `tied`: whether head and embedding are one, which tells 3.2 from 3.1."""
    theta = float(params.get("rope_theta") or 10_000.0)
    if not params.get("use_scaled_rope"):
        return {"rope_type": "default", "rope_theta": theta}
    # LLaMA 3.2 (1B and 3B, the tied ones) has factor 32, 3.1 and 3.3 have 8: their config.json on the hub.
    return {**LLAMA3_ROPE, "factor": 32.0 if tied else 8.0, "rope_theta": theta}


def context_of(params: dict[str, Any], config: dict[str, Any]) -> tuple[int, str]:
    """The training length, which params.json seldom states, and the rule that gave it."""
    theta = float(params.get("rope_theta") or 10_000.0)
    if params.get("max_seq_len"):
        return int(params["max_seq_len"]), "params.json states max_seq_len"
    if params.get("use_scaled_rope"):
        return 131_072, "use_scaled_rope is LLaMA 3.1's and later"
    if config["vocab_size"] >= LLAMA_3_VOCABULARY:
        return 8192, "LLaMA 3's vocabulary without scaled RoPE"
    if theta > 10_000:
        return 16_384, f"rope_theta {theta:g} on LLaMA 2's vocabulary is Code Llama's"
    first_65b = config["hidden_size"] == 8192 and config["num_key_value_heads"] == config["num_attention_heads"]
    if params["norm_eps"] < 5e-6 or first_65b:
        return 2048, "LLaMA 1's shape (early Llama 2 files say the same: set max_position_embeddings to 4096 for those)"
    return 4096, "norm_eps 1e-05 without rope_theta is Llama 2's"
