"""A base model with more tokens: a copy in which old ids keep their rows, and each new one begins as its parts' mean.

A new token's row, of the embedding and, where the head is untied, of the head, is the mean of the rows of the old
tokens that it stood for. Such a mean lies in the convex hull of the rows that are there, which Mundra et al. (arXiv
2407.05841) show to be a good place to start from; Yamaguchi et al. (arXiv 2406.11477) find means over the old cut the
better for little text to train on than costlier ways. With h the state and w the rows, a new logit is the mean of its
parts' logits, hence exp(h·w_new) ≤ the mean of their exp(h·w): no new token takes more probability than its likeliest
part had. (A row of zeros, or of noise, has no such bound: Hewitt, nlp.stanford.edu/~johnhew/vocab-expansion.html.)

Rows without a token, which round a vocabulary up, are the mean of all old rows, as those that training adds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from llama_ft.errors import UserError
from llama_ft.files import write_json
from llama_ft.llama import smollm2
from llama_ft.llama.base import locate_base
from llama_ft.llama.checkpoints.door import check_dest, open_checkpoint, write_checkpoint
from llama_ft.llama.checkpoints.hf import EMBEDDING, HEAD
from llama_ft.llama.checkpoints.layout import Weights
from llama_ft.llama.load import load_model
from llama_ft.tokenizer.convert import CLASS
from llama_ft.tokenizer.grow import Grown, add_names, add_pieces
from llama_ft.tokenizer.load import load_tokenizer
from llama_ft.tokenizer.settings import NAMES

TEXTS = (
    "The river rose in the night, and by morning the lower road was under water.",
    "def area(width, height):\n    return width * height\n",
    "In 1969 two people walked on the Moon; the third, Michael Collins, stayed in orbit.",
    "Mix 250 g of flour with a pinch of salt, then add the milk slowly while stirring.",
    "Q: Why is the sky blue?\nA: Short waves of light are scattered more than long ones.",
    "Les enfants jouaient dans le jardin pendant que la pluie tombait sur les toits.",
)
"""What the proof reads."""
TOLERANCE = 0.25
"""Of a logit: a head with more rows may be multiplied in other blocks, whose sums in bfloat16 round otherwise (to round
SmolLM2's weights to it moves logits by 0.18). In float32 the difference was 0 wherever it was measured."""
STALE = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")
"""Files of the base that would say something else than the new tokenizer.json."""


@dataclass(frozen=True)
class GrownModel:
    """What was written, and what was measured on TEXTS, in the type of the weights (float16's: float32).

    `tokens`: of the base and now. `rows`: of the embedding, before and now. `same_ids`: texts without new tokens,
    which are cut as before. `states`, `rows_kept`: whether the last hidden states and the old rows are equal bit by
    bit. `difference`: largest |Δ| of an old id's logit as the whole model computes it. `share`: mean probability that
    all new ids together take; `loss`: by how much the mean loss of the old ids rises for it, in nats a token.
    """

    folder: Path
    grown: Grown
    tokens: tuple[int, int]
    rows: tuple[int, int]
    tied: bool
    same_ids: int
    states: bool
    rows_kept: bool
    difference: float
    share: float
    loss: float


def grow_model(
    base: str,
    dest: Path,
    *,
    names: Sequence[str] = (),
    other: str | None = None,
    count: int = 0,
    multiple: int = 1,
    overwrite: bool = False,
) -> GrownModel:
    """Writes `base` with more tokens into the folder `dest`, in Hugging Face's layout, and proves what did not change.

    names: tokens by name. other, count: a BPE tokenizer, and how many of its pieces. multiple: of what the number of
    rows is. The weights keep their stored type. Raises UserError for tokens that cannot be added, a base that cannot
    be read, or a folder that is not free; MachineFault when the disk refuses.
    """
    if not names and other is None:
        hint = '--tokens "<a>,<b>", --tokens FILE, or --from TOKENIZER --add N'
        raise UserError("nothing is to be added", key="tokens", hint=hint)
    folder = locate_base(base)
    check_dest(folder, dest.expanduser().resolve(), overwrite=overwrite)
    checked = open_checkpoint(folder)
    old = _backend(folder)
    grown = _grow(old, names, other, count)
    have, before = old.get_vocab_size(), checked.config["vocab_size"]
    if have > before:
        what = f"the tokenizer of {base} has {have:,} tokens, its embedding {before:,} rows"
        raise UserError(
            what, key="base", hint="take a base whose rows suffice: new rows could not be told from missing ones"
        )
    size = max(before, grown.backend.get_vocab_size())
    size += -size % multiple
    bigger = _with_rows(checked, folder, grown, have, size)
    write_checkpoint(bigger, folder, dest.expanduser().resolve(), overwrite=overwrite, doing="growing")
    return _proof(folder, dest, checked, old, grown, (before, size))


def _grow(old: Tokenizer, names: Sequence[str], other: str | None, count: int) -> Grown:
    """Pieces first, names behind them."""
    grown = Grown(old, {})
    if other is not None:
        grown = add_pieces(old, _backend(smollm2.smollm2_folder() if other == smollm2.NAME else other), count)
    if names:
        named = add_names(grown.backend, names)
        # A name's parts may be pieces that were added with it: their own parts, then.
        parts = {
            token: [one for part in of for one in grown.parts.get(part, [part])] for token, of in named.parts.items()
        }
        grown = Grown(named.backend, grown.parts | parts, grown.passed_over)
    return grown


def _backend(source: str | Path) -> Tokenizer:
    """A tokenizer as a run would open it, without truncation and padding."""
    backend = Tokenizer.from_str(load_tokenizer(source).backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend


def _with_rows(checked: Weights, folder: Path, grown: Grown, have: int, size: int) -> Weights:
    """The checkpoint with `size` rows. Those from `have` on are new: a base's spare rows belong to no token."""
    config = {**checked.config, "vocab_size": size}
    widened = {EMBEDDING, HEAD} & checked.shapes.keys()

    def read(name: str) -> Tensor:
        tensor = checked.read(name)
        return new_rows(tensor, grown.parts, have, size) if name in widened else tensor

    def tokenizer(made: Path) -> Path:
        # What is not in tokenizer.json (roles, template, whether BOS comes first) is the base's, converted or copied.
        checked.tokenizer(made)
        for name in STALE:
            (made / name).unlink(missing_ok=True)
        grown.backend.save(str(made / "tokenizer.json"))
        _settle_config(made / "tokenizer_config.json", folder)
        return folder / "tokenizer.json"

    shapes = {name: (size, *shape[1:]) if name in widened else shape for name, shape in checked.shapes.items()}
    companions = tuple(path for path in checked.companions if path.name not in STALE)
    return replace(checked, config=config, shapes=shapes, read=read, tokenizer=tokenizer, companions=companions)


def _settle_config(file: Path, base: Path) -> None:
    """Makes tokenizer.json the one that speaks: its own class, its own list of added tokens, the base's roles."""
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    said.pop("added_tokens_decoder", None)
    opened = load_tokenizer(base)
    roles = {name: text for name in NAMES if (text := getattr(opened, name))}
    write_json(file, {**roles, **said, "tokenizer_class": CLASS})


def new_rows(rows: Tensor, parts: dict[int, list[int]], have: int, size: int) -> Tensor:
    """Rows [V, D] -> [size, D] of the same type: `have` old ones as they are, then each new id's mean over its parts.

    `parts`: of each new id, ids below `have`. Ids without parts get the mean of the old rows. Means are taken in
    float64 and rounded once.
    """
    grown = torch.empty(size, rows.shape[1], dtype=rows.dtype)
    grown[:have] = rows[:have]
    grown[have:] = rows[:have].mean(dim=0, dtype=torch.float64).to(rows.dtype)
    for token, old in parts.items():
        grown[token] = rows[old].mean(dim=0, dtype=torch.float64).to(rows.dtype)
    return grown


@torch.no_grad()
def _proof(
    folder: Path, dest: Path, checked: Weights, old: Tokenizer, grown: Grown, rows: tuple[int, int]
) -> GrownModel:
    """Reads TEXTS with both models, one after the other."""
    new = _backend(dest)
    dtype = torch.bfloat16 if checked.dtype == torch.bfloat16 else torch.float32
    have = old.get_vocab_size()
    cut = [old.encode(text).ids for text in TEXTS]
    same = [ids for text, ids in zip(TEXTS, cut, strict=True) if new.encode(text).ids == ids]
    states, logits = zip(*(_read(folder, cut, dtype), _read(dest, cut, dtype)), strict=True)
    equal_states = all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    difference = max(float((a[:, :have] - b[:, :have]).abs().max()) for a, b in zip(*logits, strict=True))
    ids = sorted(grown.parts)
    mass = torch.cat([b.double().softmax(dim=-1)[:, ids].sum(dim=-1) for b in logits[1]])
    kept = open_checkpoint(dest)
    heads = {EMBEDDING, HEAD} & checked.shapes.keys()
    return GrownModel(
        dest,
        grown,
        (have, grown.backend.get_vocab_size()),
        rows,
        HEAD not in checked.shapes,
        len(same),
        equal_states,
        all(torch.equal(checked.read(name)[:have], kept.read(name)[:have]) for name in heads),
        difference,
        float(mass.mean()),
        float(-torch.log1p(-mass).mean()),
    )


def _read(folder: Path, texts: Sequence[Sequence[int]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(last hidden states [L, D], logits [L, V] in float32) of each text, computed in `dtype`."""
    model = load_model(folder, dtype).eval()
    states, logits = [], []
    for ids in texts:
        tokens = torch.tensor([ids])
        states.append(model.model(tokens).last_hidden_state[0])
        logits.append(model(tokens).logits[0].float())
    return states, logits


def token_names(said: str) -> list[str]:
    """What `--tokens` names: the lines of a file, or the texts between commas. A file's lines keep their spaces."""
    path = Path(said).expanduser()
    if path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise UserError("is no UTF-8 text", where=str(path), key="tokens", hint="one token a line") from error
        return [line for line in lines if line.strip()]
    if path.suffix in (".txt", ".list", ".tsv", ".csv", ".json") or path.is_dir():
        what = "is a folder" if path.is_dir() else "no such file"
        raise UserError(what, where=said, key="tokens", hint='a file of one token a line, or "<a>,<b>"')
    return [name.strip() for name in said.split(",")]


def print_grown(base: str, dest: Path, *, tokens: str | None, **settings: Any) -> None:
    """Grows a model and tells what was added and what was proven. UserError where the proof fails."""
    done = grow_model(base, dest, names=token_names(tokens) if tokens is not None else (), **settings)
    backend, parts = done.grown.backend, done.grown.parts
    print(f"{done.tokens[1] - done.tokens[0]:,} tokens added to {done.tokens[0]:,}")
    for token, old in list(parts.items())[:5]:
        spelt = " + ".join(repr(backend.decode([part], skip_special_tokens=False)) for part in old)
        print(f"  {token} {backend.decode([token], skip_special_tokens=False)!r} = {spelt}")
    if done.grown.passed_over:
        print(f"  {done.grown.passed_over:,} pieces passed over: more than one merge away, or never one word here")
    head = "head and embedding are one" if done.tied else "embedding and head"
    print(f"rows {done.rows[0]:,} -> {done.rows[1]:,} ({head})")
    print(f"{done.same_ids} of {len(TEXTS)} texts hold no new token and are cut as before")
    print(f"old rows {_equal(done.rows_kept)}, last hidden states of {len(TEXTS)} texts {_equal(done.states)}")
    print(f"old ids' logits: largest difference {done.difference:g}")
    print(f"new ids take {done.share:.2%} of the probability: loss of the old ids + {done.loss:.4f} nats a token")
    print(dest)
    if not (done.rows_kept and done.states and done.difference < TOLERANCE):
        raise RuntimeError(f"{dest} does not compute what {base} does")


def _equal(same: bool) -> str:
    return "equal bit by bit" if same else "DIFFERENT"
