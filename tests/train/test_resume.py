"""--resume: from the newest whole checkpoint, under the same recipe, exactly; and what stops a run loses nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llama_ft import load_recipe
from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe.run import Run
from llama_ft.train import checkpoints, resumable
from llama_ft.train import finish as finish_room
from llama_ft.train.checkpoints import newest_whole, position_of, remove_old, seal, verify
from llama_ft.train.resume import check_same_recipe
from llama_ft.train.trainer import LlamaTrainer
from tests.conftest import ROOT
from tests.train.conftest import ENVIRONMENT, metric, train_here
from tests.train.kills import ADAPTER, SMALL, figures


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """What a model answers is not looked at here."""
    shorten(monkeypatch)


def shorten(patch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_NEW_TOKENS", "DURING_NEW_TOKENS"):
        patch.setattr(f"llama_ft.train.samples.{name}", 2)


@pytest.fixture(scope="module")
def settings(small_base) -> list[str]:
    return [f"model.base={small_base}", *SMALL, *ADAPTER, "training.keep_checkpoints=null"]


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory) -> Run:
    """Six steps, checkpoints after the second, fourth and sixth, evaluations after the third and the sixth."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        return train_here([*settings, f"output_dir={tmp_path_factory.mktemp('unbroken') / 'run'}"])


@pytest.fixture
def copy(unbroken, tmp_path) -> Run:
    """The same run in another folder, to be broken."""
    return Run(Path(shutil.copytree(unbroken.path, tmp_path / "run")))


def same(run: Run, other: Run) -> bool:
    """Bit for bit: everything measured, and the adapter."""
    weights = [(each.adapter / "adapter_model.safetensors").read_bytes() for each in (run, other)]
    return figures(run.metrics_file) == figures(other.metrics_file) and weights[0] == weights[1]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# --- what a checkpoint holds ---


def test_a_checkpoint_holds_all_that_a_resume_needs(unbroken):
    folder = unbroken.checkpoint(4)
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    there = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert there == {*listed, "manifest.json"}
    needed = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    assert needed | {"position.json", "recipe.yaml", "run.lock.json"} <= there
    assert "training_args.bin" not in there, "a pickle that nothing needs"
    assert verify(folder) == []
    position = position_of(unbroken.checkpoint(6))
    # 20 documents are five steps of four: the sixth step is the first of the second epoch.
    assert (position["step"], position["epoch"], position["documents"], position["micro_batches"]) == (6, 1, 4, 2)
    assert position["held_out_loss"] == metric(unbroken.path, "eval_loss")[-1]
    assert position["tokens"] == metric(unbroken.path, "tokens")[-1]
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(folder / name, weights_only=True)  # refuses what could run code


@pytest.fixture
def small_run(tmp_path) -> Run:
    """Three sealed folders of a few bytes, held-out loss lowest in the first."""
    run = Run(tmp_path / "run")
    for step, loss in ((10, 1.0), (20, 1.5), (30, None)):
        folder = run.checkpoint(step)
        folder.mkdir(parents=True)
        (folder / "optimizer.pt").write_bytes(bytes(range(256)))
        (folder / "part").mkdir()
        (folder / "part" / "weights").write_bytes(b"w" * 100)
        seal(folder, run, {"step": step, "held_out_loss": loss})
    return run


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda folder: flip_a_bit(folder / "optimizer.pt"), "optimizer.pt: checksum"),
        (lambda folder: (folder / "part" / "weights").unlink(), "part/weights: missing"),
        (lambda folder: (folder / "part" / "weights").write_bytes(b"w" * 99), "part/weights: 99 bytes instead of 100"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json: missing"),
        (
            lambda folder: (folder / "manifest.json").write_text('{"files": {"optimizer'),
            "manifest.json: cannot be read",
        ),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json: cannot be read"),
    ],
    ids=["flipped bit", "missing", "cut", "no manifest", "cut manifest", "other manifest"],
)
def test_a_damaged_checkpoint_is_found_and_named(small_run, damage, fault):
    damage(small_run.checkpoint(30))
    assert verify(small_run.checkpoint(30)) == [fault]
    assert newest_whole(small_run) == (20, {30: [fault]})


def test_no_more_is_read_than_must_be(small_run, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoints, "verify", lambda folder: read.append(folder.name) or [])
    assert newest_whole(small_run) == (30, {})
    assert read == ["step-30"]


def test_the_newest_and_the_best_are_kept(small_run):
    assert remove_old(small_run, None) == []
    assert remove_old(small_run, 1) == [20]
    assert small_run.steps() == [10, 30]
    assert sorted(path.name for path in small_run.checkpoints.iterdir()) == ["step-10", "step-30"]


