"""The proof of other formats than merged/ on the terminal and in a model card: a row each."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from llama_ft.export.table import from_here
from llama_ft.recipe.run import Run

HEAD = ("format", "MB", "max |Δ logit|", "mean KL (nats)", "top-1", "greedy", "nll", "as it runs", "")


def format_rows(proofs: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row of HEAD's columns for each entry of export.json's `formats`; limits stand behind what they bound."""
    return [_row(name, proof) for name, proof in proofs.items()]


def _row(name: str, proof: dict[str, Any]) -> tuple[str, ...]:
    said = "passed" if proof["ok"] else "REFUSED"
    size = f"{proof['bytes'] / 1e6:.1f}"
    if "measured" not in proof:  # it could not even be opened
        return (name, size, *("" for _ in HEAD[3:]), said)
    measured, limits, greedy = proof["measured"], proof["tolerance"], proof["greedy"]
    return (
        name,
        size,
        _bounded(measured["max_delta_logit"], limits["max_delta"]),
        _bounded(measured["mean_kl"], limits["mean_kl"]),
        "not finite" if measured["top1_agreement"] is None else f"{measured['top1_agreement']:.2%}",
        f"{sum(answer['equal'] for answer in greedy)} of {len(greedy)}",
        f"{_number(measured['nll_trained'])} → {_number(measured['nll_merged'])}"
        if measured["labelled_tokens"]
        else "",
        _own(proof),
        said,
    )


def _own(proof: dict[str, Any]) -> str:
    """What the program that the file is for makes of it, where that was asked."""
    if "llama_cpp" in proof:
        own, name, missing = proof["llama_cpp"], "llama.cpp", "llama.cpp is not installed"
    else:
        own, name, missing = proof.get("runtime"), "transformers", ""
    if own is None:
        return missing
    return f"{name}: KL {_number(own['measured']['mean_kl'])}" if "measured" in own else f"{name}: not opened"


def print_formats(
    proofs: dict[str, dict[str, Any]],
    run: Run,
    console: Console | None = None,
    *,
    what: str = "GGUF files",
    folder: str = "gguf",
) -> None:
    """A table on a terminal, aligned plain lines elsewhere; then where they are.

    what: they are called. folder: of the run, that they lie in.
    """
    console = console or Console()
    ok = all(proof["ok"] for proof in proofs.values())
    title = f"{'proof passed' if ok else 'proof FAILED'}: {what} against merged"
    rows = format_rows(proofs)
    if console.is_terminal:
        table = Table(title=title, title_style="bold green" if ok else "bold red", title_justify="left")
        for column in HEAD:
            table.add_column(column)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    else:
        widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
        print(title, flush=True)
        for row in (HEAD, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            print(f"  {'  '.join(cells)}".rstrip(), flush=True)
    if ok:
        console.print(f"files: {from_here(run.path / folder)}", highlight=False, soft_wrap=True, markup=False)


def _bounded(value: float | None, limit: float | None) -> str:
    return _number(value) + (f" (≤ {limit:g})" if limit is not None else "")


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"
