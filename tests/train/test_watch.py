"""What watches a run changes nothing of it: answers on the way, figures, time left, status, lines on a terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from llama_ft.llama.shapes import Shape
from llama_ft.recipe import load_recipe
from llama_ft.train import samples as samples_module
from llama_ft.train.machine import Machine, machine_rate, memory, token_flops
from llama_ft.train.page import write as page_module
from llama_ft.train.progress import ProgressLine, TimeLeft
from llama_ft.train.samples import SampleAtEvaluations, Samples
from llama_ft.train.status import Status
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT, metric, train_here
from tests.train.report_runs import make_run

HELD_OUT = "eval_data=[{use: llama-qa, split: heldout, limit: 8}]"


@pytest.fixture
def overrides(tiny_base, tmp_path) -> list[str]:
    """Five steps on a tiny model with evaluations, and so answers, after the second and the fourth."""
    short = ["training.max_steps=5", "training.eval_every=2", "training.global_batch=8", "training.learning_rate=2e-3"]
    tiny = [f"model.base={tiny_base}", "data.0.limit=40", "sequence.max_length=500"]
    return [*tiny, HELD_OUT, *short, "export.merged=false", "tracking=[]", f"output_dir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    "method",
    [["adapter.dropout=0.2"], ["adapter.method=full"], ["adapter.method=qlora", "adapter.dropout=0.2"]],
    ids=["lora", "full", "qlora"],
)
def test_answers_on_the_way_change_no_bit_of_the_training(overrides, tmp_path, monkeypatch, request, method):
    if "adapter.method=qlora" in method:
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes")
        # NF4 cuts rows into blocks of 64: the tiny model's do not divide, the real one's do.
        method = [*method, f"model.base={request.getfixturevalue('small_base')}"]
    run = train_here([*overrides, *method])
    for sample in json.loads(run.samples_file.read_text()):
        assert list(sample["during"]) == ["2", "4"] and "before" in sample and "after" in sample
    with monkeypatch.context() as patch:
        patch.setattr(SampleAtEvaluations, "on_evaluate", lambda *_, **__: None)
        silent = train_here([*overrides, *method, f"output_dir={tmp_path / 'silent'}"])
    assert all("during" not in sample for sample in json.loads(silent.samples_file.read_text()))
    for key in ("loss", "grad_norm", "eval_loss"):
        assert metric(run.path, key) == metric(silent.path, key)
    assert len(set(metric(run.path))) == 5, "nothing was trained, so nothing was compared"


def test_a_resumed_run_keeps_its_answers_and_is_watched_on(overrides, monkeypatch):
    run = train_here([*overrides, "training.save_every=2"])
    before, figures = json.loads(run.samples_file.read_text()), metric(run.path)
    started = json.loads((run.path / "status.json").read_text())["started"]
    for step in run.steps()[1:]:
        shutil.rmtree(run.checkpoint(step))
    asked: list[int] = []
    generate = Samples._generate
    monkeypatch.setattr(Samples, "_generate", lambda self, *rest: asked.append(rest[1]) or generate(self, *rest))
    again = train_here([*overrides, "training.save_every=2"], resume=True)
    assert asked == [samples_module.MAX_NEW_TOKENS], "only the answers after training are given anew"
    assert json.loads(again.samples_file.read_text()) == before
    assert metric(again.path) == figures
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["steps"], status["started"]) == ("finished", 5, started)
    for key in ("memory_gib", "fraction_of_machine", "tokens_per_second"):
        assert len(metric(run.path, key)) == 5 and min(metric(run.path, key)) > 0
    assert "finished" in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_wait_for_the_answers_and_train_the_same(overrides, tmp_path):
    """Only the main process answers; the other comes to its next exchange first and waits there."""
    one = train_here([*overrides, "training.micro_batch=4", f"output_dir={tmp_path / 'one'}"])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launch, "-m", "llama_ft.train", "quickstart", *overrides, "training.micro_batch=4"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    two = tmp_path / "run"
    assert len(metric(two)) == 5
    assert max(abs(a - b) for a, b in zip(metric(one.path), metric(two), strict=True)) <= 1e-5
    for sample in json.loads((two / "eval" / "samples.json").read_text()):
        assert list(sample["during"]) == ["2", "4"]
    assert json.loads((two / "status.json").read_text())["state"] == "finished"


def test_the_machines_rate_and_memory():
    shape = Shape(64, 2, 4, 2, 160, 512, 128)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    rate = machine_rate(shape, torch.float32, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state), "the measurement draws from training's random numbers"
    assert 1e7 < rate < 1e14
    before = memory(torch.device("cpu"))["memory_gib"]
    held = torch.ones(2**28)  # 1 GiB
    assert 0.9 < memory(torch.device("cpu"))["memory_gib"] - before < 1.1
    del held


def test_the_fraction_of_the_machine_by_hand():
    """LoRA of rank 16 on SmolLM2-135M: 4B + 4f·Hd + 3.5a + 6P per token, a = 2·L·d·s̄."""
    shape = Shape(576, 30, 9, 3, 1536, 49152, 8192, tied=True)
    recipe = load_recipe("quickstart", ["adapter.r=16"])
    flops = token_flops(recipe, shape, [100, 300])
    body, head, lora = 106_168_320, 49152 * 576, 4_884_480
    context = (100**2 + 300**2) / 400
    expected = 4 * body + 4 * 0.5 * head + 3.5 * 2 * 30 * 576 * context + 6 * lora
    assert flops(0.5) == pytest.approx(expected, rel=1e-12)
    logs = {"loss": 1.0, "tokens_per_second": 200.0, "labelled_tokens_per_second": 100.0}
    Machine(4e11, flops).on_log(SimpleNamespace(device=torch.device("cpu")), None, None, logs)  # type: ignore[arg-type]
    assert logs["fraction_of_machine"] == pytest.approx(200 * expected / 4e11, abs=1e-4)
    slow = Machine(1e9, flops)  # measured while others used the machine
    slow.on_log(SimpleNamespace(device=torch.device("cpu")), None, None, logs)  # type: ignore[arg-type]
    assert logs["fraction_of_machine"] == 1.0 and slow.rate == pytest.approx(200 * expected)
    evaluation = {"eval_loss": 1.0}
    Machine(4e11, flops).on_log(SimpleNamespace(device=torch.device("cpu")), None, None, evaluation)  # type: ignore[arg-type]
    assert evaluation == {"eval_loss": 1.0}


def test_time_left_follows_the_last_steps_and_counts_evaluations():
    time = TimeLeft()
    time.evaluation_took(5.0)  # before training
    time.step(10.0, now=100.0)  # start-up: ten times as long
    assert time.left(9, 1) == pytest.approx(95.0)
    for second in range(101, 121):
        time.step(0.9, now=float(second))
    assert time.left(10, 0) == pytest.approx(10.0), "the slow first step is forgotten"
    time.evaluation_took(3.0)
    time.step(1.0, now=129.0)  # an evaluation with its answers lay between: 8 seconds of 9
    assert time.left(10, 2) == pytest.approx(10 + 2 * 8.0)


LOGS = {
    "loss": 1.5,
    "labelled_tokens_per_second": 210.0,
    "seconds": 2.0,
    "memory_gib": 1.8,
    "fraction_of_machine": 0.63,
}


def lines(console: Console) -> Any:
    """A progress line that has seen an evaluation and two steps of four."""
    line = ProgressLine(console)
    arguments = SimpleNamespace(eval_strategy="steps", eval_steps=2)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=4)
    everything: Any = (arguments, state, None)
    line.on_log(*everything, {"eval_loss": 2.25, "eval_seconds": 3.0})
    line.on_train_begin(*everything)
    for step in (1, 2):
        state.global_step = step
        line.on_log(*everything, LOGS | {"step": step})
    return line


def test_plain_lines_hold_no_control_characters(capsys):
    lines(Console(file=sys.stdout, force_terminal=False)).close()
    said = capsys.readouterr().out
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said)
    assert said.splitlines()[0] == "before training · held-out loss 2.2500"
    expected = "loss 1.5000 · held-out 2.2500 · 210 labelled tokens/s · 1.8 GiB · 63% of the machine"
    assert said.splitlines()[1] == f"step 1/4 · {expected} · 0:12 left"  # three steps of 2 s, two evaluations of 3 s
    assert len(said.splitlines()) == 3


@pytest.mark.parametrize("width", [40, 120])
def test_a_terminal_gets_a_bar_and_all_figures(width):
    shown = io.StringIO()
    line = lines(Console(file=shown, force_terminal=True, width=width, color_system=None))
    line.progress.refresh()
    line.close()
    assert line.progress is None
    words = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.getvalue()).split())
    assert "before training · held-out loss 2.2500" in words and "2/4" in words and "left" in words
    assert "210 labelled tokens/s" in words and "63% of the machine" in words


class Tracked(Exception):
    """Stands for whatever ends a run."""


@pytest.mark.parametrize(
    ("ended", "state", "said"),
    [
        (None, "finished", "finished"),
        (SystemExit(130), "stopped", "Stopped after step 24"),
        (KeyboardInterrupt(), "stopped", "Stopped at once"),
        (Tracked("the <disk> failed"), "failed", "the &lt;disk&gt; failed"),
    ],
    ids=["finished", "stopped", "interrupted", "failed"],
)
def test_however_a_run_ends_its_status_and_report_say_so(tmp_path, ended, state, said):
    run = make_run(tmp_path / "run")
    (run.path / "status.json").unlink()
    status = Status(run, Console(quiet=True), Machine(2e11, lambda share: 1.0))
    status.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=24), None)  # type: ignore[arg-type]
    assert json.loads((run.path / "status.json").read_text())["state"] == "running"
    try:
        with status.kept([]):
            if ended is not None:
                raise ended
    except BaseException as error:
        assert error is ended
    found = json.loads((run.path / "status.json").read_text())
    assert (found["state"], found["steps"], found["machine"]) == (state, 24, {"flops": 200_000_000_000})
    assert said in (run.path / "report.html").read_text()


def test_a_report_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch):
    run, shown = make_run(tmp_path / "run"), io.StringIO()
    monkeypatch.setattr(page_module, "page", lambda view: 1 / 0)
    with pytest.raises(Tracked), Status(run, Console(file=shown), Machine(1.0, lambda share: 1.0)).kept([]):
        raise Tracked("first")
    assert "report.html could not be written: division by zero" in shown.getvalue()
    assert json.loads((run.path / "status.json").read_text())["message"] == "first"


def test_other_processes_write_nothing(tmp_path):
    run = make_run(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in sorted(Path(run.path).rglob("*"))}
    status = Status(run, Console(quiet=True), Machine(1.0, lambda share: 1.0), main=False)
    status.on_train_begin(None, SimpleNamespace(global_step=0, max_steps=24), None)  # type: ignore[arg-type]
    with status.kept([]):
        pass
    assert {path: path.stat().st_mtime_ns for path in sorted(Path(run.path).rglob("*"))} == before
