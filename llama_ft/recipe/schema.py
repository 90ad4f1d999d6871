"""What a recipe may say: pydantic models, one per section, each field documented where it stands.

No I/O and no torch here. Unknown keys are errors; every default is visible in `llama-ft show`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictInt, StrictStr

from llama_ft.recipe.schema_model import Adapter, Model
from llama_ft.recipe.schema_objective import Preference, RewardModel
from llama_ft.recipe.schema_online import Policy, Reward, Sampling
from llama_ft.recipe.section import Finite, NonNegative, Positive, PositiveInt, Section, Share, Text

Objective = Literal["pretrain", "sft", "reward", "dpo", "kto", "orpo", "simpo", "grpo", "rloo", "rejection_sampling"]
Layout = Literal["alpaca", "sharegpt", "messages", "preference", "rated", "text", "prompt-completion"]
QualityStep = Literal["language", "gopher-repetition", "gopher-quality", "c4", "code"]
Quantisation = Literal["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]


class Reproduces(Section):
    """What published work the recipe stands for."""

    what: Text
    """Name of the published model or experiment."""
    source: Text
    """Where its hyper-parameters were read: a URL or a paper."""
    deviations: list[Text] = []
    """Every way in which this recipe differs from the source, in words."""


class Data(Section):
    """One source of rows: a card (`use`), a file (`path`), or a file in a card's layout (`use`, `path`)."""

    use: Text | None = None
    """Name of a card in `datasets/`, or the path of a card."""
    path: Text | None = None
    """A file of rows, a folder or a pattern (`rows/*.jsonl.gz`): json, jsonl, csv, parquet, arrow, text, code."""
    layout: Layout | None = None
    """How a raw row is shaped; null takes the card's, or guesses it from the first rows and says so."""
    unit: Literal["file", "line"] = "file"
    """What a row of plain text or code is: a whole file, or a line that is not blank."""
    split: Text = "train"
    """Which split of a card."""
    weight: NonNegative = 1.0
    """How often this source is drawn, relative to its size and to the others; 0 leaves it out."""
    share: Annotated[Finite, Field(gt=0, le=1)] | None = None
    """pretrain, streaming: share of all tokens that come from this source, which begins anew where it ends. Every
    source states one, and they come to 1; or none does."""
    epochs: Positive | None = None
    """Passes over this source in each pass over the mixture, whatever its weight; null lets weights decide."""
    limit: PositiveInt | None = None
    """Take only the first N rows."""
    quality: list[QualityStep] = []
    """Text: steps that drop and count poor rows, in this order; code has one of its own. Copies: mixture.dedupe."""
    languages: Annotated[list[Text], Field(min_length=1)] = ["en"]
    """What the steps language and gopher-quality take a text to be in: ISO 639 codes."""
    system: Text | None = None
    """System prompt for conversations that have none."""


class Holdout(Section):
    """Hold part of the training rows out for evaluation."""

    holdout: Annotated[Finite, Field(gt=0, lt=1)]
    """Share of documents, drawn by the training seed."""


class Sequence(Section):
    """How conversations become token sequences."""

    max_length: Annotated[StrictInt, Field(ge=8)] = 2048
    """Longest document, in tokens."""
    packing: StrictBool = True
    """Lay each micro-batch's documents end to end without padding; documents never see each other. Several answers to
    one prompt (pairs, sampled answers) then have it computed once; where false, each comes with a prompt of its own."""
    train_on: Literal["responses", "all", "last_response"] = "responses"
    """Which tokens carry loss."""
    overlong: Literal["drop", "truncate", "split"] = "drop"
    """What happens to a document longer than max_length (`split`: at turn borders); always counted in the report."""
    max_truncated: Annotated[Finite, Field(ge=0, le=1)] = 0.1
    """Share of a source's rows that may be cut at max_length, and lose their end token, before the run is refused."""


class Mixture(Section):
    """How the sources of `data` are joined: shares, copies, and what must not be among them."""

    temperature: Positive = 1.0
    """Shares are weight times size to the power 1/temperature: 1 goes by size, a large one makes sources equal."""
    dedupe: Literal["none", "exact", "near"] = "none"
    """Drop later copies of a document, within and across sources: equal ones, or near ones too (MinHash)."""
    similarity: Annotated[Finite, Field(gt=0, le=1)] = 0.8
    """near: from which estimated Jaccard similarity of word 5-grams two documents are copies."""
    benchmarks: list[Text] = []
    """Cards or files of benchmark prompts that training rows must not hold, such as humaneval."""
    decontaminate: StrictBool = False
    """Drop and count the rows that overlap a benchmark or eval_data, where otherwise the run is refused."""
    streaming: StrictBool = False
    """Read, render and shuffle rows while training; for sets that do not fit on the disk. Needs training.max_steps."""
    shuffle_buffer: PositiveInt = 10_000
    """streaming: documents held to draw the next one from."""


class Infilling(Section):
    """Fill-in-the-middle on rows of text, as in Code Llama (arXiv 2308.12950)."""

    rate: Annotated[Finite, Field(ge=0, le=1)] = 0.9
    """Share of documents that are cut into prefix, middle and suffix; those that fill a context stay whole."""
    spm: Annotated[Finite, Field(ge=0, le=1)] = 0.5
    """Share of those written suffix first (SPM), the rest prefix first (PSM)."""
    split: Literal["character", "line"] = "character"
    """Where cuts may fall: anywhere, or between lines."""
    tokens: Annotated[list[Text], Field(min_length=4, max_length=4)] | None = None
    """Tokens before prefix, suffix and middle, and at the end; null takes those the tokenizer is known for."""


