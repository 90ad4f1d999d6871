"""The loss head: cross-entropy of labelled tokens only, or the log-probability of each, without holding their logits.

The head is 21 % of all work on a 135M model with a 49K vocabulary, and its logits are its largest tensor. Rows without
a label are left out, and the rest goes through in chunks: logits of one chunk, its loss, and at once its gradient,
which replaces the logits. With a frozen head that is 4·V·h FLOP per labelled token instead of 6.

Where each token's log-probability is wanted, its gradient is not known before backward; but it only scales that of its
row, ∂ log p / ∂ hidden, which is made at once. The gradient of a trained head is a sum of rows, for which backward
makes the logits a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import ModelOutput

from llama_ft.llama.projections import multiplied_in

IGNORE = -100
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of one chunk of float32 logits: small beside the weights, hundreds of rows for the GEMM."""
ROW_BYTES = 2 * 2**20
"""On a CPU the softmax walks over a chunk in groups of rows that its cache holds: five passes, one trip to memory."""


@dataclass
class LossOutput(CausalLMOutputWithPast):
    """A loss, and on request what each document has to do with it."""

    document_losses: Tensor | None = None
    """[documents] float32: nats of a document's labelled tokens together, without a gradient."""


@dataclass
class TokenOutput(ModelOutput):
    """Log-probabilities of the tokens that were asked about."""

    log_probs: Tensor | None = None
    """[M] float32, in nats."""


class LossHead(nn.Linear):
    """The language-model head [V, h]: logits of hidden states; or, given their targets, the summed loss and no logits,
    or (`each`) the log-probability of each target at a temperature.

    The loss is asked of the module, not computed beside it, so that whatever gathers a sharded weight before a module
    runs (ZeRO-3's hooks, FSDP2, offloading) does so here too.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        fast: bool = True,
        each: bool = False,
        temperature: float = 1.0,
        kept: list[Tensor] | None = None,
    ) -> Tensor:
        """`kept` receives the losses that the sum is of, [M] float32, without a gradient."""
        if targets is None:
            return super().forward(hidden)
        if each:
            log_probs = linear_log_probs if fast else linear_log_probs_plain
            return log_probs(hidden, self.weight, targets, temperature)
        return (linear_cross_entropy if fast else linear_cross_entropy_plain)(hidden, self.weight, targets, kept)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, kept: list[Tensor] | None) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = multiplied_in(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            h_all, w = hidden.to(dtype), weight.to(dtype)
            losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(h_all) if need_hidden else None
            grad_weight = torch.zeros_like(w, dtype=torch.float32) if need_weight else None
            for part, logits, loss in _chunks(h_all, w, targets, want_gradient=need_hidden or need_weight):
                losses[part] = loss
                if grad_hidden is not None:
                    torch.mm(logits, w, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight.add_(logits.t() @ h_all[part])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        if kept is not None:
            kept.append(losses)
        return losses.sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        # The gradients of the sum were made in forward; what follows it only scales them. Not in place: a second
        # backward through the same graph must find them as they were.
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * grad.to(grad_hidden.dtype)).to(ctx.dtypes[0])
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.dtypes[1])
        return grad_hidden, grad_weight, None, None


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
        ctx.temperature, ctx.trained = temperature, ctx.needs_input_grad[1]
        dtype = multiplied_in(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            h, w = hidden.to(dtype), weight.to(dtype)
            log_probs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            unit = torch.empty_like(h) if ctx.needs_input_grad[0] and not ctx.trained else None
            for part, logits, losses in _chunks(h, w, targets, temperature, want_gradient=unit is not None):
                log_probs[part] = -losses
                if unit is not None:
                    torch.mm(logits, w, out=unit[part])
        ctx.dtypes = hidden.dtype, dtype
        ctx.save_for_backward(*((h, weight, targets) if ctx.trained else (unit,)))
        return log_probs

    @staticmethod
    def backward(ctx, grad: Tensor):
        # What was kept are gradients of −log p. Not in place: a second backward must find them as they were.
        scale = -grad[:, None]
        if not ctx.trained:
            (unit,) = ctx.saved_tensors
            return (unit * scale).to(ctx.dtypes[0]), None, None, None
        h, weight, targets = ctx.saved_tensors
        w = weight.to(ctx.dtypes[1])
        scaled = (h * scale).to(h.dtype)
        grad_hidden = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(w, dtype=torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            for part, logits, _ in _chunks(h, w, targets, ctx.temperature, want_gradient=True):
                if grad_hidden is not None:
                    torch.mm(logits, w, out=grad_hidden[part])
                grad_weight.add_(logits.t() @ scaled[part])
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(ctx.dtypes[0])
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def _rows_at_once(weight: Tensor) -> int:
    """How many rows of logits make a chunk."""
    return max(1, CHUNK_BYTES["cpu" if weight.device.type == "cpu" else "cuda"] // (4 * len(weight)))


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, *, want_gradient: bool
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their logits [m, V], their losses [m]), chunk by chunk in one buffer; see :func:`_softmax_gradient_`."""
    chunk = _rows_at_once(weight)
    buffer = hidden.new_empty(min(chunk, len(targets)), len(weight))
    for start in range(0, len(targets), chunk):
        part = slice(start, start + chunk)
        logits = torch.mm(hidden[part], weight.t(), out=buffer[: len(hidden[part])])
        yield part, logits, _softmax_gradient_(logits, targets[part, None], want_gradient, temperature)


