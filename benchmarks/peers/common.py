"""What every contender's process shares: the spec that it reads, the clock that times it, the answer that it writes.

    python -m benchmarks.peers.trl SPEC.json

A contender runs in a virtual environment of its own, so this module needs nothing but torch and safetensors. What it
trains on are ids and labels already, in the order of training; what it does with them is its own business, and the
clock writes down what it saw: a digest of every document, tokens, positions computed, seconds, loss. The gates of
:mod:`benchmarks.gates` hold that against what every other contender saw.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

STARTED = time.time()
MASKED = -100


@dataclass(kw_only=True)
class Spec:
    """One run of one contender."""

    contender: str
    """Its name in the tables; a harness looks up there which of its tunings is meant."""
    model: str
    """Folder in Hugging Face's format, config, tokenizer and safetensors."""
    documents: str
    """jsonl of {"input_ids", "labels"}, whole documents in training order; with `packed`, also "row": documents of one
    number lie in one row. Labels stand where their tokens stand (nobody shifted them), −100 for none."""
    packed: bool = False
    """Whether several documents share a row of at most `max_length` tokens, each attending to itself alone."""
    max_length: int = 512
    method: str = "lora"
    """lora, qlora (NF4, double quantisation, computing in `dtype`) or full."""
    adapter: str | None = None
    """safetensors with PEFT's names: the first weights of the adapter."""
    r: int = 16
    alpha: int = 32
    """On all linear layers but the head, without dropout."""
    dtype: str = "float32"
    """What frozen weights are held in and multiplied in, unless the contender's own default is what is measured."""
    steps: int = 4
    micro_batch: int = 8
    """Rows at once."""
    accumulation: int = 1
    learning_rate: float = 3e-4
    """AdamW (0.9, 0.999, 1e-8), no weight decay, gradients clipped to norm 1; cosine over `total_steps`, so many that
    the rate is constant: a schedule over the few steps of a measurement would be another one in every library."""
    total_steps: int = 1_000_000
    seed: int = 42
    threads: int = 2
    device: str = "cpu"
    gradients: str | None = None
    """Where to write the gradients of the first step, before clipping, with PEFT's names; None: nowhere."""
    out: str = "out.json"
    recipe: str = ""
    overrides: list[str] = field(default_factory=list)
    """What our own command is started with; it says the same as the fields above."""

    @classmethod
    def read(cls, path: str | Path) -> Spec:
        """What :meth:`write` wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @property
    def torch_dtype(self) -> Any:
        """`dtype` as torch's."""
        import torch

        return getattr(torch, self.dtype)

    def rows(self) -> list[list[dict[str, list[int]]]]:
        """The documents, row by row: one in each, or with `packed` those that share one."""
        documents = [json.loads(line) for line in Path(self.documents).read_text(encoding="utf-8").splitlines()]
        if not self.packed:
            return [[document] for document in documents]
        rows: dict[int, list[dict[str, list[int]]]] = {}
        for document in documents:
            rows.setdefault(document["row"], []).append(document)
        return list(rows.values())

    def joined(self) -> Iterator[dict[str, list[int]]]:
        """Each row as one {"input_ids", "labels", "position_ids"}, positions starting at 0 with every document; no
        document's first token has a label, for nothing before it may predict it."""
        for row in self.rows():
            yield {
                "input_ids": [i for document in row for i in document["input_ids"]],
                "labels": [i for document in row for i in [MASKED, *document["labels"][1:]]],
                "position_ids": [i for document in row for i in range(len(document["input_ids"]))],
            }


def digest(ids: Sequence[int], labels: Sequence[int]) -> str:
    """Names a document: its ids, and its labels but for the first, which nothing predicts."""
    return hashlib.sha256(json.dumps([list(ids), [MASKED, *labels[1:]]]).encode()).hexdigest()[:16]


def adapter_name(name: str) -> str:
    """A parameter's name as all contenders' gradients are compared by: PEFT's, without wrappers and adapter names."""
    for prefix in ("module.", "_orig_mod.", "base_model.model."):
        name = name.removeprefix(prefix)
    return name.replace(".default.", ".").replace("._orig_mod", "").replace("._checkpoint_wrapped_module", "")


@dataclass
class Step:
    """One optimizer step as the contender's process saw it."""

    seconds: float = 0.0
    tokens: int = 0
    """Real ones, without padding."""
    labelled: int = 0
    computed: int = 0
    """Positions that went through the model, padding included."""
    documents: list[str] = field(default_factory=list)
    """Digests, in order."""
    loss: float | None = None
    """Nats per labelled token of the step's documents, before the step."""


