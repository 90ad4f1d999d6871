"""A reward model: the LLaMA without its language-model head, and one number for a whole answer in its place.

r(answer) = w · h, where h is the last hidden state of the answer's last token (arXiv 2203.02155, section 3.5; Llama 2,
arXiv 2307.09288, section 3.2.2: "the classification head for next-token prediction is replaced with a regression
head"). Names and config are those of transformers' LlamaForSequenceClassification with one label, so a folder of ours
opens there with equal scores, and the other way round. Only differences between scores of one prompt's answers mean
anything: the ranking loss leaves the zero free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.utils import ModelOutput

from llama_ft.errors import UserError
from llama_ft.llama.load import check_fit, load_config, quiet_transformers
from llama_ft.llama.model import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from llama_ft.recipe.schema_model import RopeScaling

ARCHITECTURE = "LlamaForSequenceClassification"
"""What config.json of a reward model calls it."""
SCORE = "score.weight"
"""The one tensor [1, hidden] that it has and its base has not."""


@dataclass
class ScoreOutput(ModelOutput):
    """Scores, in the unit of the ranking loss: a difference of x says σ(x) that the first answer is the better one."""

    logits: Tensor | None = None
    """[B, 1] float32: of each row of the batch, where no rows were asked for."""
    scores: Tensor | None = None
    """[R] float32: at each of `rows`."""


class ScoreHead(nn.Linear):
    """Hidden states [M, hidden] → scores [M, 1], multiplied in float32 whatever the hidden states come in."""

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class LlamaForSequenceClassification(LlamaPreTrainedModel):
    """LLaMA with a score for each answer. Named as in transformers, so that PEFT and config.json call it the same."""

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = ScoreHead(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        shared: Sequence[int] | Tensor | None = None,
        rows: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> ScoreOutput:
        """Scores of input_ids [B, L], laid out as :meth:`LlamaModel.forward` says, in float32.

        rows [R]: tokens to score at, counted row by row in [B · L]; answered as `scores`. Without, each row of the
        batch is scored at its last token that is no padding, by the mask and by `config.pad_token_id`, as transformers
        does, and answered as `logits`. Padding may stand on either side. ValueError for embeddings in place of ids, or
        labels: the loss compares scores, and is the trainer's.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("a reward model reads input_ids: padding cannot be told from embeddings")
        if labels is not None:
            raise ValueError("a reward model has no labels: its loss compares the scores of two answers")
        asked = last_tokens(input_ids, attention_mask, self.config.pad_token_id) if rows is None else rows
        hidden = self.model.hidden_of(
            input_ids,
            asked,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cu_seqlens=cu_seqlens,
            shared=shared,
        )
        scores = self.score(hidden)
        return ScoreOutput(logits=scores) if rows is None else ScoreOutput(scores=scores.squeeze(-1))


def last_tokens(input_ids: Tensor, attention_mask: Tensor | None, pad: int | None) -> Tensor:
    """[B], counted in [B · L]: the last token of each row of input_ids [B, L] that is neither `pad` nor masked."""
    batch, length = input_ids.shape
    real = torch.ones_like(input_ids, dtype=torch.bool) if pad is None else input_ids != pad
    if attention_mask is not None:
        real = real & attention_mask.bool()
    last = (torch.arange(length, device=input_ids.device) * real).argmax(-1)
    return last + length * torch.arange(batch, device=input_ids.device)


def reward_config(config: LlamaConfig) -> LlamaConfig:
    """`config`, changed in place to a reward model's. `regression` keeps servers from putting a sigmoid on scores."""
    config.architectures = [ARCHITECTURE]
    config.num_labels = 1
    config.problem_type = "regression"
    return config


def first_score(hidden: int, seed: int) -> Tensor:
    """[1, hidden] float32: the score's first weights, normal with mean 0 and deviation 1 / √(hidden + 1).

    So the first scores are near 0 with a deviation of about 1 (arXiv 2009.01325, appendix B.1). A generator of its own:
    the values depend on the seed alone.
    """
    drawn = torch.empty(1, hidden, dtype=torch.float64)
    drawn.normal_(0.0, 1 / math.sqrt(hidden + 1), generator=torch.Generator().manual_seed(seed))
    return drawn.float()


def as_reward_model(causal: LlamaForCausalLM, seed: int) -> LlamaForSequenceClassification:
    """A reward model that takes over the backbone of `causal`, which must not be used afterwards.

    The backbone keeps its types (quantised layers too); the score is new and float32, see :func:`first_score`.
    """
    with torch.device("meta"):  # its own backbone is thrown away
        model = LlamaForSequenceClassification(reward_config(causal.config))
    model.model = causal.model
    device = causal.model.embed_tokens.weight.device
    model.score.weight = nn.Parameter(first_score(causal.config.hidden_size, seed).to(device))
    return model.train(causal.training)


def load_reward_model(
    folder: Path,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    rope_scaling: RopeScaling | None = None,
    max_length: int = 0,
) -> LlamaForSequenceClassification:
    """A reward model from a folder in HF's layout, its weights rounded to `dtype` and held in `compute_dtype`.

    compute_dtype None: the same. The score is held in float32. rope_scaling and max_length: see
    :func:`llama_ft.llama.load.load_config`. UserError for a folder that holds another kind of model, a classifier of
    several labels, or weights that do not fit.
    """
    config = load_config(folder, rope_scaling, max_length)
    found = (config.architectures or ["model of no stated kind"])[0]
    if found != ARCHITECTURE:
        hint = "train one with objective: reward and name its run, or a folder with config.json of that kind"
        raise UserError(f"{folder} holds a {found}, not a reward model ({ARCHITECTURE})", hint=hint)
    if config.num_labels != 1:
        what = f"{folder} is a classifier of {config.num_labels} labels, not a reward model: that has one"
        raise UserError(what, where=str(folder / "config.json"))
    with quiet_transformers():
        loaded: Any = LlamaForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they come back in the report, and are refused below by name
            output_loading_info=True,
        )
    model, report = loaded
    check_fit(report, folder)
    model.to(device, dtype if compute_dtype is None else compute_dtype)
    model.score.float()
    return model


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder's config.json says that it scores, and writes no text."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return ARCHITECTURE in (config.get("architectures") or ())
