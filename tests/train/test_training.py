"""The trainer: the same losses as a plain reference and however the work is cut up; what it writes; what it refuses."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.peers import trl
from benchmarks.peers.common import Clock, Spec
from benchmarks.preference import write_adapter
from llama_ft import load_recipe, prepare_data
from llama_ft.data.order import document_order
from llama_ft.errors import MachineFault, UserError
from llama_ft.llama.fast import PLAIN
from llama_ft.llama.projections import project_each
from llama_ft.recipe.run import Run
from llama_ft.train.trainer import LlamaTrainer
from tests.train.conftest import metric, run_command, train_here

ALPACA = "instruct/alpaca_5000.json"


def test_losses_equal_a_float32_trl_reference(small_base, real_data, tmp_path):
    """Real Alpaca rows through `accelerate launch`, beside TRL's own trainer and HF's LLaMA on the same ids."""
    overrides = [
        f"model.base={small_base}",
        "data=[{use: alpaca, path: %s, limit: 32}]" % (real_data / ALPACA),
        "template=alpaca",
        "eval_data=null",
        "training.global_batch=8",
        "training.max_steps=6",
        "training.learning_rate=1e-3",
        "training.schedule=constant",
        "training.warmup=0.0",
        "export.merged=false",
        f"output_dir={tmp_path / 'run'}",
    ]
    done = run_command(overrides)
    assert done.returncode == 0, done.stderr
    recipe = load_recipe("quickstart", overrides)
    train = prepare_data(recipe).train
    documents = tmp_path / "documents.jsonl"
    order = [i for epoch in range(2) for i in document_order(len(train), recipe.training.seed, epoch)]
    rows = [{key: train[int(i)][key] for key in ("input_ids", "labels")} for i in order]
    documents.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "trl.json"
    spec = Spec(
        contender="trl-tuned",
        model=str(small_base),
        documents=str(documents),
        adapter=str(write_adapter(recipe, prepare_data(recipe), tmp_path)),
        steps=6,
        learning_rate=1e-3,
        threads=torch.get_num_threads(),
        out=str(out),
    )
    clock = Clock(spec)
    trl.run(spec, clock)
    clock.write()
    expected = [step["loss"] for step in json.loads(out.read_text())["steps"]]
    found = metric(tmp_path / "run")
    assert len(found) == 6
    assert found[-1] < found[0] - 0.1, "nothing was learnt, so nothing was compared"
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-4


def test_a_finished_run_is_whole(overrides, tmp_path):
    extra = ["eval_data=[{use: llama-qa, split: heldout}]", "training.max_steps=12", "training.learning_rate=5e-3"]
    run = train_here([o for o in overrides if not o.startswith("eval_data")] + extra)
    for name in ("recipe.yaml", "run.lock.json", "metrics.jsonl", "loss.png", "export.json", "README.md"):
        assert (run.path / name).stat().st_size > 0, name
    for name in ("adapter", "merged", "checkpoints/step-12", "tensorboard"):
        assert any((run.path / name).iterdir()), name
    assert not list(run.path.glob(".*")), "something was left half-written"
    assert not list(run.checkpoints.glob(".*"))
    assert load_recipe(str(run.recipe_file)) == run.recipe
    lock = json.loads(run.lock_file.read_text())
    assert (lock["micro_batch"] * lock["accumulation"] * lock["world_size"], lock["seed"]) == (8, 42)
    assert lock["hashes"]["data"]
    assert json.loads(run.proof_file.read_text())["ok"] is True
    held_out = metric(run.path, "eval_loss")
    assert held_out[-1] < held_out[0]
    samples = json.loads(run.samples_file.read_text())
    assert len(samples) == 5
    assert all({"question", "reference", "before", "after"} <= sample.keys() for sample in samples)
    assert any(sample["before"] != sample["after"] for sample in samples)
    tensors = load_file(run.adapter / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def baseline(small_base, tmp_path_factory) -> list[float]:
    folder = tmp_path_factory.mktemp("baseline")
    return curve(small_base, folder, ["training.micro_batch=8"])


def settings_of_the_curve(base: Path, folder: Path) -> list[str]:
    return [
        f"model.base={base}",
        "data.0.limit=44",  # not a multiple of the batch: the last step of an epoch is smaller
        "eval_data=null",
        "training.global_batch=8",
        "training.max_steps=8",
        "training.save_every=100",
        "training.learning_rate=2e-3",
        "export.merged=false",
        f"output_dir={folder / 'run'}",
    ]


def curve(base: Path, folder: Path, changes: list[str]) -> list[float]:
    return metric(train_here([*settings_of_the_curve(base, folder), *changes]).path)


@pytest.mark.parametrize(
    "changes",
    [
        ["training.micro_batch=1"],
        ["training.micro_batch=4"],
        ["sequence.packing=false", "training.micro_batch=4"],
        ["training.gradient_checkpointing=true", "training.micro_batch=8"],
        ["training.gradient_checkpointing=selective", "model.attention=plain", "training.micro_batch=8"],
    ],
    ids=["one at a time", "accumulated", "padded", "checkpointed", "selective, plain attention"],
)
def test_the_curve_does_not_depend_on_how_the_work_is_cut(small_base, baseline, tmp_path, changes):
    found = curve(small_base, tmp_path, changes)
    assert len(found) == len(baseline) == 8
    assert max(abs(a - b) for a, b in zip(found, baseline, strict=True)) <= 1e-5


def test_the_curve_does_not_depend_on_the_fast_paths(small_base, baseline, tmp_path, monkeypatch):
    """Every fast path switched to its plain twin: attention, head, elementwise, last layer's rows, the LoRA product."""
    monkeypatch.setattr("llama_ft.train.load.Fast", lambda attention: PLAIN)
    monkeypatch.setattr("llama_ft.adapters.lora.fused_project", project_each)
    found = curve(small_base, tmp_path, ["training.micro_batch=8"])
    assert max(abs(a - b) for a, b in zip(found, baseline, strict=True)) <= 1e-5