class Clock:
    """Times optimizer steps and writes down what was in them. Every contender calls the same five methods."""

    def __init__(self, spec: Spec):
        self.spec, self.now = spec, Step()
        self.steps: list[Step] = []
        self.begun = 0.0
        self.about: dict[str, Any] = {}
        """More to tell: types of the weights, versions."""

    def begin_step(self) -> None:
        """Just before the first micro-batch of a step is computed (not: fetched)."""
        if not self.steps:
            self.about["ready_seconds"] = time.time() - STARTED
        self.now = Step()
        self.begun = self._time()

    def saw(self, ids: Any, labels: Any, real: Any = None, position_ids: Any = None) -> None:
        """One micro-batch [rows, positions] as the model is about to read it; labels stand where their tokens stand.

        real [rows, positions]: False for padding; None: nothing is padding. With position_ids a row is cut into
        documents where they start at 0. What this costs is taken out of the step's seconds.
        """
        start = time.perf_counter()
        for row, row_ids in enumerate(ids.tolist()):
            kept = [True] * len(row_ids) if real is None else [bool(x) for x in real[row].tolist()]
            row_labels = labels[row].tolist()
            positions = range(len(row_ids)) if position_ids is None else position_ids[row].tolist()
            document: tuple[list[int], list[int]] = ([], [])
            for token, label, position, use in zip(row_ids, row_labels, positions, kept, strict=True):
                if not use:
                    continue
                if position == 0:
                    self._add(*document)
                    document = ([], [])
                document[0].append(token)
                document[1].append(label)
            self._add(*document)
            self.now.computed += len(row_ids)
        self.begun += time.perf_counter() - start

    def _add(self, ids: list[int], labels: list[int]) -> None:
        if ids:
            self.now.documents.append(digest(ids, labels))
            self.now.tokens += len(ids)
            self.now.labelled += sum(label != MASKED for label in labels[1:])

    def save_gradients(self, named: Iterable[tuple[str, Any]]) -> None:
        """(name, gradient) of every trained weight before the first optimizer step; later calls do nothing.

        Names are made PEFT's by :func:`adapter_name`. What this costs is taken out of the step's seconds.
        """
        if self.spec.gradients is None or self.steps:
            return
        from safetensors.torch import save_file

        start = time.perf_counter()
        found = {adapter_name(name): grad.detach().float().cpu().contiguous() for name, grad in named}
        save_file(found, self.spec.gradients)
        self.begun += time.perf_counter() - start

    def end_step(self, loss: float | None = None) -> None:
        """Just after the optimizer stepped. `loss` can also come later, through :meth:`add_loss`."""
        self.now.seconds = self._time() - self.begun
        self.now.loss = loss
        self.steps.append(self.now)

    def add_loss(self, loss: float) -> None:
        """The loss of the step that has just ended."""
        self.steps[-1].loss = loss

    def _time(self) -> float:
        if self.spec.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def write(self) -> None:
        """The answer: steps, seconds from the process's start to the first step, memory."""
        found: dict[str, Any] = {"steps": [asdict(step) for step in self.steps], **self.about}
        found["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.spec.device == "cuda":
            import torch

            found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        Path(self.spec.out).write_text(json.dumps(found), encoding="utf-8")


def timed(trainer: Any, clock: Clock) -> Any:
    """A subclass of a `transformers.Trainer` class that tells the clock what it does; everything else is its own."""
    from transformers import TrainerCallback

    class Teller(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.begin_step()

        def on_pre_optimizer_step(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            # transformers has clipped by now: a gradient's direction, which is what is compared, stays.
            clock.save_gradients((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.end_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                clock.add_loss(float(logs["loss"]))

    class Timed(trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.add_callback(Teller())

        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            clock.about.setdefault("weights", weights_of(model))
            clock.saw(inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), inputs.get("position_ids"))
            return super().training_step(model, inputs, *args, **kwargs)

    return Timed


def weights_of(model: Any) -> dict[str, dict[str, int]]:
    """How many weights there are of each type, frozen and trained: for `Clock.about["weights"]`."""
    found: dict[str, dict[str, int]] = {"frozen": {}, "trained": {}}
    for parameter in model.parameters():
        kind = found["trained" if parameter.requires_grad else "frozen"]
        dtype = str(parameter.dtype).removeprefix("torch.")
        kind[dtype] = kind.get(dtype, 0) + parameter.numel()
    return found


def main(run: Any) -> None:
    """`run(spec, clock)` for the spec that the command line names; writes the answer."""
    spec = Spec.read(sys.argv[1])
    import torch

    torch.set_num_threads(spec.threads)
    clock = Clock(spec)
    run(spec, clock)
    clock.write()


def known(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that a dataclass has: releases of a library differ in what their arguments are called."""
    names = {f.name for f in fields(cls)}
    return {name: value for name, value in settings.items() if name in names}