def test_what_a_kill_left_is_tidied_up(small_run):
    for name in (".writing", ".step-5.removing"):
        (small_run.checkpoints / name).mkdir()
    small_run.checkpoint(30).rename(small_run.checkpoints / ".step-30.old")
    checkpoints.tidy(small_run)
    assert small_run.steps() == [10, 20, 30]
    assert not list(small_run.checkpoints.glob(".*"))


# --- another recipe ---


def recipes(*changes: str) -> tuple[Any, Any]:
    return load_recipe("quickstart"), load_recipe("quickstart", list(changes))


def test_every_difference_that_matters_is_said_with_both_values():
    changes = ["training.learning_rate=1e-4", "adapter.r=8", "data.0.limit=10", "training.max_steps=40", "name=other"]
    with pytest.raises(UserError) as caught:
        check_same_recipe(*recipes(*changes), Path("run/recipe.yaml"))
    assert [problem.key for problem in caught.value.problems] == [
        "adapter.r",
        "data.0.limit",
        "training.max_steps",
        "training.learning_rate",
    ]
    text = str(caught.value)
    for part in ("0.003", "0.0001", "16", "8", "null", "10", "--overwrite"):
        assert part in text, part


@pytest.mark.parametrize(
    "changes",
    [
        ["name=other", "output_dir=elsewhere", "tracking=[]"],
        ["training.save_every=7", "training.keep_checkpoints=2", "training.eval_every=9", "training.max_spike=0"],
        ["export.merged=false", "export.checkpoint=best", "export.dtype=float32"],
        ["training.micro_batch=2", "training.gradient_checkpointing=selective", "model.attention=plain"],
        ["sequence.packing=false"],
    ],
)
def test_what_does_not_matter_may_change(changes):
    found = check_same_recipe(*recipes(*changes), Path("recipe.yaml"))
    for key in (change.partition("=")[0] for change in changes):
        assert any(one.key.startswith(key) for one in found), key


def test_a_constant_rate_may_go_on_for_longer():
    constant = ["training.schedule=constant", "training.warmup=10", "training.max_steps=40"]
    old, new = load_recipe("quickstart", constant), load_recipe("quickstart", [*constant[:2], "training.max_steps=80"])
    assert [str(one) for one in check_same_recipe(old, new, Path("r"))] == ["training.max_steps: 40 → 80"]


def test_a_run_is_not_resumed_under_another_recipe(copy, settings):
    before = copy.recipe_file.read_text()
    flip_a_bit(copy.checkpoint(6) / "optimizer.pt")
    with pytest.raises(UserError, match=r"training.weight_decay: this run began with 0.0, .* value than that: 0.5"):
        train_here([*settings, f"output_dir={copy.path}", "training.weight_decay=0.5"], resume=True)
    assert copy.recipe_file.read_text() == before
    assert copy.steps() == [2, 4, 6], "nothing is touched"


def test_a_change_that_only_rounds_is_used_said_and_recorded(copy, unbroken, settings, capsys):
    """Without dropout, whose random numbers would be others."""
    plain = [*settings, "adapter.dropout=0", f"output_dir={copy.path}"]
    whole = train_here(plain, overwrite=True)
    expected = metric(whole.path)
    for step in (4, 6):
        shutil.rmtree(copy.checkpoint(step))
    changes = ["training.micro_batch=4", "training.save_every=3"]
    run = train_here([*plain, *changes], resume=True)
    said = capsys.readouterr().out
    assert "going on from step-2" in said
    assert "changed: training.micro_batch: 2 → 4" in said
    assert "equal an unbroken run's to rounding: training.micro_batch" in said
    assert max(abs(a - b) for a, b in zip(metric(run.path), expected, strict=True)) <= 1e-5
    assert run.steps() == [2, 3, 6], "the new save_every is in force"
    resumed = json.loads(run.lock_file.read_text())["resumed"]
    assert [(one["step"], one["micro_batch"], one["world_size"]) for one in resumed] == [(2, 4, 1)]
    assert resumed[0]["changed"] == {"training.micro_batch": [2, 4], "training.save_every": [2, 3]}
    assert load_recipe(str(run.recipe_file)).training.micro_batch == 4


# --- damage ---


def test_a_damaged_checkpoint_is_kept_and_the_older_one_used(copy, unbroken, settings, capsys):
    flip_a_bit(copy.checkpoint(6) / "adapter_model.safetensors")
    (copy.checkpoint(4) / "rng_state.pth").unlink()
    train_here([*settings, f"output_dir={copy.path}"], resume=True)
    said = capsys.readouterr().out
    assert "checkpoint step-6 is damaged (adapter_model.safetensors: checksum); kept as step-6.damaged" in said
    assert "checkpoint step-4 is damaged (rng_state.pth: missing); kept as step-4.damaged" in said
    assert "going on from step-2" in said
    assert (copy.checkpoints / "step-6.damaged" / "adapter_model.safetensors").exists()
    assert copy.steps() == [2, 4, 6]
    assert same(copy, unbroken)


