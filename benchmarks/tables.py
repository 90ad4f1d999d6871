"""What `benchmarks.run` measured, as Markdown and as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, OURS
from benchmarks.machine import describe

Row = dict[str, Any]


def rate_of(run: Row, what: str = "tokens") -> float:
    """Tokens (or `labelled`) per second over all steps of a run but the first."""
    counted = run["steps"][1:]
    return sum(step[what] for step in counted) / sum(step["seconds"] for step in counted)


def summary(row: Row) -> Row:
    """Medians and spread of a row that ran."""
    runs = row["runs"]
    rates = [rate_of(run) for run in runs]
    padding = [1 - sum(s["tokens"] for s in r["steps"][1:]) / sum(s["computed"] for s in r["steps"][1:]) for r in runs]
    return {
        "rate": statistics.median(rates),
        "spread": (min(rates), max(rates)),
        "labelled": statistics.median(rate_of(run, "labelled") for run in runs),
        "rss": statistics.median(run["rss_gib"] for run in runs),
        "ready": statistics.median(run["ready_seconds"] for run in runs),
        "warm_up": statistics.median(run["steps"][0]["seconds"] for run in runs),
        "padding": statistics.median(padding),
    }


def summaries(found: Row) -> dict[str, Row]:
    """Those of all rows that ran in at least one round."""
    return {name: summary(row) for name, row in found["rows"].items() if row["runs"]}


def faults_of(row: Row) -> list[str]:
    """Why a row is not honest, or not there."""
    found = [fault for run in row["runs"] for fault in run.get("faults", [])]
    return [*found, *([row["error"]] if "error" in row else [])]


def markdown(found: Row) -> str:
    """One workload: how it was measured, the table, what failed."""
    rows, gemm = summaries(found), statistics.median(found["gemm"])
    lines = [
        f"`{found['command']}`",
        "",
        f"{describe(found['machine'])}.",
        "",
        _how(found),
        "",
        "| | non-pad tokens/s (min–max) | labelled tokens/s | ours / this | of the machine | padding | peak RSS, GiB "
        "| ours / this | first step after, s | \\|Δ first loss\\| | cosine of the first gradient |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        faults = faults_of(row)
        if name not in rows:
            lines.append(f"| {name} | {faults[0]} | | | | | | | | | |")
            continue
        one, first = rows[name], row["runs"][0]
        honest = OURS in rows and not faults
        ratios = [f"{rows[OURS][k] / one[k]:.2f}" for k in ("rate", "rss")] if honest else ["–", "–"]
        share = found["flop_per_token"] * one["rate"] / gemm
        lines.append(
            f"| {name}{' ✗' if faults else ''} | {one['rate']:.0f} ({one['spread'][0]:.0f}–{one['spread'][1]:.0f}) "
            f"| {one['labelled']:.0f} | {ratios[0]}{'×' if honest else ''} | {share:.0%} | {one['padding']:.0%} "
            f"| {one['rss']:.2f} | {ratios[1]} | {one['ready']:.0f} | {first['loss_gap']:.1e} | {first['cosine']:.6f} |"
        )
    lines.append("")
    for name, row in found["rows"].items():
        lines.append(f"- **{name}**: {CONTENDERS[name].what}{_weights(row)}.")
        lines += [f"  - ✗ {fault}" for fault in faults_of(row)]
    return "\n".join([*lines, ""])


def _how(found: Row) -> str:
    """What stands above the table: how it was measured, against which reference and which machine."""
    workload, reference = found["workload"], found["reference"]
    first, *counted = [step["tokens"] for step in found["expected"]]
    gemm = statistics.median(found["gemm"]) / 1e9
    told = [
        f"**{workload['name']}: {workload['title']}.** Weights in {found['dtype']}, {found['rounds']} rounds in turn,",
        f"each contender a process of its own; steps of {workload['documents']} documents, the first one uncounted",
        f"({first} tokens; then {', '.join(map(str, counted))}); documents sha256 {found['documents'][:12]}.",
        f"First loss of transformers' LLaMA in float32: {reference['loss']:.5f};",
        f"allowed apart: {reference['allowed']:.1e}. Matrix products of the model's shapes run at {gemm:.0f} GFLOP/s",
        f"here; a token takes {found['flop_per_token'] / 1e6:.0f} MFLOP.",
    ]
    return " ".join(told)


def _weights(row: Row) -> str:
    """Types of the weights, as the contender's process held them."""
    about = row["runs"][0].get("weights") if row["runs"] else None
    if not about:
        return ""
    kinds = [f"{kind} weights in {', '.join(about[kind])}" for kind in ("frozen", "trained") if about[kind]]
    return f"; {', '.join(kinds)}"


def plot(found: Row, file: Path) -> None:
    """Rates with their spread, and memory, as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summaries(found)
    names = list(rows)[::-1]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 0.6 + 0.5 * len(names)), sharey=True)
    colours = ["#1f6feb" if name == OURS else "#8b949e" for name in names]
    rates = [rows[name]["rate"] for name in names]
    error = [
        [rows[n]["rate"] - rows[n]["spread"][0] for n in names],
        [rows[n]["spread"][1] - rows[n]["rate"] for n in names],
    ]
    speed.barh(names, rates, xerr=error, color=colours, ecolor="#24292f", capsize=3)
    memory.barh(names, [rows[name]["rss"] for name in names], color=colours)
    for axes, values, form in ((speed, rates, "{:.0f}"), (memory, [rows[n]["rss"] for n in names], "{:.1f}")):
        axes.bar_label(axes.containers[-1], labels=[form.format(value) for value in values], padding=10, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.18)
    speed.set_title("non-pad tokens/s (more is better)", fontsize=10)
    memory.set_title("peak memory, GiB (less is better)", fontsize=10)
    figure.suptitle(f"{found['workload']['name']}: {found['workload']['title']}, {found['dtype']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