def test_the_curve_is_the_same_through_the_real_command(small_base, baseline, tmp_path):
    """Everything cut another way at once, started as a user does."""
    changes = ["training.micro_batch=2", "sequence.packing=false", "training.gradient_checkpointing=true"]
    line = [*settings_of_the_curve(small_base, tmp_path), *changes, "model.attention=plain"]
    done = run_command(line)
    assert done.returncode == 0, done.stderr
    found = metric(tmp_path / "run")
    assert max(abs(a - b) for a, b in zip(found, baseline, strict=True)) <= 1e-5


def test_full_tuning(overrides, small_base):
    run = train_here([*overrides, "adapter.method=full", "training.learning_rate=1e-4", "training.max_steps=4"])
    trained, base = load_file(run.merged / "model.safetensors"), load_file(small_base / "model.safetensors")
    assert trained.keys() == base.keys()
    assert all(not torch.equal(trained[name], base[name]) for name in base if "proj" in name)
    assert json.loads(run.proof_file.read_text())["ok"] is True


def test_a_second_run_is_refused_and_overwrite_replaces(overrides):
    short = [*overrides, "training.max_steps=2", "export.merged=false"]
    first = metric(train_here(short).path)
    with pytest.raises(UserError, match=r"already holds a run \(checkpoint step-2\)") as caught:
        train_here(short)
    assert "--resume" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert metric(train_here(short, overwrite=True).path) == first


def test_resume_is_exact(overrides, tmp_path):
    """Stopped after a checkpoint and resumed: bit-identical losses and weights."""
    whole = train_here([*overrides, "export.merged=false", f"output_dir={tmp_path / 'whole'}"])
    broken = [*overrides, "export.merged=false"]
    train_here(broken)
    run = Run(tmp_path / "run")
    shutil.rmtree(run.checkpoint(6))  # as a kill after step 4's checkpoint leaves it
    shutil.rmtree(run.checkpoint(2))
    train_here(broken, resume=True)
    assert metric(run.path) == metric(whole.path)
    a, b = (load_file(r.adapter / "adapter_model.safetensors") for r in (run, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_resume_without_a_checkpoint(overrides):
    with pytest.raises(UserError, match="no run to resume"):
        train_here(overrides, resume=True)


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(overrides, tmp_path, monkeypatch):
    save = LlamaTrainer._save_optimizer_and_scheduler
    calls = []

    def fill_up(self, folder):
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, folder)

    monkeypatch.setattr(LlamaTrainer, "_save_optimizer_and_scheduler", fill_up)
    with pytest.raises(MachineFault, match="No space left") as caught:
        train_here(overrides)
    assert "step-2 is whole" in str(caught.value)
    assert "--resume" in str(caught.value)
    run = Run(tmp_path / "run")
    assert run.steps() == [2]
    assert not list(run.checkpoints.glob(".*"))
    monkeypatch.undo()
    train_here([*overrides, "export.merged=false"], resume=True)
    assert run.steps()[-1] == 6


def test_a_disk_too_small_is_said_before_training(overrides, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("llama_ft.train.checks.shutil.disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(MachineFault, match="the run needs about") as caught:
        train_here(overrides)
    assert "0.0 GiB are free" in str(caught.value)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_launch_that_dropped_processes_is_refused(overrides, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="asked for several processes and started one"):
        train_here(overrides)
