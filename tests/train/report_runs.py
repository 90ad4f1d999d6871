"""Run folders as a training leaves them, written by hand: for the report, which reads and never trains."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llama_ft.files import write_json, write_text
from llama_ft.recipe import dump, load_recipe
from llama_ft.recipe.run import Run

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror=window.hacked=1>\"'&amp;"
RTL = "سلام\u202e dlrow \u2066🦙👨‍👩‍👧 \x00\x1b[31m\u200b"
LONG = "a" * 5000

PROOF: dict[str, Any] = {
    "ok": True,
    "faults": [],
    "dtype": "float32",
    "computed_in": "float32 on cpu, weights as stored",
    "tolerance": {"max_delta": 0.001, "mean_kl": None, "top1": None, "greedy": "equal"},
    "measured": {
        "documents": 8,
        "positions": 629,
        "max_delta_logit": 1e-4,
        "mean_kl": 1e-11,
        "top1_agreement": 1.0,
        "labelled_tokens": 417,
        "nll_trained": 2.8443,
        "nll_merged": 2.8444,
    },
    "greedy": [{"prompt": "p", "trained": "a", "merged": "a", "equal": True, "tokens": 3}],
    "opened_with": "transformers 5.23.0 LlamaForCausalLM",
}


def metrics(steps: int = 24, every: int = 8) -> list[dict[str, Any]]:
    """Lines as the trainer logs them: an evaluation before the first step and after every `every`-th."""
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 4.1, "eval_seconds": 5.0}]
    for step in range(1, steps + 1):
        line = {
            "loss": 4 / step**0.3 + 0.2 * math.sin(step * 5),
            "grad_norm": 1 + 1 / step,
            "learning_rate": 3e-3 / step,
        }
        rates = {"tokens": 250 * step, "labelled_tokens": 180 * step, "seconds": 1.2}
        rates |= {"tokens_per_second": 208.0, "labelled_tokens_per_second": 150.0 + step % 7}
        lines.append({"step": step, **line, **rates, "memory_gib": 1.8, "fraction_of_machine": 0.6 + 0.01 * (step % 9)})
        if step % every == 0:
            lines.append({"step": step, "eval_loss": 4.1 - step / 24, "eval_seconds": 5.0})
    return lines


def make_run(folder: Path, *, said: str = "an answer", lines: list[dict[str, Any]] | None = None, **status: Any) -> Run:
    """A finished run. `said` stands wherever a model or data may write; `status` replaces parts of status.json."""
    run = Run(folder)
    recipe = load_recipe("quickstart", [f"output_dir={folder}"])
    write_text(run.recipe_file, dump(recipe))
    write_text(run.metrics_file, "".join(json.dumps(line) + "\n" for line in (lines or metrics())))
    source = {
        "label": f"dir/{said[:80]}.jsonl",
        "role": "train",
        "rows": 64,
        "kept": 62,
        "tokens": 5312,
        "labelled": 3931,
    }
    source |= {"dropped": {said[:300]: 2}, "longest": 127, "notes": {said[:300]: 3}}
    counts = {"sources": [source], "faults": [], "allowed": [], "efficiency": {}, "sampled": 0}
    lock = {"device": said[:300], "compute_dtype": "float32", "micro_batch": 4, "accumulation": 1, "world_size": 1}
    lock |= {"documents": 62, "versions": {"torch": "2.13.0"}, "commit": "abc", "data": counts}
    write_json(run.lock_file, lock | {"hashes": {"data": {"rows.jsonl": "0" * 64}, "template": "1" * 64}})
    during = {"8": said, "16": said}
    sample = {"question": said, "reference": said, "before": said, "during": during, "after": said}
    write_json(run.samples_file, [sample, {"question": "two\nlines", "reference": "r", "before": "", "after": "x"}])
    write_json(run.proof_file, PROOF)
    state = {"state": "finished", "steps": 24, "ended": "2026-11-21T20:39:35+00:00", "machine": {"flops": 195e9}}
    write_json(run.path / "status.json", state | status)
    return run
