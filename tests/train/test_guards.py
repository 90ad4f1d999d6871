"""A step that must not be taken is not: its rows are named and saved, and checkpoints stay whole. On every road."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama_ft.data.order import document_order
from llama_ft.errors import UserError
from llama_ft.recipe.run import Run
from llama_ft.train.guards import Diverged, fault_of
from tests.conftest import ROOT
from tests.tiny_run import make_base
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric, train_here

ROWS = 48
ANSWER = "The llama eats grass and hay while the alpaca sleeps on a hill of stones near the river."


def row(question: str, answer: str = ANSWER) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose embedding of `~` is no number, as a broken download or a half-written shard leaves it."""
    from transformers import AutoTokenizer

    folder = make_base(tmp_path_factory.mktemp("poisoned"), tied=False)
    weights = load_file(folder / "model.safetensors")
    token = AutoTokenizer.from_pretrained(folder).encode("~", add_special_tokens=False)[-1]
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_rows(path: Path, odd: dict[str, Any], step: int, global_batch: int) -> int:
    """ROWS rows, and the odd one where the first epoch meets it in `step` (from 1). Returns its place in the file."""
    place = int(document_order(ROWS, 42, 0)[(step - 1) * global_batch])
    rows = [row(f"What does llama number {i} eat?") for i in range(ROWS)]
    rows[place] = odd
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return place


def overrides(base: Path, folder: Path, *changes: str) -> list[str]:
    data = json.dumps([{"path": str(folder / "rows.jsonl"), "layout": "messages"}])
    return [
        f"model.base={base}",
        "model.dtype=float32",
        f"data={data}",
        "eval_data=null",
        "training.epochs=2",
        "training.global_batch=4",
        "training.micro_batch=2",
        "training.save_every=2",
        "training.learning_rate=1e-2",
        "export.merged=false",
        "tracking=[]",
        f"output_dir={folder / 'run'}",
        *changes,
    ]


def saved(folder: Path, step: int) -> list[dict[str, Any]]:
    text = (folder / "run" / "faults" / f"step-{step}.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text, "not JSON"
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("loss", "norm", "before", "max_spike", "said"),
    [
        (2.0, 1.0, [2.0] * 20, 5.0, None),
        (math.nan, 1.0, [], 0, "the loss is nan"),
        (math.inf, 1.0, [], 0, "the loss is inf"),
        (2.0, math.nan, [], 0, "the norm of the gradient is nan"),
        (2.0, math.inf, [2.0] * 20, 5.0, "the norm of the gradient is inf"),
        (8.0, 1.0, [2.0] * 10, 5.0, "the loss is 8.00, 6.00 nats above the median of the 10 steps before"),
        (8.0, 1.0, [2.0] * 9, 5.0, None),
        (8.0, 1.0, [2.0] * 20, 0, None),
        (6.9, 1.0, [2.0] * 20, 5.0, None),
        (8.0, 1.0, [2.0] * 100 + [7.0] * 20, 5.0, None),  # only the 20 before it count
        (8.0, 1.0, [1.0, 1.0, 1.0, *[2.0] * 14, 9.0, 9.0, 9.0], 5.0, "6.00 nats above the median of the 20"),
    ],
)
def test_which_steps_are_not_taken(loss, norm, before, max_spike, said):
    fault = fault_of(loss, norm, before, max_spike)
    assert (fault is None) == (said is None)
    assert fault is None or said in fault.what


ROADS = {
    "packed": [],
    "padded": ["sequence.packing=false"],
    "accumulated": ["training.micro_batch=1"],
    "not clipped": ["training.max_grad_norm=0"],
}


@pytest.mark.parametrize("road", ROADS)
def test_a_loss_that_is_no_number_stops_the_run_before_the_step(poisoned, tmp_path, road):
    place = write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=5, global_batch=4)
    with pytest.raises(Diverged) as caught:
        train_here(overrides(poisoned, tmp_path, *ROADS[road]))
    block = caught.value.block()
    assert block.startswith("llama-ft: stopped before step 5\n")
    assert "the loss is nan" in block
    assert f"rows.jsonl, row {place}, epoch 0: loss no number" in block
    assert "checkpoint step-4 is whole" in block and "--overwrite" in block
    assert caught.value.exit_code == 2
    run = Run(tmp_path / "run")
    assert run.steps() == [2, 4] and not list(run.checkpoints.glob(".*"))
    assert len(metric(run.path)) == 4 and all(map(math.isfinite, metric(run.path)))
    records = saved(tmp_path, 5)
    assert len(records) == 4
    assert [record["row"] for record in records if record["loss"] is None] == [place]
    guilty = next(record for record in records if record["loss"] is None)
    assert "Is ~ a llama?" in guilty["text"] and guilty["source"].endswith("rows.jsonl") and guilty["epoch"] == 0
    assert len(guilty["input_ids"]) == len(guilty["labels"]) and guilty["labelled"] > 0
    first_epoch = document_order(ROWS, 42, 0)[16:20].tolist()
    assert sorted(record["row"] for record in records) == sorted(first_epoch)


def test_no_weight_has_moved_when_a_step_is_refused(poisoned, tmp_path, monkeypatch):
    """The optimizer is not asked for the step that is refused: nothing poisoned is ever in memory or saved."""
    taken = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (taken.append(1), real(self, *a, **k))[1])
    write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=3, global_batch=4)
    with pytest.raises(Diverged):
        train_here(overrides(poisoned, tmp_path))
    assert len(taken) == 2


