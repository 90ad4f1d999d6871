"""A context extended to four times its length still trains: held-out loss at the new positions falls to the old ones'.

The trained 260K LLaMA reads 128 tokens and has seen stories only. It first meets Shakespeare at its own length, so that
what follows is not a change of subject; then it is tuned on texts of 512 tokens, or, as a control, on as many tokens in
texts of the old length. `pytest -s tests/llama/test_context.py` prints the table of docs/models.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_ft.llama.checkpoints.door import import_checkpoint
from llama_ft.llama.context import context_length
from llama_ft.llama.load import load_model
from llama_ft.llama.model import LlamaForCausalLM
from llama_ft.recipe.schema_model import RopeScaling
from llama_ft.tokenizer.load import load_tokenizer

OLD, NEW = 128, 512
NEAR, FAR = slice(0, OLD), slice(OLD, NEW - 1)
BINS = (slice(0, 128), slice(128, 256), slice(256, 384), slice(384, 511))
TOKENS = 2048
"""Tokens per step, at either length."""


class Text:
    """Tokens of one text: nine tenths to train on, the rest held out."""

    def __init__(self, ids: Tensor):
        self.train, self.held = ids.split([len(ids) * 9 // 10, len(ids) - len(ids) * 9 // 10])

    def tune(self, model: LlamaForCausalLM, length: int, steps: int, peak: float) -> None:
        """AdamW with a linear decay over rows of `length` tokens drawn anywhere."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1.0, (step + 1) / 10) * (1 - step / steps)
            starts = torch.randint(0, len(self.train) - length, (TOKENS // length,), generator=generator)
            rows = torch.stack([self.train[start : start + length] for start in starts.tolist()])
            optimizer.zero_grad()
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()

    @torch.no_grad()
    def losses(self, model: LlamaForCausalLM, rows: int = 64) -> Tensor:
        """Held-out nats by position [511], the mean over rows of 512 tokens."""
        model.eval()
        found = torch.zeros(NEW - 1)
        for row in self.held[: rows * NEW].view(rows, NEW):
            logits = model(input_ids=row[None]).logits[0, :-1]
            found += F.cross_entropy(logits, row[1:], reduction="none") / rows
        return found


def say(what: str, losses: Tensor) -> None:
    """One line of the table."""
    print(f"\n| {what} | " + " | ".join(f"{losses[part].mean():.2f}" for part in BINS) + " |", end="")


@pytest.fixture(scope="module")
def text_and_model(real_data, tmp_path_factory) -> tuple[Text, Path]:
    """The text, and the small model that knows it at the old length."""
    folder = tmp_path_factory.mktemp("context")
    import_checkpoint(real_data / "checkpoints" / "aidreams260K.bin", folder / "stories")
    raw = (real_data / "text" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    text = Text(torch.tensor(load_tokenizer(folder / "stories")(raw).input_ids))
    model = load_model(folder / "stories", torch.float32)
    assert model.config.max_position_embeddings == OLD
    text.tune(model, OLD, steps=150, peak=2e-3)
    model.save_pretrained(folder / "adapted")
    return text, folder / "adapted"


@pytest.fixture(scope="module")
def start(text_and_model) -> Tensor:
    """Losses before: the new positions are clearly worse than the old."""
    text, folder = text_and_model
    losses = text.losses(load_model(folder, torch.float32))
    say("as it is", losses)
    assert losses[FAR].mean() > losses[NEAR].mean() + 0.15
    return losses


@pytest.fixture(scope="module")
def control(text_and_model, start) -> Tensor:
    """Losses after as many tokens at the old length, without scaling."""
    text, folder = text_and_model
    model = load_model(folder, torch.float32)
    text.tune(model, OLD, steps=60, peak=1e-3)
    losses = text.losses(model)
    say("tuned on 128", losses)
    return losses


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_loss_at_new_positions_falls_to_that_of_the_old(kind, text_and_model, start, control):
    text, folder = text_and_model
    model = load_model(folder, torch.float32, rope_scaling=RopeScaling(rope_type=kind, factor=NEW / OLD))
    assert context_length(model.config) == NEW
    untuned = text.losses(model)
    text.tune(model, NEW, steps=60, peak=1e-3)
    tuned = text.losses(model)
    say(f"{kind}, not tuned", untuned)
    say(f"{kind}, tuned on 512", tuned)
    for name, before in (("the base", start), ("scaling alone", untuned), ("tuning at the old length", control)):
        fall = float(before[FAR].mean() - tuned[FAR].mean())
        assert fall > 0.05, f"{fall:.3f} nats against {name}"
    near, far = (float((start[part] - tuned[part]).mean()) for part in (NEAR, FAR))
    assert far > near + 0.15, "what was gained is length, not acquaintance with the text"
    assert abs(float(tuned[FAR].mean() - tuned[NEAR].mean())) < 0.05, "the new positions are as good as the old"
