"""Tasks of lm-evaluation-harness on local rows, for the tests of the suite `academic`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny_run import QUESTIONS

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\nAnswer:",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
ANSWER = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": [" hill", "\n\n"], "max_gen_toks": 40, "do_sample": False},
    "metric_list": [
        {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
        {"metric": "bleu", "aggregation": "bleu", "higher_is_better": True},
    ],
}


def write_rows(path: Path, count: int = len(QUESTIONS)) -> Path:
    """Questions and answers, one a line."""
    pairs = [(f"{QUESTIONS[i % len(QUESTIONS)][0]} ({i})", QUESTIONS[i % len(QUESTIONS)][1]) for i in range(count)]
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs))
    return path


def write_task(path: Path, rows: Path, task: dict[str, Any], **changes: Any) -> Path:
    """A task's file, named as the task."""
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    path.write_text(json.dumps({"task": path.stem, **data, **task, **changes}))  # JSON is YAML
    return path