def test_weights_that_are_broken_are_told_from_rows(poisoned, tmp_path):
    """Where every document fails, no row is blamed."""
    write_rows(tmp_path / "rows.jsonl", row("Is it?"), step=1, global_batch=4)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"][0] = math.inf
    base = make_base(tmp_path / "base", tied=False)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(Diverged, match="the weights are broken, not a row") as caught:
        train_here(overrides(base, tmp_path))
    assert "there was no checkpoint yet" in caught.value.block()


SPIKE = ["training.global_batch=1", "training.micro_batch=1", "training.max_spike=2"]


def test_a_spike_stops_the_run_and_may_be_passed(tiny_base, tmp_path):
    odd = row("What now?", "QZX 0417 !!%% jkvw ?? 93&7 ZZQ ##@@ 5550 wvu TSR")
    place = write_rows(tmp_path / "rows.jsonl", odd, step=40, global_batch=1)
    settings = overrides(tiny_base, tmp_path, *SPIKE, "training.max_steps=44", "training.save_every=10")
    with pytest.raises(Diverged) as caught:
        train_here(settings)
    block = caught.value.block()
    assert "nats above the median of the 20 steps before" in block
    assert f"rows.jsonl, row {place}, epoch 0: loss " in block
    assert "checkpoint step-30 is whole; --resume training.max_spike=0 goes past it" in block
    assert [record["row"] for record in saved(tmp_path, 40)] == [place]
    with pytest.raises(Diverged, match="nats above"):  # a resumed run remembers what was usual
        train_here(settings, resume=True)
    run = train_here([*settings, "training.max_spike=0"], resume=True)
    losses = metric(run.path)
    assert len(losses) == 44 and losses[39] > losses[38] + 2


def test_the_gradient_norm_is_logged_clipped_or_not(tiny_base, tmp_path):
    write_rows(tmp_path / "rows.jsonl", row("What now?"), step=1, global_batch=4)
    norms = {}
    for limit in (1.0, 0):
        changes = ["training.max_steps=3", f"training.max_grad_norm={limit}", f"output_dir={tmp_path / str(limit)}"]
        norms[limit] = metric(train_here(overrides(tiny_base, tmp_path, *changes)).path, "grad_norm")
    assert len(norms[0]) == len(norms[1.0]) == 3
    assert norms[0][0] == pytest.approx(norms[1.0][0], rel=1e-6), "the norm before clipping, in both"
    assert norms[0][0] > 1.0, "clipping had something to do"


def test_a_stream_names_its_rows(poisoned, tmp_path):
    place = write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=1, global_batch=1)
    changes = ["mixture.streaming=true", "mixture.shuffle_buffer=8", "training.max_steps=24", "training.epochs=1"]
    with pytest.raises(Diverged) as caught:
        train_here(overrides(poisoned, tmp_path, *changes))
    assert f"rows.jsonl, row {place}: loss no number" in caught.value.block()


def test_all_processes_stop_and_all_rows_are_told(poisoned, tmp_path):
    place = write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=3, global_batch=4)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line += ["-m", "llama_ft.train", "quickstart", *overrides(poisoned, tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=200)
    assert done.returncode != 0
    assert done.stderr.count("llama-ft: stopped before step 3") == 1, done.stderr
    assert f"rows.jsonl, row {place}, epoch 0: loss no number" in done.stderr
    records = saved(tmp_path, 3)
    assert sorted(record["row"] for record in records) == sorted(document_order(ROWS, 42, 0)[8:12].tolist())
    assert {record["process"] for record in records} == {0, 1}
    assert Run(tmp_path / "run").steps() == [2]


@pytest.mark.slow
def test_deepspeed_does_not_take_the_step_either(poisoned, tmp_path):
    """Its backward pass takes the step with it: the loss is judged before."""
    pytest.importorskip("deepspeed")
    place = write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=3, global_batch=4)
    machine = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "num_processes": 2}
    machine["main_process_port"] = 0  # a free one: another test may be on accelerate's own
    engine = {"zero_stage": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    config = {"distributed_type": "DEEPSPEED", "use_cpu": True, "mixed_precision": "no", "deepspeed_config": engine}
    (tmp_path / "launch.yaml").write_text(json.dumps({**machine, **config}))
    line = [*ACCELERATE, "--config_file", str(tmp_path / "launch.yaml"), "-m", "llama_ft.train", "quickstart"]
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    line += overrides(poisoned, tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=400)
    assert done.returncode != 0
    assert done.stderr.count("llama-ft: stopped before step 3") == 1, done.stderr
    assert f"rows.jsonl, row {place}, epoch 0: loss no number" in done.stderr
    assert sum(record["loss"] is None for record in saved(tmp_path, 3)) == 1, "the weights are as they were"


def test_the_exit_status_through_llama_ft_train(poisoned, tmp_path):
    write_rows(tmp_path / "rows.jsonl", row("Is ~ a llama?"), step=3, global_batch=4)
    line = [sys.executable, "-m", "llama_ft.cli", "train", "quickstart", *overrides(poisoned, tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=200)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "llama-ft: stopped before step 3" in done.stderr
    assert issubclass(Diverged, UserError)