def test_without_a_whole_checkpoint_nothing_is_touched(copy, settings):
    for step in copy.steps():
        flip_a_bit(copy.checkpoint(step) / "optimizer.pt")
    with pytest.raises(UserError, match=r"step-6: the checkpoint is damaged \(optimizer.pt: checksum\)") as caught:
        train_here([*settings, f"output_dir={copy.path}"], resume=True)
    assert len(caught.value.problems) == 3
    assert "--overwrite" in str(caught.value)
    assert copy.steps() == [2, 4, 6]
    assert copy.adapter.exists()


def test_a_finished_run_without_checkpoints_is_not_begun_again(copy, settings):
    shutil.rmtree(copy.checkpoints)
    with pytest.raises(UserError, match="a finished run without checkpoints"):
        train_here([*settings, f"output_dir={copy.path}"], resume=True)
    assert copy.adapter.exists()


# --- the best checkpoint ---


def test_the_best_checkpoint_becomes_the_result(settings, tmp_path, capsys):
    """A rate that rises until it ruins the model: held-out losses after two, four and six steps."""
    rising = ["training.learning_rate=0.25", "training.warmup=5", "training.eval_every=2", "training.max_spike=0"]
    changes = [*rising, "training.keep_checkpoints=1"]
    best = ["export.checkpoint=best", "export.merged=true", f"output_dir={tmp_path / 'run'}"]
    run = train_here([*settings, *changes, *best])
    losses = metric(run.path, "eval_loss")[1:]  # the first is that of the base
    step = 2 * losses.index(min(losses)) + 2
    assert step < 6, "the last is the best: nothing is shown"
    assert f"result: step-{step}, held-out {min(losses):.4f} (the last: {losses[-1]:.4f})" in capsys.readouterr().out
    assert run.steps() == [step, 6]
    kept, result = (load_file(folder / "adapter_model.safetensors") for folder in (run.checkpoint(step), run.adapter))
    assert all(torch.equal(kept[name], result[name]) for name in kept)
    lock = json.loads(run.lock_file.read_text())["result"]
    assert (lock["checkpoint"], lock["step"], lock["held_out_loss"]) == ("best", step, min(losses))
    assert json.loads(run.proof_file.read_text())["ok"] is True
    assert f"step {step}" in run.card_file.read_text()
    flip_a_bit(run.checkpoint(step) / "adapter_model.safetensors")
    with pytest.raises(MachineFault, match="the best checkpoint is damaged") as caught:
        train_here([*settings, *changes, *best], resume=True)
    assert "export.checkpoint=last" in str(caught.value)


# --- processes ---


