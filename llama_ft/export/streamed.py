"""The proof of a model that memory does not hold: weights are read from disk, some rows at a time, for each product.

Both sides are ordinary models whose products, embedding and head have no weights of their own. The trained side is our
LLaMA and computes Wx + s·B(Ax), as training did, and not (W + s·BA)x, as the merge does; the merged side is
transformers' own LlamaForCausalLM. Each weight is read once for all documents, so an answer of many tokens, which would
read the model once for each of them, is not asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from llama_ft.adapters.lora_file import LoraFile
from llama_ft.adapters.rows import Requantise, row_parts, trained_rows
from llama_ft.errors import UserError
from llama_ft.export.proof import Document, Seen
from llama_ft.llama.checkpoints.shards import Stored, stored_tensors
from llama_ft.llama.init import meta_model
from llama_ft.llama.projections import project_each

DOCUMENTS, LONGEST = 4, 128
"""Documents, and tokens of each, that are looked at: the logits of 512 positions of 128K words are 250 MiB a side."""
MARGIN = 1.25
"""What a model in float32 takes beside its weights while it is asked, as a factor."""
Parts = Callable[[], Iterator[tuple[slice, Tensor]]]


def too_large(stored: dict[str, Stored]) -> bool:
    """Whether the float32 weights of a model exceed what the machine has free now."""
    values = sum(torch.Size(entry.shape).numel() for entry in stored.values())
    return 4 * values * MARGIN > psutil.virtual_memory().available


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one product: factors A [r, in] and B [out, r], their scale, DoRA's lengths [out]."""

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def applied(self, product: Tensor, x: Tensor, weight: Tensor, rows: slice) -> Tensor:
        """Wx of some rows, of W's rows `weight`, with the adapter's part (DoRA: arXiv 2402.09353, equation 5)."""
        product = product + self.scale * F.linear(F.linear(x, self.down), self.up[rows])
        if self.magnitude is not None:
            lengths = torch.linalg.vector_norm(weight + self.scale * (self.up[rows] @ self.down), dim=1)
            product = product * (self.magnitude[rows] / lengths)
        return product


class RowLinear(nn.Module):
    """A product with a weight [out, in] that is read for it part by part."""

    def __init__(self, rows: int, parts: Parts, update: Update | None = None):
        super().__init__()
        self.rows, self.parts, self.update = rows, parts, update

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.rows)
        for rows, weight in self.parts():
            product = F.linear(x, weight)
            out[..., rows] = product if self.update is None else self.update.applied(product, x, weight, rows)
        return out


class RowEmbedding(nn.Module):
    """Rows of a table [V, hidden] that is read part by part."""

    def __init__(self, width: int, parts: Parts):
        super().__init__()
        self.width, self.parts = width, parts

    def forward(self, ids: Tensor) -> Tensor:
        out = torch.empty(*ids.shape, self.width)
        for rows, weight in self.parts():
            here = (ids >= rows.start) & (ids < rows.stop)
            out[here] = weight[ids[here] - rows.start]
        return out


def trained_side(
    config: LlamaConfig, base: Path, lora: LoraFile | None, dtype: torch.dtype, requantise: Requantise | None
) -> Any:
    """Our LLaMA with base and adapter as they were trained; see :func:`llama_ft.adapters.merge.merge_adapter`."""
    stored = stored_tensors(base)
    whole = lora.whole if lora is not None else {}

    def parts(name: str) -> Parts:
        if name in whole:
            return lambda: ((rows, whole[name][rows]) for rows in row_parts(tuple(whole[name].shape)))
        return lambda: trained_rows(name, stored[name], dtype, requantise)

    def update(name: str) -> Update | None:
        if lora is None or name not in lora.factors:
            return None
        return Update(*lora.factors[name], lora.scale, lora.magnitudes.get(name))

    model: Any = meta_model(config)
    _fill(model, parts, update)
    model.model.set_project(project_each)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.frequencies(torch.device("cpu"))[0]
    return model


def merged_side(folder: Path) -> Any:
    """transformers' own class with the folder's weights, read row by row. UserError if a weight is missing or left."""
    config, stored = LlamaConfig.from_pretrained(folder), stored_tensors(folder)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)

    def parts(name: str) -> Parts:
        return lambda: trained_rows(name, stored[name], torch.float32)

    wanted = {name for name, _ in model.named_parameters()}
    faults = [f"missing: {name}" for name in sorted(wanted - stored.keys())]
    faults += [f"unexpected: {name}" for name in sorted(stored.keys() - wanted)]
    faults += [
        f"{name} is {list(stored[name].shape)}, not {list(weight.shape)}"
        for name, weight in model.named_parameters()
        if name in stored and stored[name].shape != tuple(weight.shape)
    ]
    if faults:
        raise UserError(f"the merged model does not open cleanly: {'; '.join(faults[:3])}", where=str(folder))
    _fill(model, parts, lambda name: None)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


@torch.no_grad()
def _fill(model: Any, parts: Callable[[str], Parts], update: Callable[[str], Update | None]) -> None:
    """Puts what reads its weight in the place of every linear layer and of the embedding; norms are held."""
    tied = model.config.tie_word_embeddings
    for place, module in list(model.named_modules()):
        name = f"{place}.weight"
        if isinstance(module, nn.Embedding):
            model.set_submodule(place, RowEmbedding(module.embedding_dim, parts(name)))
        elif isinstance(module, nn.Linear):
            source = "model.embed_tokens.weight" if tied and place == "lm_head" else name
            model.set_submodule(place, RowLinear(module.out_features, parts(source), update(name)))
        elif getattr(module, "weight", None) is not None:
            module.weight = nn.Parameter(torch.cat([part for _, part in parts(name)()]), requires_grad=False)


@torch.inference_mode()
def observe_streamed(model: Any, documents: list[Document]) -> Seen:
    """Logits of all documents in one pass, each to its own length; no answers.

    They stand in rows of their own, filled up behind their ends, where a causal model does not look.
    """
    longest = max(len(document.ids) for document in documents)
    ids = torch.tensor([[*document.ids, *[document.ids[-1]] * (longest - len(document.ids))] for document in documents])
    logits = model(input_ids=ids, use_cache=False).logits
    return Seen([one[: len(document.ids)] for one, document in zip(logits, documents, strict=True)], [])
