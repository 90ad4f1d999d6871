"""What a reward model is asked in place of questions: the scores of some held-out pairs, and how often it is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_ft.data.prepare import Prepared
from llama_ft.data.render import MASKED
from llama_ft.files import write_json
from llama_ft.recipe.run import Run
from llama_ft.train.objectives.objective import won
from llama_ft.train.samples import QUESTIONS, Samples, question_of

BUCKETS = 4
"""Parts of equal size that held-out pairs are told apart by, from close calls to clear ones."""


class ScoredSamples(Samples):
    """eval/samples.json of a reward model: [{question, reference, rejected, before, during: {step: …}, after}], with
    the scores of both answers, `{"chosen": …, "rejected": …}`, at each moment."""

    def __init__(self, run: Run, prepared: Prepared):
        super().__init__(run, prepared)
        self.pairs: list[dict[str, Any]] = []
        if prepared.eval is None:
            return
        documents = prepared.eval.with_format("numpy")
        stride = max(1, len(documents) // QUESTIONS)
        places = list(range(0, len(documents), stride))[:QUESTIONS]
        self.pairs = [documents[place] for place in places]
        self.chosen = [prepared.eval_conversations[place] for place in places]

    @torch.no_grad()
    def _generate(self, model: Any, new_tokens: int) -> list[Any]:
        """The two scores of each pair, in place of an answer."""
        was_training = model.training
        model.eval()
        found = []
        for pair in self.pairs:
            chosen, rejected = (_score(model, pair[name]) for name in ("input_ids", "rejected_ids"))
            found.append({"chosen": round(chosen, 4), "rejected": round(rejected, 4)})
        model.train(was_training)
        return found

    def _new_records(self) -> list[dict[str, Any]]:
        decode = self.prepared.tokenizer.decode
        records = []
        for turns, pair in zip(self.chosen, self.pairs, strict=True):
            labels = pair["rejected_labels"]
            rejected = str(decode(labels[labels != MASKED].tolist(), skip_special_tokens=True)).strip()
            records.append({"question": question_of(turns), "reference": turns[-1]["content"], "rejected": rejected})
        return records


def _score(model: Any, ids: np.ndarray) -> float:
    tokens = torch.from_numpy(ids.astype(np.int64))[None].to(model.device)
    return float(model(input_ids=tokens, rows=torch.tensor([tokens.shape[1] - 1], device=model.device)).scores)


def write_accuracy(run: Run, buckets: Sequence[dict[str, Any]]) -> None:
    """eval/accuracy.json: [{step, bucket, by, pairs, accuracy, error}] of the last evaluation."""
    write_json(run.path / "eval" / "accuracy.json", list(buckets))


def accuracy_by_margin(scores: Tensor, margins: Tensor) -> list[dict[str, Any]]:
    """How often the better answer scores higher, by how much better it was rated; the last line is of all pairs.

    scores: of chosen and rejected answers, float32 [pairs, 2]; margins: differences of ratings [pairs], NaN where a
    pair has none. Without ratings pairs are told apart by the model's own margin: clear calls should then be right more
    often than close ones. error: standard error.
    """
    chosen, rejected = scores.unbind(1)
    right = won(chosen, rejected).numpy()
    rated = not bool(torch.isnan(margins).all())
    said = (margins if rated else (chosen - rejected).abs()).numpy()
    known = ~np.isnan(said)
    edges = np.unique(np.quantile(said[known], np.linspace(0, 1, BUCKETS + 1))) if known.any() else np.empty(0)
    found = []
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        last = number == len(edges) - 2
        inside = known & (said >= low) & ((said <= high) if last else (said < high))
        found.append(_bucket(f"{low:.2f} to {high:.2f}", right[inside]))
    found = [one | {"by": "rating" if rated else "model"} for one in found if one["pairs"]]
    return [*found, _bucket("all", right) | {"by": "all"}]


def _bucket(name: str, right: np.ndarray) -> dict[str, Any]:
    """Accuracy of some pairs, and its standard error, √(p(1 − p) / n)."""
    count = len(right)
    share = float(right.mean()) if count else math.nan
    error = math.sqrt(share * (1 - share) / count) if count else math.nan
    return {"bucket": name, "pairs": count, "accuracy": round(share, 4), "error": round(error, 4)}
