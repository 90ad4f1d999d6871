"""The parts of a report: numbers of the run, curves, answers, data, plan, proof, environment, recipe."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from llama_ft.data.page.counts import counts_html, faults_html
from llama_ft.data.page.tokens import plural, safe
from llama_ft.data.page.write import short_names
from llama_ft.data.report import Report
from llama_ft.export.table import proof_rows
from llama_ft.train.page import alignment
from llama_ft.train.page.curves import Curve, curve_html
from llama_ft.train.page.gather import ReportView
from llama_ft.train.page.html import duration, facts, number, section, table, text

GIB = 2**30


def numbers(view: ReportView) -> str:
    """The run in eight figures; those that it did not log are left out."""
    pairs = [("steps", _steps(view)), *alignment.numbers(view)]
    tokens, total, rate = alignment.rate_of(view)
    counted = view.series(total)
    pairs.append((tokens, f"{counted[-1][1]:,.0f}" if counted else ""))
    seconds = sum(value for _, value in view.series("seconds") + view.series("eval_seconds"))
    pairs.append(("time in steps and evaluations", duration(seconds) if seconds else ""))
    rates = _finite(view, rate)
    pairs.append((f"{tokens}/s, median", number(median(rates), 3) if rates else ""))
    fractions = _finite(view, "fraction_of_machine")
    pairs.append(("of the machine, median", f"{median(fractions):.0%}" if fractions else ""))
    memory = _finite(view, "memory_gib")
    pairs.append(("memory, highest", f"{max(memory):.1f} GiB" if memory else ""))
    return facts(pairs, "numbers")


def _steps(view: ReportView) -> str:
    planned = view.status.get("steps")
    return f"<b>{view.step:,}</b>" + (f" of {planned:,}" if isinstance(planned, int) else "")


def _finite(view: ReportView, key: str) -> list[float]:
    return [value for _, value in view.series(key) if math.isfinite(value)]


def curves(view: ReportView) -> str:
    """Those of the objective, then learning rate, gradient norm, rate, memory, fraction of the machine."""
    s = view.series
    tokens, _, rate = alignment.rate_of(view)
    figures = [
        *alignment.figures(view),
        Curve("Bits per byte", [], points=s("eval_bits_per_byte"), points_name="held-out"),
        Curve("Learning rate", s("learning_rate"), from_zero=True),
        Curve("Gradient norm", s("grad_norm"), from_zero=True, smooth=True),
        Curve(f"{tokens.capitalize()} per second", s(rate), from_zero=True, smooth=True),
        Curve("Fraction of the machine", s("fraction_of_machine"), from_zero=True, smooth=True, percent=True),
        Curve("Memory", s("memory_gib"), " GiB", from_zero=True),
    ]
    drawn = "".join(map(curve_html, figures))
    about = "Point at a curve, or step along it with the arrow keys, to read its values."
    about = f"{about} {alignment.about(view.recipe)}".strip()
    return section("curves", "Curves", about, drawn and f'<div class="curves">{drawn}</div>')


def answers(view: ReportView) -> str:
    """Each question with the reference and what was answered before, during and after training."""
    articles = []
    for place, sample in enumerate(view.samples, 1):
        if not isinstance(sample, dict):
            continue
        during = sample.get("during")
        during = during if isinstance(during, dict) else {}
        steps = sorted(during, key=lambda step: (int(step) if step.isdigit() else math.inf, step))
        rows = [answer_row("reference", sample["reference"])] if sample.get("reference") else []
        rows += [answer_row("before", sample["before"])] if "before" in sample else []
        if len(steps) > 3 and "after" in sample:
            shown = f"<dl>{''.join(answer_row(f'step {safe(step)}', during[step]) for step in steps)}</dl>"
            rows.append(f"<div><details><summary>{len(steps)} answers on the way</summary>{shown}</details></div>")
        else:
            rows += [answer_row(f"step {safe(step)}", during[step]) for step in steps]
        rows += [answer_row("after", sample["after"])] if "after" in sample else []
        question = f'<p class="asked" dir="auto">{text(sample.get("question", ""))}</p>'
        articles.append(
            f'<article class="sample"><h3>Question {place}</h3>{question}<dl>{"".join(rows)}</dl></article>'
        )
    about = (
        "Held-out questions, answered greedily. Answers on the way end after 64 tokens at the latest, others after 96."
    )
    return section("answers", "Answers", about, "".join(articles))


def answer_row(when: str, said: Any, kind: str = "", more: str = "") -> str:
    """An answer in a list of them. `when` and `more`, which follows it, are HTML; kind: class, else the first word."""
    shown = f'<span dir="auto">{text(said)}</span>' if str(said).strip() else '<span class="none">no answer</span>'
    return f'<div class="{kind or when.partition(" ")[0]}"><dt>{when}</dt><dd>{shown}{more}</dd></div>'


def data(view: ReportView) -> str:
    """The table of sets that the preview shows, from the run's lock, and faults that were accepted by name."""
    found = view.lock.get("data")
    if not isinstance(found, dict):
        return ""
    try:
        report = Report.from_dict({"efficiency": {}, "sampled": 0, "faults": [], "allowed": [], **found})
        names = short_names(one.label for one in report.sources)
        body = faults_html(report) + counts_html(report, names)
        lost = [
            f"<li>{safe(names[one.label])}, dropped: {safe(reason)} <b>{rows:,}</b></li>"
            for one in report.sources
            for reason, rows in one.dropped.items()
        ]
        body += f'<ul class="notes">{"".join(lost)}</ul>' if lost else ""
    except (TypeError, KeyError, AttributeError):  # written by another version
        return section("data", "Data", "The lock's counts are of another version and cannot be shown.", "<p></p>")
    about = f"Of {plural(report.sampled, 'row')} that were looked at: the sets are streamed." if report.sampled else ""
    return section("data", "Data", about, body)


