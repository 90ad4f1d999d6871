"""The other way: a LLaMA written in Meta's, llama2.c's and GGUF's layouts, and plain forwards in those layouts."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers import LlamaForCausalLM as HFLlama

META = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 64,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}
"""params.json of `tiny_llama`: int(8 · 64 / 3) = 170, the next multiple of 64 is 192."""


def tiny_llama(dtype: torch.dtype = torch.float32, **changes: Any) -> HFLlama:
    """A random LLaMA, 64 wide, 2 layers, 4 query and 2 key heads, 96 tokens; norms are not one."""
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    settings: dict[str, Any] = {**shape, **heads, "rms_norm_eps": 1e-5, "initializer_range": 0.15, **changes}
    torch.manual_seed(0)
    model = HFLlama(LlamaConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def state_of(model: HFLlama) -> dict[str, Tensor]:
    """HF names to tensors; a tied head is not among them."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def halves_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """HF's row order to Meta's, row by row, so that nothing is shared with the code under test."""
    dim = weight.shape[0] // heads
    out = torch.empty_like(weight)
    for head in range(heads):
        for row in range(dim // 2):
            out[head * dim + 2 * row] = weight[head * dim + row]
            out[head * dim + 2 * row + 1] = weight[head * dim + dim // 2 + row]
    return out


def meta_state(model: HFLlama) -> dict[str, Tensor]:
    """The same weights under Meta's names and in Meta's row order."""
    out = {}
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    for name, stored in state_of(model).items():
        module = name.removesuffix(".weight")
        turned = module.split(".")[-1]
        tensor = halves_to_pairs(stored, heads[turned]) if turned in heads else stored
        if module.startswith("model.layers."):
            _, _, layer, rest = module.split(".", 3)
            out[f"layers.{layer}.{META[rest]}.weight"] = tensor
        else:
            out[f"{META[module]}.weight"] = tensor
    return out


def write_meta(
    folder: Path, model: HFLlama, ranks: int = 1, *, embedding_by_rows: bool = False, **params: Any
) -> dict[str, Tensor]:
    """consolidated.NN.pth for `ranks` ranks and params.json; a params value of None leaves the key out."""
    folder.mkdir(parents=True, exist_ok=True)
    state = meta_state(model)
    for rank in range(ranks):
        part = {}
        for name, tensor in state.items():
            if tensor.dim() == 1:
                part[name] = tensor
                continue
            by_columns = name.endswith(("wo.weight", "w2.weight"))
            by_columns |= name.startswith("tok_embeddings") and not embedding_by_rows
            part[name] = tensor.chunk(ranks, dim=1 if by_columns else 0)[rank].clone()
        part["rope.freqs"] = torch.ones(8)
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    stated = {key: value for key, value in {**PARAMS, **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(stated))
    return state


def meta_logits(state: dict[str, Tensor], params: dict[str, Any], tokens: Tensor, scale_rope: Any = None) -> Tensor:
    """Logits [L, V] in float32 by Meta's formulas: RoPE as products of complex numbers of neighbouring features."""
    state = {name: tensor.float() for name, tensor in state.items()}
    heads, kv = params["n_heads"], params["n_kv_heads"]
    dim = params["dim"] // heads
    length = len(tokens)
    freqs = 1.0 / params.get("rope_theta", 10_000.0) ** (torch.arange(0, dim, 2).double() / dim)
    freqs = scale_rope(freqs) if scale_rope else freqs
    angles = torch.outer(torch.arange(length).double(), freqs).float()
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[f"{name}.weight"]

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], dim // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = state["tok_embeddings.weight"][tokens]
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):
        p = f"layers.{layer}."
        h = norm(x, p + "attention_norm")
        q = rotate((h @ state[p + "attention.wq.weight"].T).view(length, heads, dim)).transpose(0, 1)
        k = rotate((h @ state[p + "attention.wk.weight"].T).view(length, kv, dim)).transpose(0, 1)
        v = (h @ state[p + "attention.wv.weight"].T).view(length, kv, dim).transpose(0, 1)
        k, v = (t.repeat_interleave(heads // kv, dim=0) for t in (k, v))
        attended = ((q @ k.transpose(1, 2)) / dim**0.5 + mask).softmax(-1) @ v
        x = x + attended.transpose(0, 1).reshape(length, -1) @ state[p + "attention.wo.weight"].T
        h = norm(x, p + "ffn_norm")
        gate = torch.nn.functional.silu(h @ state[p + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ state[p + "feed_forward.w3.weight"].T)) @ state[p + "feed_forward.w2.weight"].T
    head = state.get("output.weight", state["tok_embeddings.weight"])
    return norm(x, "norm") @ head.T


def write_llama2c(path: Path, model: HFLlama, version: int, *, group: int = 32, scales_last: bool = False) -> None:
    """A .bin of version 0, 1 or 2, as export.py of llama2.c lays it out."""
    config, state = model.config, meta_state(model)
    tied = config.tie_word_embeddings
    layers = range(config.num_hidden_layers)

    def every(name: str) -> list[Tensor]:
        return [state[f"layers.{layer}.{name}.weight"] for layer in layers]

    attention = [tensor for name in "qkvo" for tensor in every(f"attention.w{name}")]
    mlp = [tensor for number in "123" for tensor in every(f"feed_forward.w{number}")]
    head = [] if tied else [state["output.weight"]]
    embedding, norm = [state["tok_embeddings.weight"]], [state["norm.weight"]]
    sizes = [config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.num_attention_heads]
    sizes += [config.num_key_value_heads, config.vocab_size, config.max_position_embeddings]
    dim = config.hidden_size // config.num_attention_heads
    if version == 0:
        sizes[5] *= 1 if tied else -1
        tables = [torch.full((config.max_position_embeddings, dim // 2), 7.0)] * 2  # nothing may read them
        parts = [*embedding, *every("attention_norm"), *attention, *every("ffn_norm"), *mlp, *norm, *tables, *head]
        path.write_bytes(struct.pack("<7i", *sizes) + b"".join(part.numpy().tobytes() for part in parts))
        return
    header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, int(tied))
    header += struct.pack("<i", group) if version == 2 else b""
    norms = [*every("attention_norm"), *every("ffn_norm"), *norm]
    body = b"".join(part.numpy().tobytes() for part in norms)
    matrices = [*embedding, *attention, *mlp, *head]
    if version == 1:
        body += b"".join(part.numpy().tobytes() for part in matrices)
    else:
        pairs = [quantise_q80(part, group) for part in matrices]
        values, scales = zip(*((q.numpy().tobytes(), s.numpy().tobytes()) for q, s in pairs), strict=True)
        body += (
            b"".join(values + scales) if scales_last else b"".join(v + s for v, s in zip(values, scales, strict=True))
        )
    path.write_bytes(header.ljust(256, b"\0") + body)


def quantise_q80(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """llama2.c's symmetric int8: (values int8, scales float32) for groups of `group` values."""
    rows = weight.float().reshape(-1, group)
    scales = rows.abs().amax(1) / 127
    return (rows / scales[:, None]).round().to(torch.int8), scales


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def gguf_state(model: HFLlama) -> dict[str, Tensor]:
    """The same weights under llama.cpp's names, q and k in Meta's row order."""
    back = {meta: GGUF_NAMES[hf] for hf, meta in META.items()}
    out = {}
    for name, tensor in meta_state(model).items():
        module = name.removesuffix(".weight")
        if module.startswith("layers."):
            _, layer, rest = module.split(".", 2)
            out[f"blk.{layer}.{back[rest]}.weight"] = tensor
        else:
            out[f"{back[module]}.weight"] = tensor
    return out


Blocks = tuple[np.ndarray, gguf.GGMLQuantizationType]


def write_gguf(
    path: Path,
    model: HFLlama,
    *,
    blocks: dict[str, Blocks] | None = None,
    fields: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
    vocabulary: dict[str, Any] | None = None,
    architecture: str = "llama",
) -> None:
    """A GGUF by the gguf package's writer: norms in F32, matrices in the model's type or as given in `blocks`."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    for key, value in (fields or {}).items():
        getattr(writer, f"add_{key}")(value) if hasattr(writer, f"add_{key}") else writer.add_uint32(key, value)
    for key, value in (vocabulary or {}).items():
        getattr(writer, f"add_{key}")(value)
    for name, tensor in gguf_state(model).items():
        if name in drop:
            continue
        if blocks and name in blocks:
            data, kind = blocks[name]
            writer.add_tensor(name, data, raw_dtype=kind)
        elif tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        elif tensor.dtype == torch.bfloat16:
            data = gguf.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
