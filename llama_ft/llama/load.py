"""A base model in memory: our LLaMA with the weights of a local folder, in the type the machine computes best in."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.utils import logging

from llama_ft.errors import UserError
from llama_ft.llama.context import scale_rope
from llama_ft.llama.init import initial_weights, meta_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.recipe.schema_model import RopeScaling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(folder: Path, rope_scaling: RopeScaling | None = None, max_length: int = 0) -> LlamaConfig:
    """The folder's config, with a recipe's RoPE scaling in place of its own if one is given.

    max_length: longest document of the training, for a scaling that does not say how far it reaches. What becomes of
    max_position_embeddings is the rule of :mod:`llama_ft.llama.context`, so that an export is served right. UserError
    if it is another architecture: its weights would load and answer nonsense.
    """
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if found != "llama":
        raise UserError(
            f"{folder} holds a model of type '{found}', not 'llama'",
            key="model.base",
            hint="name a LLaMA: Llama 1 to 3, Code Llama, TinyLlama, SmolLM2, Vicuna …",
        )
    config = LlamaConfig.from_pretrained(folder)
    return config if rope_scaling is None else scale_rope(config, rope_scaling, max_length)


@torch.no_grad()
def build_random(config: LlamaConfig, seed: int, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A new LLaMA on the CPU with the weights of :func:`initial_weights`, rounded to `dtype`."""
    model: Any = meta_model(config)
    model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    parameters = dict(model.named_parameters())
    for name, weight in initial_weights(config, seed):
        parameters[name].copy_(weight)
    return model


def load_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype | None = None,
    rope_scaling: RopeScaling | None = None,
    max_length: int = 0,
) -> LlamaForCausalLM:
    """Our LLaMA with the folder's weights rounded to `dtype`, held in `compute_dtype` (None: the same).

    rope_scaling and max_length: see :func:`load_config`.
    """
    with quiet_transformers():
        loaded: Any = LlamaForCausalLM.from_pretrained(
            folder,
            config=load_config(folder, rope_scaling, max_length),
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they come back in the report, and are refused below by name
            output_loading_info=True,
        )
    model, report = loaded
    check_fit(report, folder, key="model.base")
    return model if compute_dtype in (None, dtype) else model.to(compute_dtype)


def check_fit(report: Mapping[str, Any], folder: Path, *, key: str | None = None) -> None:
    """Raises UserError where transformers' report of a loading names weights that are missing, left over, or of another
    shape than the config's."""
    faults = {kind: sorted(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        found = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(map(str, v[:3]))}" for kind, v in faults.items() if v)
        raise UserError(f"the weights in {folder} do not fit its config: {found}", key=key)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no load report: what is wrong is said by us, once."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def choose_compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to hold weights rounded to `dtype` in, and to multiply in.

    A GPU multiplies in `dtype`. Among CPUs some multiply bfloat16 at twice the speed of float32 and some at half of
    it, whatever their flags say; so both are timed (0.1 s) and float32, which holds every 16-bit value exactly, is
    taken unless bfloat16 is clearly faster. float16 is near zero speed on a CPU and never used there.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    if dtype == torch.float16:
        return torch.float32
    rates = {candidate: gemm_rate(candidate) for candidate in (torch.float32, torch.bfloat16)}
    return torch.bfloat16 if rates[torch.bfloat16] > 1.15 * rates[torch.float32] else torch.float32


def gemm_rate(dtype: torch.dtype, shape: tuple[int, int, int] = (1024, 1536, 576), repeats: int = 5) -> float:
    """FLOP/s of the fastest of some matrix products [m, k] · [n, k]ᵀ on the CPU (the fastest: noise only slows)."""
    m, n, k = shape
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    best = float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - start)
    return 2 * m * n * k / best