class Training(Section):
    """The optimisation."""

    objective: Objective = "sft"
    """What is optimised."""
    epochs: Positive = 3
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps; null runs all epochs."""
    global_batch: PositiveInt = 128
    """Documents per optimizer step over all devices, packed or not: a pair is one (tokens for `pretrain`, sampled
    answers for grpo and rloo, best answers for rejection_sampling)."""
    micro_batch: PositiveInt | Literal["auto"] = "auto"
    """Documents per device per forward pass (a pair is one, for grpo and rloo a prompt with all its answers);
    accumulation follows from it."""
    learning_rate: Positive = 2.0e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up; `wsd` stays at the peak and falls, linearly, at the end."""
    final_rate: Share = 0.0
    """Share of the peak that cosine, linear and wsd end at: 0.1 is LLaMA's cosine to 10 %."""
    decay: Positive = 0.1
    """wsd: the falling end. Below 1: share of all steps. 1 or more: a number of steps."""
    warmup: NonNegative = 0.03
    """Below 1: share of all steps. 1 or more: a number of steps."""
    warmup_tokens: PositiveInt | None = None
    """pretrain: warm-up in tokens, in place of `warmup`; rounded up to whole steps of global_batch tokens."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon"] = "adamw"
    """AdamW (fused), with 8-bit or paged states (bitsandbytes), Adafactor, or Muon with AdamW for what is no matrix."""
    betas: Annotated[list[Annotated[Finite, Field(gt=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay rates of AdamW's two moments; Muon's momentum is the first."""
    eps: Positive = 1.0e-8
    """AdamW's term against division by zero."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient's global norm; 0 switches clipping off."""
    max_spike: NonNegative = 5.0
    """Stop where a step's loss is this many nats above the median of the 20 before it; 0 goes on."""
    neftune_alpha: Positive | None = None
    """NEFTune: uniform noise of alpha / √(tokens · width) on a document's embeddings (arXiv 2310.05914); null: none."""
    gradient_checkpointing: StrictBool | Literal["selective"] = False
    """Recompute activations in the backward pass: less memory, more time. `selective` does so in every second layer."""
    seed: Annotated[StrictInt, Field(ge=0, le=2**32 - 1)] = 42
    """Seed of everything random: data order, adapter init, dropout."""
    save_every: PositiveInt = 200
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt | None = None
    """Keep the newest N, and the one with the lowest held-out loss; null keeps all."""
    eval_every: PositiveInt = 200
    """Steps between evaluations on eval_data."""
    join_timeout: Positive = 300.0
    """Several processes: seconds to wait for all of them at the start, before those that did not come are named."""
    stall_timeout: NonNegative = 600.0
    """Several processes: stop where none gets on with a step for so many seconds; 0 waits for ever."""


class ExportSampling(Section):
    """How a served model draws its answers where a request does not say."""

    temperature: Positive = 1.0
    """Logits are divided by this before they become probabilities."""
    top_p: Annotated[StrictInt, Field(ge=1, le=1)] | Annotated[Finite, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that hold this much probability."""


class Export(Section):
    """What a finished run writes besides its adapter."""

    merged: StrictBool = True
    """Write merged/ and prove it equal to what was trained."""
    checkpoint: Literal["last", "best"] = "last"
    """Which weights become the result: the last, or those of the evaluation with the lowest held-out loss."""
    gguf: list[Quantisation] = []
    """GGUF quantisations to write."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of the merged weights; null is the base's training dtype."""
    sampling: ExportSampling | None = None
    """What generation_config.json and the Modelfile tell servers about sampling; null is greedy, as the proof asks."""


class Recipe(Section):
    """A whole recipe, resolved: after `extends`, overrides and defaults."""

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run; letters, digits, dot, dash, underscore."""
    reproduces: Reproduces | None = None
    model: Model
    adapter: Adapter = Adapter()
    data: Annotated[list[Data], Field(min_length=1)]
    """Sources of training rows."""
    eval_data: Holdout | Annotated[list[Data], Field(min_length=1)] | None = None
    """Held-out rows: `{holdout: share}`, or sources as in `data`."""
    template: Text
    """A shipped template's name, a .jinja path, or `base` for the base model's own."""
    sequence: Sequence = Sequence()
    mixture: Mixture = Mixture()
    infilling: Infilling | None = None
    training: Training = Training()
    preference: Preference = Preference()
    reward_model: RewardModel = RewardModel()
    sampling: Sampling = Sampling()
    rewards: list[Reward] = []
    """What answers are scored by: grpo, rloo and rejection_sampling need one or more."""
    policy: Policy = Policy()
    tracking: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = ["tensorboard"]
    """Where metrics go besides metrics.jsonl."""
    launch: Text = "accelerate_configs/cpu.yaml"
    """Launch config for `llama-ft train`."""
    export: Export = Export()
    output_dir: Text | None = None
    """Run folder; null is `runs/NAME`."""

    @property
    def run_dir(self) -> str:
        """The run folder, relative to the working directory unless the recipe names an absolute one."""
        return self.output_dir or f"runs/{self.name}"
