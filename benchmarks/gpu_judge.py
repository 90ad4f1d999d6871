"""What the gates of `benchmarks.gpu_run` say of its runs, and its table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import gates
from benchmarks.gpu_data import WORKLOADS
from benchmarks.peers.common import Spec, digest

WARM_UP = 3
"""Steps of a run that are not counted."""
LOSS, GRADIENT = gates.LOSS, {"float32": gates.COSINE, "bfloat16": 0.99}
"""Gates of the first step against the float32 reference. bfloat16 rounds gradients: there the second is a tripwire."""


@dataclass(frozen=True)
class Job:
    """One run."""

    workload: str
    contender: str
    seconds: float = 30
    """Expected, on an H100 and llama-3-8b, until a run of its kind has been seen."""
    round: int = 1

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.workload}-{self.contender}-{self.round}"

    @property
    def kind(self) -> tuple[str, str]:
        """What is the same in all rounds."""
        return self.workload, self.contender


def read_spec(work: Path, workload: str) -> Spec:
    """What the workload's runs were told, whoever ran."""
    return Spec.read(work / f"{workload}.spec.json")


def expected_documents(spec: Spec) -> list[list[str]]:
    """Digests of the documents of every step, in order."""
    rows, size = spec.rows(), spec.micro_batch * spec.accumulation
    steps = [rows[n * size : (n + 1) * size] for n in range(spec.steps)]
    return [[digest(d["input_ids"], d["labels"]) for row in step for d in row] for step in steps]


def faults(contender: str, found: dict[str, Any], expected: list[list[str]], shuffled: bool) -> list[str]:
    """What the gates have against a run of documents."""
    steps = found["steps"]
    if len(steps) != len(expected):
        return [f"{len(steps)} steps of {len(expected)}"]
    if shuffled:
        ours = sorted(name for step in steps for name in step["documents"])
        return [] if ours == sorted(name for names in expected for name in names) else ["other documents"]
    wrong = [
        number
        for number, (step, names) in enumerate(zip(steps, expected, strict=True), 1)
        if step["documents"] != names
    ]
    return [f"other documents in step {wrong[0]}"] if wrong else []


def judge(job: Job, found: dict[str, Any], work: Path, prepared: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A run's row: rate, memory, and what the gates say of it."""
    row: dict[str, Any] = {"workload": job.workload, "contender": job.contender, "round": job.round}
    row |= {name: found[name] for name in ("wall_seconds", "reason", "weights", "versions") if name in found}
    row |= {name: found[name] / 2**30 for name in ("allocated", "reserved") if name in found}
    steps = found.get("steps") or []
    if "reason" in found or not steps:
        row.setdefault("reason", "it wrote nothing")
        return row
    row["loss"] = steps[0]["loss"]
    if job.workload == "W6":
        return row | {"longest": max(step["tokens"] for step in steps), "ended": found.get("stopped", "time ran out")}
    if job.workload == "W4":
        rate = WORKLOADS["W4"].micro_batch * WORKLOADS["W4"].accumulation
        row["pairs_per_second"] = rate / statistics.median(step["seconds"] for step in steps[WARM_UP:])
        return row | ({} if abs(row["loss"] - 0.6931472) < 1e-3 else {"reason": f"first loss {row['loss']}, not log 2"})
    spec = read_spec(work, job.workload)
    against = faults(job.contender, found, expected_documents(spec), job.contender == "trl-default")
    row["rates"] = [step["tokens"] / step["seconds"] for step in steps[min(WARM_UP, len(steps) - 1) :]]
    row["tokens_per_second"] = statistics.median(row["rates"])
    row["padding"] = 1 - sum(s["tokens"] for s in steps) / sum(s["computed"] for s in steps)
    if job.contender == "trl-default":
        dtype = "bfloat16"  # it multiplies in that, whatever weights are held in
    about = prepared.get(job.workload, {})
    if "flop_per_token" in about and prepared.get("gemm_flops"):
        row["fraction"] = about["flop_per_token"] * row["tokens_per_second"] / prepared["gemm_flops"]
    if about.get("loss") is not None and row["loss"] is not None:
        row["loss_apart"] = abs(row["loss"] - about["loss"])
        if not row["loss_apart"] <= LOSS[dtype]:
            against.append(f"first loss {row['loss_apart']:.1e} from the reference's")
    gradients, reference = work / f"{job.name}.safetensors", work / f"{job.workload}-reference.safetensors"
    if gradients.exists() and reference.exists():
        row["cosine"] = gates.cosine(gradients, reference)
        if row["cosine"] < GRADIENT[dtype]:
            against.append(f"gradient's cosine {row['cosine']:.6f}")
        gradients.unlink()
    return row | ({"gates": against} if against else {})


def table(rows: list[dict[str, Any]], left_out: list[Job]) -> str:
    """Markdown, one block a workload, rounds of a contender in one line."""
    lines: list[str] = []
    for workload in sorted({row["workload"] for row in rows} | {job.workload for job in left_out}):
        kinds: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["workload"] == workload:
                kinds.setdefault(row["contender"], []).append(row)
        unit = {"W4": "pairs/s", "W6": "longest document that trained"}.get(workload, "tokens/s (rounds)")
        lines += [f"**{workload}**: {WORKLOADS[workload].says}", ""]
        lines += [f"| | {unit} | of GEMM | allocated / reserved GiB | Δ loss | cosine | gates |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for contender, group in kinds.items():
            good = [row for row in group if "reason" not in row]
            if not good:
                lines.append(f"| {contender} | {group[0]['reason']} | | | | | |")
                continue
            memory = max((row.get("allocated", 0.0), row.get("reserved", 0.0)) for row in good)
            first = good[0]
            lines.append(
                f"| {contender} | {_figure(workload, good)} | {_part(first, 'fraction', '.0%')} "
                f"| {f'{memory[0]:.1f} / {memory[1]:.1f}' if memory[1] else '–'} | {_part(first, 'loss_apart', '.1e')} "
                f"| {_part(first, 'cosine', '.5f')} | {'; '.join(first.get('gates', [])) or 'kept'} |"
            )
        for contender in dict.fromkeys(j.contender for j in left_out if j.workload == workload):
            if contender not in kinds:
                lines.append(f"| {contender} | no time was left | | | | | |")
        lines.append("")
    return "\n".join(lines)


def _part(row: dict[str, Any], name: str, form: str) -> str:
    return format(row[name], form) if row.get(name) is not None else "–"


def _figure(workload: str, rows: list[dict[str, Any]]) -> str:
    if workload == "W6":
        return f"{rows[0]['longest']:,} tokens, then {rows[0]['ended']}"
    if workload == "W4":
        return ", ".join(f"{row['pairs_per_second']:.2f}" for row in rows)
    rates = [row["tokens_per_second"] for row in rows]
    return f"{statistics.median(rates):,.0f} ({', '.join(f'{rate:,.0f}' for rate in rates)})"
