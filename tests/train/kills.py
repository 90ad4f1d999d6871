"""Runs that are killed with SIGKILL at a chosen moment and resumed, until they are done, and then compared.

Every run is a process of its own that calls the main door (`llama_ft.train.__main__`). It is forked from a server that
has imported torch and trl once, which costs a tenth of a fresh start. The moment is a site, a place in the code, and
how often it is passed before the process kills itself there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama_ft.recipe.run import Run

STEPS = 6
SMALL = [
    "data.0.limit=20",  # five steps an epoch: the sixth belongs to the next
    "eval_data=[{use: llama-qa, split: heldout, limit: 4}]",
    "training.global_batch=4",
    "training.micro_batch=2",
    f"training.max_steps={STEPS}",
    "training.save_every=2",
    "training.eval_every=3",
    "training.keep_checkpoints=2",
    "training.learning_rate=2e-3",
    "export.merged=false",
    "tracking=[]",
]
ADAPTER = ["adapter.dropout=0.1", "adapter.r=4", "adapter.alpha=8"]
"""Dropout: every step draws random numbers."""
FULL = ["adapter={method: full, freeze: [embed_tokens]}", "training.learning_rate=1e-4", "training.save_every=3"]
"""Without the embedding, whose two moments would be nine tenths of every checkpoint."""
PADDED = ["sequence.packing=false", "export.checkpoint=best"]
VARIANTS: dict[str, list[str]] = {
    "lora, packed": ADAPTER,
    "lora, padded": [*ADAPTER, *PADDED],
    "qlora, packed": ["adapter.method=qlora", *ADAPTER],
    "qlora, padded": ["adapter.method=qlora", *ADAPTER, *PADDED],
    "full, packed": FULL,
    "full, padded": [*FULL, *PADDED],
}
SITES = (
    "step: forward",
    "save: optimizer",
    "evaluation: batch",
    "save: before the rename",
    "step: gradient",
    "save: random numbers",
    "save: synced",
    "evaluation: measured",
    "save: after the rename",
    "step: logged",
    "save: manifest",
    "result: weights",
)
"""Where a process can be made to kill itself; `save` counts every file that is synced and every rename."""


@dataclass(frozen=True)
class Kill:
    """Dies at a site when it is passed for the n-th time; `site` "" only counts."""

    site: str = ""
    nth: int = 0


@dataclass
class Clock:
    """What a child process knows of itself: its trainer, and how often it passed each site at which step."""

    kill: Kill
    passed: dict[str, list[int]] = field(default_factory=lambda: {site: [] for site in SITES})
    trainer: Any = None

    def tick(self, site: str) -> None:
        self.passed[site].append(self.trainer.state.global_step if self.trainer is not None else 0)
        if site == self.kill.site and len(self.passed[site]) == self.kill.nth:
            os.kill(os.getpid(), signal.SIGKILL)


def install(clock: Clock) -> None:
    """Puts the clock's ticks into the trainer's code."""
    from llama_ft.train import finish, resumable, samples
    from llama_ft.train.trainer import LlamaTrainer

    def around(owner: Any, name: str, site: str, *, after: bool = False, when: Callable[..., bool] = lambda *a: True):
        inner = getattr(owner, name)

        def outer(*args: Any, **kwargs: Any) -> Any:
            here = when(*args)
            if here and not after:
                clock.tick(site)
            result = inner(*args, **kwargs)
            if here and after:
                clock.tick(site)
            return result

        setattr(owner, name, outer)

    start = LlamaTrainer.__init__

    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        clock.trainer = self

    LlamaTrainer.__init__ = started
    in_training = lambda self, *_: self.model.training  # noqa: E731
    at_checkpoints = lambda path, *_: "checkpoints" in str(path)  # noqa: E731
    around(LlamaTrainer, "compute_loss", "step: forward", after=True, when=in_training)
    around(LlamaTrainer, "_get_grad_norm", "step: gradient", after=True)
    around(LlamaTrainer, "log", "step: logged", after=True, when=lambda self, logs, *_: "loss" in logs)
    around(LlamaTrainer, "_prepare_inputs", "evaluation: batch", when=lambda self, *_: not self.model.training)
    around(LlamaTrainer, "log", "evaluation: measured", after=True, when=lambda self, logs, *_: "eval_loss" in logs)
    around(LlamaTrainer, "_save_optimizer_and_scheduler", "save: optimizer")
    around(LlamaTrainer, "_save_rng_state", "save: random numbers", after=True)
    around(resumable, "seal", "save: manifest")
    around(os, "fsync", "save: synced", after=True)
    around(Path, "rename", "save: before the rename", when=at_checkpoints)
    around(Path, "rename", "save: after the rename", after=True, when=at_checkpoints)
    around(finish, "save_adapter", "result: weights")
    around(finish, "save_full", "result: weights")
    samples.MAX_NEW_TOKENS = samples.DURING_NEW_TOKENS = 2  # answers are not what is looked at here


def child(arguments: list[str], kill: Kill, log: str, passed: str) -> None:
    """The main door in this process, its output in a file; at the end it notes what it passed."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from llama_ft.train.__main__ import main

    clock = Clock(kill)
    install(clock)
    sys.argv = ["llama_ft.train", *arguments]
    main()
    Path(passed).write_text(json.dumps(clock.passed), encoding="utf-8")


