"""A quantised base: NF4 (QLoRA, arXiv 2305.14314) or LLM.int8() (arXiv 2208.07339), by bitsandbytes.

The projections of all blocks are quantised, whether an adapter sits on them or not; embedding, head and norms are not.
What training multiplies with is a function of the base's files, `model.dtype`, the recipe's `adapter` and the type that
is computed in: each weight is rounded to `model.dtype` and quantised, and NF4 comes back in the type computed in. The
merge does the same again, which is the only faithful way: merging into the weights before quantisation, or inside the
4 bits, is another model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from llama_ft.errors import UserError
from llama_ft.llama.checkpoints.shards import Stored, stored_tensors
from llama_ft.llama.init import meta_model
from llama_ft.llama.load import load_config
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.recipe.check_adapter import PROJECTIONS
from llama_ft.recipe.schema import Adapter
from llama_ft.recipe.schema_model import RopeScaling

_SUFFIXES = tuple(f".{name}.weight" for name in PROJECTIONS)
BLOCK = 64
"""Weights of NF4 that share a scale (arXiv 2305.14314, section 3)."""
OUTLIER = 6.0
"""LLM.int8(): input features with values beyond this are multiplied in 16 bits (arXiv 2208.07339, section 3.2)."""


def bitsandbytes() -> Any:
    """The library. UserError where it is not installed."""
    try:
        import bitsandbytes as library
    except ImportError as error:
        hint = "pip install 'llama-ft[qlora]'"
        raise UserError("qlora needs bitsandbytes, which is not installed", key="adapter.method", hint=hint) from error
    return library


def is_projection(name: str) -> bool:
    """Whether a stored tensor's name is that of a projection's weight."""
    return name.endswith(_SUFFIXES)


def quantise(weight: Tensor, adapter: Adapter, device: torch.device, compute: torch.dtype) -> nn.Linear:
    """A frozen linear layer that holds `weight` [out, in], of `model.dtype`, in the recipe's 4 or 8 bits on `device`.

    compute: the type of its inputs and outputs. UserError for rows that bitsandbytes cannot cut into blocks there.
    """
    library = bitsandbytes()
    out, into = weight.shape
    if adapter.bits == 4 and into % BLOCK and device.type == "cpu":  # bitsandbytes 0.50 takes such rows out wrong
        what = f"NF4 on a CPU needs rows of a multiple of {BLOCK} weights, the base has rows of {into}"
        raise UserError(what, key="adapter.bits", hint="write bits: 8, or method: lora")
    with torch.device("meta"):
        if adapter.bits == 4:
            linear = library.nn.Linear4bit(into, out, bias=False, compute_dtype=compute, quant_type="nf4")
            # On AVX512-BF16 CPUs an evaluation would repack the weights in place for a kernel without a backward, after
            # which gradients, merges and saves are wrong, without an error (bitsandbytes 0.50).
            linear.support_avx512bf16_for_cpu = False
        else:
            linear = library.nn.Linear8bitLt(into, out, bias=False, has_fp16_weights=False, threshold=OUTLIER)
    if adapter.bits == 4:
        # In the type computed in: forward takes the weight out of its 4 bits in that type, backward in this one.
        linear.weight = library.nn.Params4bit(
            weight.to(compute),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=adapter.double_quant,
            module=linear,
        ).to(device)
    else:
        linear.weight = library.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    return linear


def is_quantised(linear: nn.Module) -> bool:
    """Whether this is a linear layer of bitsandbytes, found without importing the library."""
    return type(linear).__module__.startswith("bitsandbytes.")


def is_nf4(linear: nn.Module) -> bool:
    """Whether this is a linear layer in 4 bits."""
    return is_quantised(linear) and hasattr(linear.weight, "quant_state")


def dequantise(linear: nn.Module) -> Tensor:
    """The weight [out, in] that a quantised layer multiplies with: NF4 in the type it computes in, LLM.int8() in
    float32, for there the scales come after the product of whole numbers.
    """
    library = bitsandbytes()
    weight: Any = linear.weight
    if hasattr(weight, "quant_state"):
        return library.functional.dequantize_4bit(weight.data, weight.quant_state)
    state: Any = linear.state
    scale = weight.SCB if weight.SCB is not None else state.SCB
    rows = weight.data if weight.data.dtype == torch.int8 else state.CB
    return library.functional.int8_vectorwise_dequant(rows, scale)


def requantised(adapter: Adapter, device: torch.device, compute: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The function from a base's weight, of `model.dtype`, to the one that training in `compute` multiplied with."""

    def there_and_back(weight: Tensor) -> Tensor:
        linear = quantise(weight.to(device), adapter, device, compute)
        return dequantise(linear).to(weight.device)

    return there_and_back


