"""Suite `academic` against lm_eval's own command line, and stopped in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from llama_ft.evaluate.result import SuiteResult
from llama_ft.evaluate.run import Asked, evaluate_source
from llama_ft.export.run import export_run
from tests.evaluate.harness_rows import ANSWER, CHOICE, write_rows, write_task
from tests.tiny_run import make_run

pytestmark = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the extra eval is not installed")
SYSTEM = "You keep llamas."


@pytest.fixture(scope="module")
def run(tiny_base, tmp_path_factory) -> Path:
    """A run with a system prompt, and its merged/."""
    run = make_run(tmp_path_factory.mktemp("run"), tiny_base, data__0__system=SYSTEM)[0]
    export_run(run)
    return run.path


@pytest.fixture
def tasks(tmp_path) -> list[Path]:
    """Multiple choice, and answers after two examples that are drawn from other rows."""
    pairs = [("grass", "hay"), ("stones", "grass on a hill"), ("the river", "hay"), ("a hill", "alpacas")]
    rows = [
        {"query": f"What eats llama {n} near {a}?", "choices": [a, b, "nothing"], "gold": n % 3}
        for n, (a, b) in enumerate(pairs * 3)
    ]
    choices = tmp_path / "choices.jsonl"
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = {"test": str(write_rows(tmp_path / "rows.jsonl")), "train": str(write_rows(tmp_path / "shots.jsonl", 6))}
    shots = {"dataset_kwargs": {"data_files": both}, "num_fewshot": 2, "fewshot_split": "train"}
    return [
        write_task(tmp_path / "choose.yaml", choices, CHOICE),
        write_task(tmp_path / "answer.yaml", tmp_path / "rows.jsonl", ANSWER, description="Say it. ", **shots),
    ]


def theirs(model: Path, tasks: list[Path], out: Path, *more: str) -> tuple[dict, dict[str, list[dict]]]:
    """Results and samples of `lm_eval run --model hf`."""
    line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    line += ["--model_args", f"pretrained={model},dtype=float32", "--include_path", str(tasks[0].parent)]
    line += ["--tasks", *(task.stem for task in tasks), "--limit", "8", "--log_samples", "--output_path", str(out)]
    line += more
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache")}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    [results] = out.rglob("results_*.json")
    samples = {}
    for task in tasks:
        [file] = out.rglob(f"samples_{task.stem}_*.jsonl")
        samples[task.stem] = [json.loads(text) for text in file.read_text().splitlines()]
    return json.loads(results.read_text())["results"], samples


def held_together(ours: SuiteResult, tasks: list[Path], results: dict, samples: dict[str, list[dict]]) -> None:
    """Equal are every score, and of every row what was asked and answered and what that is worth."""
    rows = {row["id"]: row for row in ours.rows}
    for task in tasks:
        for name in ("acc", "acc_norm") if task.stem == "choose" else ("exact_match", "bleu"):
            score = ours.score(f"{task.stem}: {name}")
            assert score is not None and score.value == pytest.approx(results[task.stem][f"{name},none"], abs=1e-12)
        assert len(samples[task.stem]) == 8
        for sample in samples[task.stem]:
            row = rows[f"{task.stem}:{sample['doc_id']}"]
            assert row["asked"] == sample["arguments"]["gen_args_0"]["arg_0"][-2000:]
            if task.stem == "answer":
                assert row["answer"] == str(sample["filtered_resps"])
                assert row["values"]["answer: exact_match"] == sample["exact_match"]
            else:
                assert row["values"] == {f"choose: {name}": sample[name] for name in ("acc", "acc_norm")}
    assert len(rows) == 16


def test_scores_and_rows_are_those_of_its_command_line(run, tasks, tmp_path, capsys):
    """In the run's template, with its system prompt before the task's own words."""
    names = [str(task) for task in tasks]
    asked = Asked(str(run), ["academic"], ["merged"], tasks=names, limit=8, apply_chat_template=True, overwrite=True)
    [ours] = evaluate_source(asked)
    assert SYSTEM in ours.rows[-1]["asked"] and "Say it. " in ours.rows[-1]["asked"]
    assert ours.rows[-1]["asked"].count("<|im_start|>assistant") == 3
    chat = ("--apply_chat_template", "--system_instruction", SYSTEM)
    held_together(ours, tasks, *theirs(run / "merged", tasks, tmp_path / "theirs", *chat))
    assert len({row["answer"] for row in ours.rows}) > 8, "answers that are all alike would prove nothing"


def test_a_killed_call_goes_on_within_its_task(tiny_base, tmp_path, capsys):
    """Killed after its first block: the blocks that are kept are not asked again, and the result is that of a call
    that was not stopped."""
    rows = write_rows(tmp_path / "rows.jsonl", 192)
    task = write_task(tmp_path / "answer.yaml", rows, ANSWER)
    asked = Asked(str(tiny_base), ["academic"], template="chatml", tasks=[str(task)], apply_chat_template=True)
    line = [sys.executable, "-m", "llama_ft.cli", "eval", str(tiny_base), "--suite", "academic", "--tasks", str(task)]
    line += ["--template", "chatml", "--apply-chat-template", "--out", str(tmp_path / "killed")]
    started = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    part = tmp_path / "killed" / "eval" / f"academic-{tiny_base.name}.part.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and started.poll() is None:
        if part.is_file() and part.read_text().count("\n") > 1:
            break
        time.sleep(0.01)
    started.kill()
    said = started.communicate(timeout=60)[1]
    kept = part.read_text().count('"id": ')
    assert 0 < kept < 192, said
    capsys.readouterr()
    [found] = evaluate_source(replace(asked, out=tmp_path / "killed"))
    assert f"answer: requests: {kept} of 192" in capsys.readouterr().err
    [whole] = evaluate_source(replace(asked, out=tmp_path / "whole"))
    assert found.rows == whole.rows and found.scores == whole.scores and len(found.rows) == 192
    assert not part.exists()
    assert SuiteResult.read(part.with_name(f"academic-{tiny_base.name}.json")).settings == found.settings