def _softmax_gradient_(logits: Tensor, target: Tensor, want_gradient: bool, temperature: float = 1.0) -> Tensor:
    """Losses [M] in float32 of logits [M, V] and targets [M, 1]; logits become (softmax − one-hot) / temperature, the
    gradient, where wanted. Softmax and loss are of logits / temperature.

    Arithmetic in float32 also for 16-bit logits: 1 − p of a confident token must not be rounded away.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    rows = max(1, ROW_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        block = logits[part]
        p = block.float()  # float32 logits are worked on in place
        if temperature != 1.0:
            p.div_(temperature)
        highest = p.amax(-1, keepdim=True)
        at_target = p.gather(-1, target[part])
        total = p.sub_(highest).exp_().sum(-1, keepdim=True)
        losses[part] = (total.log() + highest - at_target).squeeze(-1)
        if want_gradient:
            p.div_(total.mul_(temperature))
            p.scatter_add_(-1, target[part], torch.full_like(total, -1.0 / temperature))
            if p.dtype != block.dtype:
                block.copy_(p)
    return losses


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """Sum over rows of −log softmax(hidden · weightᵀ)[target], in nats; `kept` receives its terms, [M] float32.

    hidden [M, h]; weight [V, h]; targets [M], none ignored. Products in the weight's type, or autocast's. Returns a
    float32 scalar; gradients come in the types of hidden and weight.
    """
    if not torch.is_grad_enabled():  # what needs_input_grad does not know: an evaluation wants no gradient made
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets, kept)


def linear_cross_entropy_plain(
    hidden: Tensor, weight: Tensor, targets: Tensor, kept: list[Tensor] | None = None
) -> Tensor:
    """The plain twin, which holds all logits: the reference of the tests, and a flag away in the model."""
    losses = F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")
    if kept is not None:
        kept.append(losses.detach())
    return losses.sum()


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(hidden · weightᵀ / temperature)[target] of each row, in nats: [M] float32.

    hidden [M, h]; weight [V, h]; targets [M], none ignored; temperature > 0. Products in the weight's type, or
    autocast's; gradients come in the types of hidden and weight, and can be taken once (no second derivative).
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearLogProbs.apply(hidden, weight, targets, temperature)


def linear_log_probs_plain(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The plain twin, which holds all logits."""
    logits = F.linear(hidden, weight).float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)


def shift_labels(labels: Tensor, bounds: list[int]) -> Tensor:
    """What each of N tokens should predict: the next token's label, nothing at a document's end. [N] → [N]."""
    targets = torch.full_like(labels, IGNORE)
    targets[:-1] = labels[1:]
    ends = torch.tensor(bounds[1:], device=labels.device) - 1
    targets[ends] = IGNORE
    return targets


def sums_of_documents(losses: Tensor, places: Tensor, bounds: list[int]) -> Tensor:
    """[documents] of the losses [M] of the tokens at `places` [M], a document between each two of `bounds`."""
    ends = torch.tensor(bounds[1:], device=places.device)
    document = torch.bucketize(places, ends, right=True)
    return losses.new_zeros(len(ends)).index_add_(0, document, losses)
