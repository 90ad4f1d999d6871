"""`model` and `adapter`: what a run starts from, and what of it is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictInt

from llama_ft.recipe.section import AtLeastOne, Finite, Positive, PositiveInt, Section, Text

PRESETS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("llama-1-7b", "llama-1-13b", "llama-1-33b", "llama-1-65b"), (2048, 2048)),
    **dict.fromkeys(("llama-2-7b", "llama-2-13b", "llama-2-70b"), (4096, 4096)),
    **dict.fromkeys(("code-llama-7b", "code-llama-13b", "code-llama-34b"), (16384, 16384)),
    **dict.fromkeys(("llama-3-8b", "llama-3-70b", "llama-3-405b"), (8192, 8192)),
    **dict.fromkeys(("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"), (8192, 131_072)),
    **dict.fromkeys(("llama-3.2-1b", "llama-3.2-3b"), (8192, 131_072)),
    "tinyllama-1.1b": (2048, 2048),
    **dict.fromkeys(("smollm2-135m", "smollm2-360m", "smollm2-1.7b"), (8192, 8192)),
    "mini": (512, 512),
    "tiny": (512, 512),
}
"""Shapes that `preset:NAME` takes (llama_ft.llama.shapes has them), each with its context in tokens before and after
the RoPE scaling it was published with."""


RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": (("rope_theta",), ()),
    "linear": (("factor",), ("rope_theta",)),
    "dynamic": (("factor",), ("rope_theta",)),
    "yarn": (
        ("factor",),
        ("rope_theta", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
         "mscale_all_dim", "truncate"),
    ),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("rope_theta", "original_max_position_embeddings"),
    ),
}  # fmt: skip
"""Which keys each type of RoPE scaling needs, and which it may have; transformers' names and types."""


class RopeScaling(Section):
    """How RoPE reaches beyond the context of pre-training. Each type takes its own keys and no others.

    `default` only changes theta, as Code Llama does.
    """

    rope_type: RopeType
    """Positions divided by the factor (`linear`), theta by length (`dynamic`), YaRN, or Llama 3.1's rule."""
    factor: AtLeastOne | None = None
    """How many times the original context is to be read; all but `default` need it."""
    rope_theta: Positive | None = None
    """Another base of the frequencies; null keeps the base model's."""
    original_max_position_embeddings: PositiveInt | None = None
    """yarn, llama3: the context before scaling, in tokens; null takes the base model's."""
    low_freq_factor: Positive | None = None
    """llama3: wavelengths above original / this are divided by the factor (Llama 3.1: 1)."""
    high_freq_factor: Positive | None = None
    """llama3: wavelengths below original / this stay as they are (Llama 3.1: 4)."""
    beta_fast: Positive | None = None
    """yarn: features that turn more often than this in the original context stay as they are (null: 32)."""
    beta_slow: Positive | None = None
    """yarn: features that turn less often than this are divided by the factor (null: 1)."""
    attention_factor: Positive | None = None
    """yarn: scale of cos and sin; null is 0.1·ln(factor) + 1 (arXiv 2309.00071)."""
    mscale: Positive | None = None
    """yarn: with mscale_all_dim, the attention factor as DeepSeek computes it."""
    mscale_all_dim: Positive | None = None
    """yarn: the divisor of mscale's attention factor."""
    truncate: StrictBool | None = None
    """yarn: round the borders between features to whole numbers (null: true)."""

    def parameters(self) -> dict[str, Any]:
        """What the type uses of what was stated, numbers as floats, lengths and flags as they are."""
        needed, optional = ROPE_KEYS[self.rope_type]
        stated = {name: getattr(self, name) for name in (*needed, *optional)}
        whole = ("original_max_position_embeddings", "truncate")
        given = {name: value for name, value in stated.items() if value is not None}
        numbers = {name: value if name in whole else float(value) for name, value in given.items()}
        return {"rope_type": self.rope_type, **numbers}


class Model(Section):
    """The base model: where its weights come from and how they are held."""

    base: Text
    """Hub id, local folder (HF layout), `smollm2-135m`, or `preset:NAME` (shapes only, random weights)."""
    revision: Text | None = None
    """Hub commit, tag or branch; null takes the hub's default."""
    tokenizer: Text | None = None
    """Hub id or folder of another tokenizer; null takes the base model's own."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the base weights in training. Adapters, norms' arithmetic and losses stay float32."""
    rope_scaling: RopeScaling | None = None
    """How RoPE reaches beyond the base's context; null keeps the base's own."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` starts from fresh weights of the base's shapes, made from training.seed; a preset always does."""
    attention: Literal["auto", "plain", "cpu", "varlen", "flash", "flex"] = "auto"
    """Attention kernel of the training; `auto` takes the best that the machine has."""

    @property
    def starts_new(self) -> bool:
        """Whether training starts from weights that nobody has trained: shapes alone have no others."""
        return self.init == "random" or self.base.startswith("preset:")


class Adapter(Section):
    """What is trained: every weight (`full`) or a low-rank adapter."""

    method: Literal["full", "lora", "qlora"] = "lora"
    """`full` trains all weights, `lora` an adapter, `qlora` an adapter on a quantised base."""
    r: PositiveInt = 16
    """LoRA rank."""
    alpha: Positive = 32
    """LoRA scale: the update is multiplied by alpha / r (arXiv 2106.09685)."""
    dropout: Annotated[StrictInt, Field(ge=0, le=0)] | Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input."""
    targets: Text | Annotated[list[Text], Field(min_length=1)] = "all-linear"
    """`all-linear`, `attention`, a list of projections (`q_proj`, …), or a regex over `model.layers.0.mlp.up_proj` …"""
    rslora: StrictBool = False
    """Rank-stabilised: the update is multiplied by alpha / √r (arXiv 2312.03732)."""
    dora: StrictBool = False
    """Weight-decomposed: direction and length of each row are trained apart (arXiv 2402.09353)."""
    lora_plus: AtLeastOne | None = None
    """LoRA+: B learns at this many times the rate of A (arXiv 2402.12354 suggests 16); null: at the same."""
    modules_to_save: list[Literal["embed_tokens", "lm_head", "norms"]] = []
    """Trained whole beside the adapter. Where the tokenizer has more tokens than the base, embedding and head are."""
    bits: Literal[4, 8] = 4
    """qlora: the base in NF4 (arXiv 2305.14314), or in LLM.int8() (arXiv 2208.07339)."""
    double_quant: StrictBool = True
    """qlora in 4 bits: the scales of its blocks are quantised too, which saves 0.37 bits per weight."""
    freeze: list[Text] = []
    """full: weights whose name one of these regexes is found in stay as they are, e.g. `embed_tokens`."""