def load_quantised(
    folder: Path,
    adapter: Adapter,
    dtype: torch.dtype,
    *,
    compute: torch.dtype,
    device: torch.device,
    rope_scaling: RopeScaling | None = None,
    max_length: int = 0,
) -> LlamaForCausalLM:
    """Our LLaMA from a model folder, one tensor at a time: main memory holds one layer's weight, never the model.

    Weights are rounded to `dtype`; the projections are quantised on `device`, all others are held in `compute`.
    rope_scaling and max_length: see :func:`llama_ft.llama.load.load_config`. UserError for weights that do not fit the
    config or a config with biases on its projections.
    """
    config = load_config(folder, rope_scaling, max_length)
    model: Any = meta_model(config)
    if config.attention_bias or config.mlp_bias:
        raise UserError(f"{folder} has biases on its projections, which cannot be quantised here", key="adapter.method")
    stored = _checked(folder, model)
    with torch.no_grad():
        for name, entry in stored.items():
            with safe_open(entry.file, framework="pt") as source:
                weight = source.get_tensor(name).to(dtype)
            place, _, leaf = name.rpartition(".")
            if is_projection(name):
                model.set_submodule(place, quantise(weight, adapter, device, compute))
            else:
                tensor = nn.Parameter(weight.to(device, compute), requires_grad=False)
                setattr(model.get_submodule(place), leaf, tensor)
    model.tie_weights()
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.frequencies(device)[0]
    model.config.name_or_path = str(folder)
    return model


def _checked(folder: Path, model: nn.Module) -> dict[str, Stored]:
    """What of the folder the model takes: every weight once, of its shape. UserError otherwise."""
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: entry for name, entry in stored_tensors(folder).items() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in wanted:  # tied: the embedding serves
        found.pop("lm_head.weight", None)
    faults = [f"missing: {name}" for name in wanted if name not in found]
    faults += [f"unexpected: {name}" for name in found if name not in wanted]
    faults += [
        f"{name} is {list(entry.shape)}, not {list(wanted[name])}"
        for name, entry in found.items()
        if name in wanted and entry.shape != wanted[name]
    ]
    if faults:
        shown = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
        raise UserError(f"the weights in {folder} do not fit its config: {shown}", key="model.base")
    return found


@contextmanager
def known_as_quantised(model: nn.Module, adapter: Adapter) -> Iterator[None]:
    """Tells PEFT which layers to put around the quantised ones, and nobody afterwards.

    TRL would round the adapter to bfloat16, where a step of 2e-4 is lost; ours stays in float32.
    """
    name = f"is_loaded_in_{adapter.bits}bit"
    marked: Any = model
    setattr(marked, name, True)
    try:
        yield
    finally:
        delattr(marked, name)


def digest(model: nn.Module) -> str:
    """A fingerprint (xxh3, 128 bits) of all quantised weights and their scales, in the order of the model.

    Two machines may quantise a weight on the border of two values differently; an export that cannot make the same
    weights again is no faithful merge.
    """
    seen = xxhash.xxh3_128()
    for linear in model.modules():
        if not is_quantised(linear) or not isinstance(linear, nn.Linear):
            continue
        weight: Any = linear.weight
        parts = [weight.data]
        state = getattr(weight, "quant_state", None)
        if state is None:
            parts.append(weight.SCB if weight.SCB is not None else linear.state.SCB)  # type: ignore[union-attr]
        else:
            parts += [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        for part in parts:
            seen.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return seen.hexdigest()


def without_quantisation(model: nn.Module) -> None:
    """Replaces each quantised layer by a plain one in float32 with the weight it multiplies with, in place.

    For a comparison of weights in float32: LLM.int8() also rounds its inputs, which no export can repeat, and NF4 would
    come out in another type than training had.
    """
    for parent, name, linear in _quantised_layers(model):
        setattr(parent, name, _plain(linear, torch.float32))


@contextmanager
def unpacked(model: nn.Module, compute: torch.dtype) -> Iterator[None]:
    """Lets a CPU generate with plain weights in `compute`, and puts the quantised ones back.

    A token at a time, a CPU would take the whole model out of its 4 bits for each. Nothing happens on a GPU, whose
    kernels multiply with 4 bits, and where there is no room.
    """
    layers = _quantised_layers(model)
    need = sum(linear.in_features * linear.out_features for _, _, linear in layers) * compute.itemsize
    fits = bool(layers) and layers[0][2].weight.device.type == "cpu" and need < psutil.virtual_memory().available / 2
    if not fits:
        yield
        return
    try:
        for parent, name, linear in layers:
            setattr(parent, name, _plain(linear, compute))
        yield
    finally:
        for parent, name, linear in layers:
            setattr(parent, name, linear)


def _quantised_layers(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(parent, name, layer) of every quantised layer."""
    return [
        (parent, name, linear)
        for parent in model.modules()
        for name, linear in parent.named_children()
        if is_quantised(linear)
    ]


def _plain(linear: Any, dtype: torch.dtype) -> nn.Linear:
    """A frozen plain layer in `dtype` with the weight that a quantised one multiplies with."""
    plain = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(dequantise(linear).to(dtype), requires_grad=False)
    return plain