Form = Callable[[float], str]
PLANNED: tuple[tuple[str, str, Form], ...] = (
    ("peak_bytes", "memory", lambda value: f"{value / GIB:.2f} GiB"),
    ("seconds", "time", duration),
    ("steps", "steps", lambda value: f"{value:,.0f}"),
    ("tokens", "tokens", lambda value: f"{value:,.0f}"),
)
"""Keys that run.lock.json's `plan` and measured.json share."""


def plan(view: ReportView) -> str:
    """What was planned beside what was measured; nothing without a plan."""
    planned, measured = view.lock.get("plan"), view.measured or {}
    if not isinstance(planned, dict):
        return ""
    rows = []
    for key, name, form in PLANNED:
        expected, found = planned.get(key), measured.get(key)
        if not isinstance(expected, int | float):
            continue
        if isinstance(found, int | float):
            off = "none" if found == expected else f"{found / expected - 1:+.1%}" if expected else "–"
            rows.append([name, form(expected), form(found), off])
        else:
            rows.append([name, form(expected), "–", "–"])
    return section("plan", "Plan", "", table("Plan", ["", "planned", "measured", "difference"], rows) if rows else "")


def proof(view: ReportView) -> str:
    """export.json: the verdict, what was measured against what is allowed, and why it was refused."""
    found = view.proof
    if found is None:
        return ""
    try:
        rows = [[safe(part) for part in row] for row in proof_rows(found)]
        verdict, faults = found["ok"], "".join(f"<li>{safe(fault)}</li>" for fault in found["faults"])
        head = f"{safe(found['dtype'])}, {safe(found['opened_with'])}, {safe(found['computed_in'])}"
    except (KeyError, TypeError, ValueError):
        return section("proof", "Proof", "", "<p>export.json is of another version and cannot be shown.</p>")
    words = (
        '<p class="verdict passed">The merged model equals what was trained.</p>'
        if verdict
        else f'<p class="verdict failed">The merged model is not what was trained.</p><ul class="notes">{faults}</ul>'
    )
    return section("proof", "Proof", "", f"{words}<p>{head}</p>{table('Proof', ['', 'measured', 'allowed'], rows)}")


def environment(view: ReportView) -> str:
    """Versions, device, commit, hashes: what else decided the numbers."""
    lock, machine = view.lock, view.status.get("machine")
    pairs: list[tuple[str, str]] = []
    pairs += [(name, safe(lock[name])) for name in ("device", "compute_dtype", "world_size", "seed") if name in lock]
    if isinstance(machine, dict) and isinstance(machine.get("flops"), int | float):
        pairs.append(("machine's rate", f"{machine['flops'] / 1e9:,.0f} GFLOP/s"))
    commit = lock.get("commit")
    pairs.append(("commit", f"<code>{safe(commit)}</code>" if commit else ""))
    pairs += [(safe(name), safe(version)) for name, version in _map(lock.get("versions")).items()]
    pairs += [
        (f"revision of {safe(name)}", f"<code>{safe(one)}</code>") for name, one in _map(lock.get("revisions")).items()
    ]
    hashes = _map(lock.get("hashes"))
    for name, one in {**_map(hashes.get("data")), **{k: v for k, v in hashes.items() if k != "data"}}.items():
        pairs.append((f"SHA-256 of {safe(name)}", f"<code>{safe(one)}</code>"))
    return section("environment", "Environment", "", facts(pairs, "facts"))


def _map(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def recipe(view: ReportView) -> str:
    """The resolved recipe."""
    shown = view.recipe_text and f'<pre tabindex="0" aria-label="Resolved recipe">{text(view.recipe_text)}</pre>'
    return section("recipe", "Recipe", "Resolved: after <code>extends</code>, overrides and defaults.", shown)
