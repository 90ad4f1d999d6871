"""The loss head: cross-entropy of labelled tokens only, without ever holding their logits.

The head is 21 % of all work on a 135M model with a 49K vocabulary, and its logits are its largest tensor. Rows without
a label are left out, and the rest goes through in chunks: logits of one chunk, its loss, and at once its gradient,
which replaces the logits. With a frozen head that is 4·V·h FLOP per labelled token instead of 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_ft.llama.projections import multiplied_in

IGNORE = -100
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Size of one chunk of float32 logits: small beside the weights, hundreds of rows for the GEMM."""
ROW_BYTES = 2 * 2**20
"""On a CPU the softmax walks over a chunk in groups of rows that its cache holds: five passes, one trip to memory."""


class LossHead(nn.Linear):
    """The language-model head [V, h]: logits of hidden states; or, given their targets, the summed loss and no logits.

    The loss is asked of the module, not computed beside it, so that whatever gathers a sharded weight before a module
    runs (ZeRO-3's hooks, FSDP2, offloading) does so here too.
    """

    def forward(self, hidden: Tensor, targets: Tensor | None = None, *, fast: bool = True) -> Tensor:
        if targets is None:
            return super().forward(hidden)
        return (linear_cross_entropy if fast else linear_cross_entropy_plain)(hidden, self.weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        device = hidden.device.type
        dtype = multiplied_in(weight)
        with torch.autocast(device, enabled=False):
            h_all, w = hidden.to(dtype), weight.to(dtype)
            chunk = max(1, CHUNK_BYTES["cpu" if device == "cpu" else "cuda"] // (4 * len(w)))
            losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            grad_hidden = torch.empty_like(h_all) if need_hidden else None
            grad_weight = torch.zeros_like(w, dtype=torch.float32) if need_weight else None
            buffer = h_all.new_empty(min(chunk, len(targets)), len(w))
            for start in range(0, len(targets), chunk):
                part = slice(start, start + chunk)
                h, target = h_all[part], targets[part, None]
                logits = torch.mm(h, w.t(), out=buffer[: len(h)])
                losses[part] = _softmax_gradient_(logits, target, need_hidden or need_weight)
                if grad_hidden is not None:
                    torch.mm(logits, w, out=grad_hidden[part])
                if grad_weight is not None:
                    grad_weight.add_(logits.t() @ h)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
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
        return grad_hidden, grad_weight, None


def _softmax_gradient_(logits: Tensor, target: Tensor, want_gradient: bool) -> Tensor:
    """Losses [M] in float32 of logits [M, V] and targets [M, 1]; logits become softmax − one-hot where wanted.

    Arithmetic in float32 also for 16-bit logits: 1 − p of a confident token must not be rounded away.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    rows = max(1, ROW_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else max(1, len(logits))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        block = logits[part]
        p = block.float()  # float32 logits are worked on in place
        highest = p.amax(-1, keepdim=True)
        at_target = p.gather(-1, target[part])
        total = p.sub_(highest).exp_().sum(-1, keepdim=True)
        losses[part] = (total.log() + highest - at_target).squeeze(-1)
        if want_gradient:
            p.div_(total).scatter_add_(-1, target[part], torch.full_like(total, -1.0))
            if p.dtype != block.dtype:
                block.copy_(p)
    return losses


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over rows of −log softmax(hidden · weightᵀ)[target], in nats.

    hidden [M, h]; weight [V, h]; targets [M], none ignored. Products in the weight's type, or autocast's. Returns a
    float32 scalar; gradients come in the types of hidden and weight.
    """
    if not torch.is_grad_enabled():  # what needs_input_grad does not know: an evaluation wants no gradient made
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def linear_cross_entropy_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The plain twin, which holds all logits: the reference of the tests, and a flag away in the model."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def shift_labels(labels: Tensor, bounds: list[int]) -> Tensor:
    """What each of N tokens should predict: the next token's label, nothing at a document's end. [N] → [N]."""
    targets = torch.full_like(labels, IGNORE)
    targets[:-1] = labels[1:]
    ends = torch.tensor(bounds[1:], device=labels.device) - 1
    targets[ends] = IGNORE
    return targets
