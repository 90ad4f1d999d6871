"""The measurements behind an export: two models look at the same tokens and answer the same prompts.

Both compute in float32, whatever their weights are stored in. So a difference comes from the weights, which are what an
export changes, and not from the arithmetic of the moment. They are asked one after the other, so that only one of
them is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

DOCUMENTS = 8
"""Held-out documents that are looked at, more when they are short."""
LONGEST = 256
"""Tokens of a document that are looked at."""
POSITIONS = 500
"""Positions to reach, if the data has as many: rounding to bfloat16 alone changes the first token at 0.3 % of them."""
PROMPTS = 3
"""Prompts that are answered."""
NEW_TOKENS = 48
"""Longest answer."""
IGNORE = -100
_ROWS = 64  # positions compared at once: a vocabulary of 128K in float64 is 1 MB per row


@dataclass(frozen=True)
class Document:
    """Ids and labels (−100 = no loss) of one document."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its ids, end token included, and the distance of the best two logits at each."""

    ids: list[int]
    gaps: list[float]


@dataclass(frozen=True)
class Seen:
    """What one model said: logits [L, V] float32 of each document on the CPU, and an answer to each prompt."""

    logits: list[Tensor]
    answers: list[Answer]


def choose_documents(rows: Sequence[dict[str, Any]], *, longest: int = LONGEST) -> list[Document]:
    """Up to DOCUMENTS rows (`input_ids`, `labels`) spread over all, and as many more as POSITIONS needs."""
    count = len(rows)
    if not count:
        return []
    stride = max(1, count // DOCUMENTS)
    first = list(range(0, count, stride))[:DOCUMENTS]
    order = [*first, *sorted(set(range(count)) - set(first))]
    chosen: list[Document] = []
    positions = 0
    for index in order:
        if len(chosen) >= DOCUMENTS and positions >= POSITIONS:
            break
        row = rows[index]
        chosen.append(Document([int(i) for i in row["input_ids"][:longest]], [int(i) for i in row["labels"][:longest]]))
        positions += len(chosen[-1].ids)
    return chosen


def pick_device(model: PreTrainedModel) -> torch.device:
    """The GPU when a float32 model fits beside what is there already, else the CPU."""
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.3 * size:
        return torch.device("cuda")
    return torch.device("cpu")


@torch.inference_mode()
def observe(model: Any, documents: list[Document], prompts: list[list[int]]) -> Seen:
    """What a causal language model says: logits of each document, alone and so without padding, and greedy answers.

    The model's own generation_config says where an answer ends.
    """
    was_training = model.training
    model.eval()
    device = model.device
    logits, answers = [], []
    for document in documents:
        ids = torch.tensor([document.ids], device=device)
        logits.append(model(input_ids=ids, use_cache=False).logits[0].float().cpu())
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.stack([step[0].float() for step in out.logits]).topk(2, dim=-1).values
        answers.append(Answer(out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    model.train(was_training)
    return Seen(logits, answers)


def compare(trained: Seen, merged: Seen, documents: list[Document]) -> dict[str, Any]:
    """The measurements of export.json over all positions of all documents.

    KL(p‖q) = Σ p·(log p − log q) per position (float64), averaged; nll in nats per labelled token.
    """
    deltas = [0.0]
    kl, same, positions = 0.0, 0, 0
    nll, labelled = [0.0, 0.0], 0
    for left, right, document in zip(trained.logits, merged.logits, documents, strict=True):
        targets = torch.tensor([*document.labels[1:], IGNORE])
        for start in range(0, len(left), _ROWS):
            part = slice(start, start + _ROWS)
            p, q, target = left[part], right[part], targets[part]
            deltas.append((p - q).abs().max().item())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
            log_p, log_q = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            kept = target != IGNORE
            for side, log in enumerate((log_p, log_q)):
                nll[side] -= log[kept].gather(-1, target[kept, None]).sum().item()
            labelled += int(kept.sum())
        positions += len(left)
    return {
        "documents": len(documents),
        "positions": positions,
        "max_delta_logit": torch.tensor(deltas, dtype=torch.float64).max().item(),  # Python's max passes over a NaN
        "mean_kl": kl / positions if positions else 0.0,
        "top1_agreement": same / positions if positions else 1.0,
        "labelled_tokens": labelled,
        "nll_trained": nll[0] / labelled if labelled else None,
        "nll_merged": nll[1] / labelled if labelled else None,
    }


def compare_answers(trained: Answer, merged: Answer) -> dict[str, Any]:
    """Whether two greedy answers are the same; else the first token that differs and the trained model's gap there."""
    if trained.ids == merged.ids:
        return {"equal": True, "tokens": len(trained.ids)}
    pairs = zip(trained.ids, merged.ids, strict=False)
    shorter = min(len(trained.ids), len(merged.ids))
    at = next((i for i, (left, right) in enumerate(pairs) if left != right), shorter)
    gap = trained.gaps[at] if at < len(trained.gaps) else None
    return {"equal": False, "tokens": len(trained.ids), "differs_at": at, "top2_gap": gap}
