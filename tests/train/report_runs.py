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


REWARDS = "rewards=[{function: exact_match}, {function: format, pattern: '= .*', weight: 0.2}]"
ALIGNED = {
    "dpo": ["data=[{path: pairs.jsonl, layout: preference}]", "preference.beta=0.1"],
    "orpo": ["data=[{path: pairs.jsonl, layout: preference}]"],
    "simpo": ["data=[{path: pairs.jsonl, layout: preference}]", "preference.beta=2.0"],
    "kto": ["data=[{path: pairs.jsonl, layout: rated}]"],
    "reward": ["data=[{path: pairs.jsonl, layout: preference}]"],
    "grpo": [REWARDS, "training.global_batch=16", "training.micro_batch=2"],
    "rloo": [REWARDS, "training.global_batch=16", "policy.kl=0"],
    "rejection_sampling": [REWARDS],
}
"""What a recipe needs besides its objective."""


def aligned_metrics(objective: str, part: str = "exact_match") -> list[dict[str, Any]]:
    """Lines as the trainers of llama_ft/train log them for an objective, over 40 steps. part: name of a reward."""
    steps, every = 40, 10

    def figures(at: float, noise: float) -> dict[str, float]:
        gap = 0.5 * at + 0.1 * noise
        if objective in ("grpo", "rloo"):
            found = {"reward": 0.1 + gap, f"reward/{part}": gap, "reward/format": 0.5, "answer_tokens": 12.5}
            return found | {"ended": 0.9, **({"kl": 0.02 * at} if objective == "grpo" else {})}
        if objective == "rejection_sampling":
            return {"reward": 0.1 + gap, f"reward/{part}": gap, "reward/format": 0.5, "answer_tokens": 12.5}
        if objective == "kto":
            return {"rewards_chosen": gap, "rewards_rejected": -gap, "kl": 0.3 * at}
        said = "score" if objective == "reward" else "rewards"
        found = {f"{said}_chosen": gap, f"{said}_rejected": -gap, "margin": 2 * gap, "accuracy": 0.5 + 0.4 * at}
        return found | ({"log_odds": gap, "nll_chosen": 2.0 - at} if objective == "orpo" else {})

    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        at, noise = step / steps, math.sin(step * 5)
        if step:
            own = {} if objective == "rejection_sampling" else figures(at, noise)
            if objective in ("grpo", "rloo"):
                own |= {"reward_spread": 0.3, "flat_groups": 0.25, "repeated_text": 0.125}
            rates = {"tokens": 900 * step, "labelled_tokens": 180 * step, "seconds": 2.0, "tokens_per_second": 450.0}
            line = {"step": step, "loss": 0.69 - 0.2 * at, "grad_norm": 1.0, "learning_rate": 1e-4}
            machine = {"memory_gib": 1.8, "fraction_of_machine": 0.5}
            lines.append({**line, **own, **rates, "labelled_tokens_per_second": 90.0, **machine})
        if step % every == 0:
            held_out = {"loss": 0.69 - 0.1 * at} | figures(at, 0)
            lines.append({"step": step, "eval_seconds": 4.0} | {f"eval_{key}": one for key, one in held_out.items()})
    return lines


def make_aligned_run(folder: Path, objective: str, *, said: str = "an answer") -> Run:
    """A finished run of an objective on answers, with what its trainer and its sampling leave."""
    run = make_run(folder, said=said, lines=aligned_metrics(objective, _part(said)), steps=40)
    (folder / "pairs.jsonl").write_text("{}\n")
    recipe = load_recipe("quickstart", [f"training.objective={objective}", *ALIGNED[objective]], look_up=False)
    write_text(run.recipe_file, dump(recipe))
    if objective == "reward":
        scores = [{"chosen": 0.5 * time, "rejected": -0.25} for time in range(3)]
        moments = {"before": scores[0], "during": {"10": scores[1]}, "after": scores[2]}
        write_json(run.samples_file, [{"question": said, "reference": said, "rejected": f"not {said}", **moments}] * 2)
        buckets = [("0.00 to 0.40", "model", 300, 0.55, 0.0287), ("0.40 to 3.10", "model", 300, 0.67, 0.0271)]
        names = ("bucket", "by", "pairs", "accuracy", "error")
        told = [dict(zip(names, one, strict=True)) for one in (*buckets, ("all", "all", 600, 0.61, 0.0199))]
        write_json(run.path / "eval" / "accuracy.json", told)
    if objective in ("grpo", "rloo", "rejection_sampling"):
        write_text(run.path / "sampled" / "answers.jsonl", drawn_answers(objective, said))
    if objective == "rejection_sampling":
        means = [{"k": k, "mean": 0.3 * math.log2(2 * k), "error": 0.02} for k in range(1, 9)]
        write_json(run.path / "sampled" / "best_of_k.json", means)
    return run


def drawn_answers(objective: str, said: str, prompts: int = 12) -> str:
    """sampled/answers.jsonl: to each prompt six answers, of which the highest reward is a cut one's."""
    lines = []
    for number in range(prompts):
        answers = [
            {
                "ids": [1, 2],
                "text": f"{said} {place}",
                "ended": place != 3,
                "reward": 0.5 + 0.1 * place if place < 4 else -0.5,
                "parts": {_part(said): 0.5, "format": float(place)},
            }
            for place in range(6)
        ]
        turns = [{"role": "user", "content": f"prompt {number}: {said}"}]
        if number == 0:
            turns = [{"role": "user", "content": said}, {"role": "assistant", "content": "earlier"}, *turns]
        group = {"where": f"rows.jsonl, row {number}", "prompt": [1], "turns": turns, "answers": answers}
        step = {} if objective == "rejection_sampling" else {"step": number + 1}
        lines.append(json.dumps({**step, **group}, ensure_ascii=False))
    return "\n".join(lines) + "\n" + '{"where": "cut'


def _part(said: str) -> str:
    """The name of a reward: a user's, where something hostile is said."""
    return "exact_match" if said in ("x", "an answer") else said