def test_two_processes_save_both_random_states_and_one_goes_on(settings, unbroken, tmp_path):
    """Without dropout the curve is the one process's to rounding, also where one goes on with what two began."""
    changes = [*settings, "adapter.dropout=0", f"output_dir={tmp_path / 'two'}"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    line = [*launch, "-m", "llama_ft.train", "quickstart", *changes, "training.micro_batch=1"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "two")
    for step in (2, 4, 6):
        listed = json.loads((run.checkpoint(step) / "manifest.json").read_text())["files"]
        assert {"rng_state_0.pth", "rng_state_1.pth"} <= listed.keys()
        assert verify(run.checkpoint(step)) == []
    two, tokens = metric(run.path), metric(run.path, "tokens")
    for step in (4, 6):
        shutil.rmtree(run.checkpoint(step))
    one = train_here([*changes, "training.micro_batch=2"], resume=True)
    assert max(abs(a - b) for a, b in zip(metric(one.path), two, strict=True)) <= 1e-5
    assert metric(one.path, "tokens") == tokens
    assert json.loads(one.lock_file.read_text())["resumed"][0]["world_size"] == 1


# --- signals ---


def signal_at(monkeypatch, owner: Any, name: str, *numbers: int, at: int = 1, when=lambda *_: True) -> None:
    """Sends this process signals when a function is called for the n-th time."""
    inner, calls = getattr(owner, name), []

    def outer(*args: Any, **kwargs: Any) -> Any:
        if when(*args):
            calls.append(name)
            if len(calls) == at:
                for number in numbers:
                    os.kill(os.getpid(), number)
        return inner(*args, **kwargs)

    monkeypatch.setattr(owner, name, outer)


def stopped(overrides: list[str], **flags: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        train_here(overrides, **flags)
    assert caught.value.code == 130


def test_sigterm_in_an_evaluation_gives_it_up_and_the_resume_evaluates(settings, unbroken, tmp_path, monkeypatch):
    """The evaluation is that after the third step, where no checkpoint is due."""
    here = [*settings, f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        when = lambda self, *_: self.state.global_step and not self.model.training  # noqa: E731
        signal_at(patch, LlamaTrainer, "_prepare_inputs", signal.SIGTERM, when=when)
        stopped(here)
    run = Run(tmp_path / "run")
    assert run.steps() == [2, 3]
    assert position_of(run.checkpoint(3))["evaluation_due"] is True
    train_here(here, resume=True)
    assert same(run, unbroken)
    assert position_of(run.checkpoint(3))["held_out_loss"] == metric(run.path, "eval_loss")[1]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_before_the_first_step_ends_the_run_at_once(settings, unbroken, tmp_path, monkeypatch, capfd, number):
    here = [*settings, f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        signal_at(patch, LlamaTrainer, "_prepare_inputs", number)
        stopped(here)
    said = capfd.readouterr().err
    assert "there is no checkpoint yet, start again with the same command and --resume" in said
    assert Run(tmp_path / "run").steps() == []
    if number == signal.SIGTERM:
        train_here(here, resume=True)
        assert "it begins again" in capfd.readouterr().out
        assert same(Run(tmp_path / "run"), unbroken)


def test_signals_in_a_save_wait_until_it_is_whole(settings, unbroken, tmp_path, monkeypatch, capfd):
    here = [*settings, f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        signal_at(patch, resumable, "seal", signal.SIGINT, signal.SIGINT, signal.SIGTERM)
        stopped(here)
    assert "stopping as soon as the checkpoint is whole" in capfd.readouterr().err
    run = Run(tmp_path / "run")
    assert run.steps()[0] == 2
    assert all(verify(run.checkpoint(step)) == [] for step in run.steps())
    assert not list(run.checkpoints.glob(".*"))
    train_here(here, resume=True)
    assert figures(run.metrics_file) == figures(unbroken.metrics_file)


def test_a_signal_after_the_last_step_leaves_the_result_to_the_resume(settings, unbroken, tmp_path, monkeypatch, capfd):
    """And the resume takes no step more, although the run ends inside an epoch."""
    here = [*settings, f"output_dir={tmp_path / 'run'}"]
    with monkeypatch.context() as patch:
        signal_at(patch, finish_room, "save_adapter", signal.SIGTERM)
        stopped(here)
    assert "checkpoint step-6 is whole" in capfd.readouterr().err
    run = Run(tmp_path / "run")
    assert not run.adapter.exists()
    train_here(here, resume=True)
    assert len(metric(run.path)) == 6
    assert same(run, unbroken)


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB at tmp_path/disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize(
    "place",
    [
        "_save_optimizer_and_scheduler",
        pytest.param("save_model", marks=pytest.mark.slow),
        "manifest",
        pytest.param("metrics", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(settings, unbroken, small_disk, monkeypatch, place):
    """Really full: from inside the second save, or while the third step's line is written, not a page more fits."""
    here = [*settings, "training.max_steps=4", f"output_dir={small_disk / 'run'}"]
    fill, calls = small_disk / "fill", []
    owner, name, nth = {
        "manifest": (checkpoints, "write_json", 4),  # a save writes position.json and manifest.json
        "metrics": (LlamaTrainer, "log", 5),  # the base's evaluation, three steps, an evaluation
    }.get(place, (LlamaTrainer, place, 2))
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == nth:
            with fill.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
                while True:
                    file.write(bytes(4096))
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, outer)
        with pytest.raises(MachineFault, match="the disk failed") as caught:
            train_here(here)
    assert "checkpoint step-2 is whole" in str(caught.value)
    assert "--resume" in str(caught.value)
    run = Run(small_disk / "run")
    assert run.steps() == [2]
    assert not list(run.checkpoints.glob(".*"))
    assert verify(run.checkpoint(2)) == []
    if place == "metrics":
        fill.unlink()
        train_here(here, resume=True)
        assert len(metric(run.path)) == 4


@pytest.mark.parametrize("number", [errno.EROFS, pytest.param(errno.EIO, marks=pytest.mark.slow)])
def test_a_disk_that_fails_is_said(settings, tmp_path, monkeypatch, number):
    """A disk that the kernel made read-only, or that cannot be read, in the second save."""
    publish, calls = resumable.publish, []

    def refuse(written: Path, final: Path) -> None:
        calls.append(final)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        publish(written, final)

    monkeypatch.setattr(resumable, "publish", refuse)
    with pytest.raises(MachineFault, match=os.strerror(number)) as caught:
        train_here([*settings, f"output_dir={tmp_path / 'run'}"])
    assert "mend the disk; checkpoint step-2 is whole" in str(caught.value)
    assert Run(tmp_path / "run").steps() == [2]
