"""What a finished run tells: losses, answers before and after, the proof, and the next command to type."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from llama_ft.export.run import Export
from llama_ft.recipe.run import Run


def losses(run: Run) -> dict[str, float]:
    """First and last training and held-out loss of metrics.jsonl; absent keys were never logged."""
    found: dict[str, float] = {}
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for key, name in (("loss", "loss"), ("eval_loss", "held-out loss")):
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
            say(f"[dim]before[/]  {escape(sample.get('before') or '(no answer)')}")
            say(f"[green]after[/]   {escape(sample.get('after') or '(no answer)')}")
    say()
    found = losses(run)
    for name in ("loss", "held-out loss"):
        if f"first {name}" in found:
            say(f"{name:14}{found[f'first {name}']:.4f} → {found[f'last {name}']:.4f}")
    shown = relative(run.path)
    if proof is not None:
        say(f"{'proof':14}passed, {shown}/export.json")
    say(f"{'report':14}{shown}/report.html")
    say(f"{'run':14}{shown}")
    say(f"{'next':14}llama-ft chat {shown}")


def relative(path: Path) -> str:
    """The path as the user would type it from here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
