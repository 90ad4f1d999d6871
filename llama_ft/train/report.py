"""What a finished run tells: losses, answers before and after, the proof, and the next command to type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from llama_ft.export.run import Export
from llama_ft.recipe.run import Run

TOLD = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "eval_accuracy": "accuracy",
    "eval_reward": "reward",
}
"""Figures of metrics.jsonl that the report names, the last two of held-out rows."""


def losses(run: Run) -> dict[str, float]:
    """First and last of the figures below in metrics.jsonl; absent keys were never logged."""
    found: dict[str, float] = {}
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, name in TOLD.items():
            if key in record:
                found.setdefault(f"first {name}", record[key])
                found[f"last {name}"] = record[key]
    return found


def print_report(run: Run, proof: Export | None, console: Console) -> None:
    """The report on the terminal; everything in it also lies in the run folder."""
    say = lambda text="": console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    if run.samples_file.exists():
        for sample in json.loads(run.samples_file.read_text(encoding="utf-8")):
            say()
            say(f"[bold]Q[/]       {escape(sample['question'])}")
            say(f"[dim]before[/]  {escape(said(sample.get('before')))}")
            say(f"[green]after[/]   {escape(said(sample.get('after')))}")
    say()
    found = losses(run)
    for name in TOLD.values():
        if f"first {name}" in found:
            say(f"{name:14}{found[f'first {name}']:.4f} → {found[f'last {name}']:.4f}")
    shown = relative(run.path)
    if proof is not None:
        say(f"{'proof':14}passed, {shown}/export.json")
    say(f"{'report':14}{shown}/report.html")
    say(f"{'run':14}{shown}")
    scores = run.recipe.training.objective == "reward"
    then = f"rewards: [{{model: {shown}}}] in a recipe" if scores else f"llama-ft chat {shown}"
    say(f"{'next':14}{escape(then)}")


def said(answer: Any) -> str:
    """An answer, or a reward model's scores of the two answers to a question."""
    if isinstance(answer, dict):
        return f"chosen {answer['chosen']:+.3f}, rejected {answer['rejected']:+.3f}"
    return answer or "(no answer)"


def relative(path: Path) -> str:
    """The path as the user would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