class Bench:
    """A folder in which one variant's unbroken run lies, and runs that are killed beside it."""

    def __init__(self, folder: Path, base: Path, variant: str):
        self.folder, self.variant = folder, variant
        self.settings = [f"model.base={base}", *SMALL, *VARIANTS[variant]]
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["llama_ft.train.run"])
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, kill: Kill = Kill(), *flags: str) -> int:
        """One process. Returns its exit status, negative for a signal."""
        arguments = ["quickstart", *self.settings, f"output_dir={self.folder / name}", *flags]
        log, passed = self.folder / f"{name}.log", self.folder / f"{name}.passed"
        process = self.context.Process(target=child, args=(arguments, kill, str(log), str(passed)))
        process.start()
        process.join()
        return process.exitcode

    def unbroken(self) -> None:
        """The run to compare with, if it is not there yet; its sites tell where others can be killed."""
        passed = self.folder / "unbroken.passed"
        if not passed.exists() and self.run("unbroken", Kill(), "--overwrite") != 0:
            raise AssertionError((self.folder / "unbroken.log").read_text())
        self.passed: dict[str, list[int]] = json.loads(passed.read_text())

    def left(self, site: str, step: int) -> int:
        """How often a run that goes on after `step` passes a site for certain."""
        if site.startswith("result"):
            return len(self.passed[site])
        return sum(at > step for at in self.passed[site]) if step else len(self.passed[site])

    def killed(self, name: str, kills: int, draw: random.Random, wanted: list[str]) -> list[tuple[int, Kill]]:
        """A run killed and resumed `kills` times, then resumed to its end. Returns (step it came from, kill) of each.

        `wanted`: sites to prefer, in this order; each is taken out when it has been used. Later kills come later in the
        run, so that it gets on.
        """
        run, done, flags = Run(self.folder / name), [], ()
        for number in range(kills):
            step = max(run.steps(), default=0)
            possible = [site for site in SITES if self.left(site, step)]
            site = next((site for site in wanted if site in possible), None) or draw.choice(possible)
            if site in wanted:
                wanted.remove(site)
            often = self.left(site, step)
            kill = Kill(site, draw.randint(1 + often * number // (kills + 1), often))
            status = self.run(name, kill, *flags)
            if status != -signal.SIGKILL:
                raise AssertionError(
                    f"{kill} from step {step}: exit {status}\n{(self.folder / f'{name}.log').read_text()}"
                )
            done.append((step, kill))
            flags = ("--resume",) if run.recipe_file.exists() else ()
        status = self.run(name, Kill(), *flags)
        if status != 0:
            raise AssertionError(f"{done}: exit {status}\n{(self.folder / f'{name}.log').read_text()}")
        return done

    def differs(self, name: str) -> list[str]:
        """In what a finished run is not the unbroken one, bit by bit; empty where it is."""
        found = []
        one, other = (figures(self.folder / run / "metrics.jsonl") for run in ("unbroken", name))
        if one != other:
            found.append(f"metrics.jsonl: {one} and {other}")
        for file in sorted((self.folder / "unbroken").glob("*/*.safetensors")):
            again = self.folder / name / file.relative_to(self.folder / "unbroken")
            if not again.exists() or file.read_bytes() != again.read_bytes():
                found.append(str(file.relative_to(self.folder / "unbroken")))
        if not any((self.folder / "unbroken").glob("*/*.safetensors")):
            found.append("there are no weights to compare")
        steps, again = (Run(self.folder / run).steps() for run in ("unbroken", name))
        if steps != again:
            found.append(f"checkpoints {steps} and {again}")
        left = [str(path) for path in (self.folder / name / "checkpoints").glob(".*")]
        return [*found, *left]


def figures(file: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl without what a clock or the machine measured."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "tokens", "labelled_tokens", "eval_loss", "epoch")
    kept += ("loss_by_source", "tokens_by_source", "eval_loss_by_source", "eval_bits_per_byte")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: line[key] for key in kept if key in line} for line in lines]
