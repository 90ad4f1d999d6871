"""The proof on the terminal: measured beside allowed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama_ft.recipe.run import Run

NOT_ASKED = ("equal greedy answers", "not asked", "")
"""Where models are read from disk as they are asked, or there was no prompt."""


def proof_rows(proof: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, measured, allowed) for a terminal or a model card; `allowed` is empty where nothing is judged."""
    if proof.get("kind") == "scores":
        return _score_rows(proof)
    measured, tolerance = proof["measured"], proof["tolerance"]
    limits = {key: "" if tolerance[key] is None else f"{tolerance[key]:g}" for key in ("max_delta", "mean_kl", "top1")}
    equal = sum(answer["equal"] for answer in proof["greedy"])
    greedy = "all" if tolerance["greedy"] == "equal" else "all, but for near ties"
    rows = [
        ("positions compared", f"{measured['positions']} in {measured['documents']} documents", ""),
        ("max |Δ logit|", _number(measured["max_delta_logit"]), limits["max_delta"] and f"≤ {limits['max_delta']}"),
        ("mean KL (nats)", _number(measured["mean_kl"]), limits["mean_kl"] and f"≤ {limits['mean_kl']}"),
        ("top-1 agreement", _share(measured["top1_agreement"]), limits["top1"] and f"≥ {float(limits['top1']):.0%}"),
        ("equal greedy answers", f"{equal} of {len(proof['greedy'])}", greedy) if proof["greedy"] else NOT_ASKED,
    ]
    if measured["labelled_tokens"]:
        both = f"{_number(measured['nll_trained'])} → {_number(measured['nll_merged'])}"
        rows.append(("nll, trained → merged", both, ""))
    return rows


def _score_rows(proof: dict[str, Any]) -> list[tuple[str, str, str]]:
    measured, tolerance = proof["measured"], proof["tolerance"]
    limits = {key: "" if limit is None else f"≤ {limit:g}" for key, limit in tolerance.items()}
    both = f"{_share(measured['accuracy_trained'])} → {_share(measured['accuracy_merged'])}"
    turned = f"{measured['turned']}, and {measured['near_ties']} near ties"
    margins = f"{_number(measured['mean_margin_trained'])} → {_number(measured['mean_margin_merged'])}"
    return [
        ("pairs scored", f"{measured['pairs']}, {measured['tokens']} tokens", ""),
        ("max |Δ score|", _number(measured["max_delta_score"]), limits["max_delta"]),
        ("mean KL of preferences (nats)", _number(measured["mean_kl"]), limits["mean_kl"]),
        ("pairs in another order", turned, "0, but for near ties"),
        ("accuracy, trained → merged", both, ""),
        ("mean margin, trained → merged", margins, ""),
    ]


def print_proof(proof: dict[str, Any], run: Run, console: Console | None = None) -> None:
    """A table on a terminal, aligned plain lines elsewhere; then what to type next."""
    console = console or Console()
    title = f"{'proof passed' if proof['ok'] else 'proof FAILED'}: merged ({proof['dtype']}) against what was trained"
    rows = proof_rows(proof)
    if console.is_terminal:
        table = Table(title=title, title_style="bold green" if proof["ok"] else "bold red", title_justify="left")
        for column in ("", "measured", "allowed"):
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        width = max(22, *(len(what) for what, _, _ in rows))
        lines = [f"  {what:{width}} {found:28} {allowed}".rstrip() for what, found, allowed in rows]
        print("\n".join([title, *lines]), flush=True)
    if proof["ok"]:
        console.print(f"opened with {proof['opened_with']}", highlight=False, soft_wrap=True)
        if proof.get("kind") == "scores":
            said = f"name it in the rewards of a recipe: rewards: [{{model: {from_here(run.path)}}}]"
        else:
            said = f"llama-ft chat {from_here(run.path)}"
        console.print(f"next: {said}", highlight=False, soft_wrap=True, markup=False)


def from_here(path: Path) -> str:
    """The path as one would type it in the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _share(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2%}"
