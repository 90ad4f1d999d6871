"""The shapes of the LLaMA family: what `preset:NAME` means, how many weights it has, what they weigh. No torch.

Sizes: LLaMA 2302.13971 (table 2), Llama 2 2307.09288, Code Llama 2308.12950, Llama 3 2407.21783 (table 3), and the
config.json or params.json that each release was published with. What is easily taken for granted and is not so:
LLaMA 1's 65B has rms eps 1e-5 where the three smaller ones have 1e-6; Code Llama's infilling tokens make its 7B and 13B
vocabularies 32,016 while 34B has 32,000; `llama-3-405b` is the 8K stage of the 405B, which was released as 3.1 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

KINDS = ("float32", "bfloat16", "int8", "nf4")
"""How weights may be held; see :meth:`Shape.memory`."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, an 8-bit scale for 64 weights, a float32 scale for 256 of those (QLoRA, arXiv 2305.14314 §3)."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one LLaMA. `rope_scaling` is what a published model carries, in a config's words."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int
    theta: float = 10_000.0
    eps: float = 1e-5
    tied: bool = False
    head_dim: int = 0
    """Features per head; 0 is hidden / heads."""
    rope_scaling: Mapping[str, Any] | None = None
    bos: int | None = 1
    eos: int | None = 2
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Shape:
        """The shape of a config.json, or of a LlamaConfig's `to_dict()`."""
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
        end = config.get("eos_token_id")
        return cls(
            hidden=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            intermediate=config["intermediate_size"],
            vocabulary=config["vocab_size"],
            context=config["max_position_embeddings"],
            theta=theta,
            eps=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            head_dim=config.get("head_dim") or 0,
            rope_scaling=rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None,
            bos=config.get("bos_token_id"),
            eos=end[0] if isinstance(end, list) else end,
            attention_bias=config.get("attention_bias", False),
            mlp_bias=config.get("mlp_bias", False),
        )

    @property
    def dim(self) -> int:
        """Features per head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def original_context(self) -> int:
        """Tokens that the frequencies were made for, before any RoPE scaling."""
        return (self.rope_scaling or {}).get("original_max_position_embeddings", self.context)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """The seven linear layers of a block: name → (out, in)."""
        queries, keys = self.heads * self.dim, self.kv_heads * self.dim
        return {
            "q_proj": (queries, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, queries),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of the blocks' linear layers, without biases: layers · (2·h·d·(H + KV) + 3·h·i)."""
        return self.layers * sum(out * into for out, into in self.projections.values())

    @property
    def embedding_weights(self) -> int:
        """Weights of the embedding and the head: V·h, twice unless they are tied."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All weights: V·h·(2 or 1) + layers · (2·h·d·(H + KV) + 3·h·i + 2·h) + h, and a config's biases."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.embedding_weights + self.linear_weights + norms + self._biases

    @property
    def _biases(self) -> int:
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        rows = [
            out
            for name, (out, _) in self.projections.items()
            if (self.attention_bias if name in attention else self.mlp_bias)
        ]
        return self.layers * sum(rows)

    def memory(self, kind: str) -> int:
        """Bytes of the weights alone, held as one of KINDS: no activations, no cache, no optimizer.

        float32 and bfloat16 take 4 and 2 bytes each. int8 holds the blocks' linear weights in one byte each and a
        float32 scale per output row (LLM.int8(), arXiv 2208.07339), nf4 in NF4_BYTES with double quantisation;
        embedding, head and norms stay bfloat16 in both, as bitsandbytes leaves them. Raises KeyError for other kinds.
        """
        other = 2 * (self.parameters - self.linear_weights)
        rows = self.layers * sum(out for out, _ in self.projections.values())
        return {
            "float32": 4 * self.parameters,
            "bfloat16": 2 * self.parameters,
            "int8": self.linear_weights + 4 * rows + other,
            "nf4": round(self.linear_weights * NF4_BYTES) + other,
        }[kind]

    def config_dict(self, *, vocabulary: int | None = None, context: int | None = None) -> dict[str, Any]:
        """The same in the words of a Hugging Face config.json; `vocabulary` and `context` replace the shape's own."""
        rope: dict[str, Any] = {"rope_type": "default", **(self.rope_scaling or {}), "rope_theta": self.theta}
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary or self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.dim,
            "max_position_embeddings": context or self.context,
            "rms_norm_eps": self.eps,
            "rope_parameters": rope,
            "tie_word_embeddings": self.tied,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything that `llama-ft models --json` prints of a shape; memory in bytes."""
        own = asdict(replace(self, head_dim=self.dim))
        return {**own, "parameters": self.parameters, "memory": {kind: self.memory(kind) for kind in KINDS}}


def _llama3(factor: float) -> dict[str, Any]:
    """The RoPE scaling of 3.1 (factor 8) and 3.2 (factor 32)."""
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_ONE = Shape(4096, 32, 32, 32, 11008, 32_000, 2048, eps=1e-6)
_ONE_13B = replace(_ONE, hidden=5120, layers=40, heads=40, kv_heads=40, intermediate=13824)
_TWO = replace(_ONE, context=4096, eps=1e-5)
_TWO_13B = replace(_ONE_13B, context=4096, eps=1e-5)
_70B = {"hidden": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "intermediate": 28672}
_405B = {"hidden": 16384, "layers": 126, "heads": 128, "kv_heads": 8, "intermediate": 53248}
_CODE = {"context": 16384, "theta": 1_000_000.0}
_THREE = Shape(4096, 32, 32, 8, 14336, 128_256, 8192, theta=500_000.0, bos=128_000, eos=128_001)
_THREE_1 = replace(_THREE, context=131_072, rope_scaling=_llama3(8.0))
_THREE_2 = replace(_THREE_1, rope_scaling=_llama3(32.0), tied=True, intermediate=8192)
_SMOL = Shape(576, 30, 9, 3, 1536, 49_152, 8192, theta=100_000.0, tied=True, bos=0, eos=0)

PRESETS: dict[str, Shape] = {
    "llama-1-7b": _ONE,
    "llama-1-13b": _ONE_13B,
    "llama-1-33b": replace(_ONE, hidden=6656, layers=60, heads=52, kv_heads=52, intermediate=17920),
    "llama-1-65b": replace(_ONE, hidden=8192, layers=80, heads=64, kv_heads=64, intermediate=22016, eps=1e-5),
    "llama-2-7b": _TWO,
    "llama-2-13b": _TWO_13B,
    "llama-2-70b": replace(_TWO, **_70B),  # type: ignore[arg-type]  # whole numbers all
    "code-llama-7b": replace(_TWO, vocabulary=32_016, **_CODE),  # type: ignore[arg-type]
    "code-llama-13b": replace(_TWO_13B, vocabulary=32_016, **_CODE),  # type: ignore[arg-type]
    "code-llama-34b": Shape(8192, 48, 64, 8, 22016, 32_000, 16384, theta=1_000_000.0),
    "llama-3-8b": _THREE,
    "llama-3-70b": replace(_THREE, **_70B),  # type: ignore[arg-type]
    "llama-3-405b": replace(_THREE, **_405B),  # type: ignore[arg-type]
    "llama-3.1-8b": _THREE_1,
    "llama-3.1-70b": replace(_THREE_1, **_70B),  # type: ignore[arg-type]
    "llama-3.1-405b": replace(_THREE_1, **_405B),  # type: ignore[arg-type]
    "llama-3.2-1b": replace(_THREE_2, hidden=2048, layers=16),
    "llama-3.2-3b": replace(_THREE_2, hidden=3072, layers=28, heads=24),
    "tinyllama-1.1b": Shape(2048, 22, 32, 4, 5632, 32_000, 2048),
    "smollm2-135m": _SMOL,
    "smollm2-360m": replace(_SMOL, hidden=960, layers=32, heads=15, kv_heads=5, intermediate=2560),
    "smollm2-1.7b": replace(_SMOL, hidden=2048, layers=24, heads=32, kv_heads=32, intermediate=8192, theta=130_000.0),
    "mini": Shape(256, 6, 8, 4, 768, 4096, 512, tied=True),
    "tiny": Shape(64, 2, 4, 2, 192, 512, 512, tied=True),
}
"""Every shape that `preset:NAME` takes, by generation. `mini` and `tiny` are ours: 5.8M weights
that two cores train from nothing in minutes, and a model for tests and for trying a recipe out."""
