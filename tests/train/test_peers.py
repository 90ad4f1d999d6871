"""A process that is lost or stands still ends all others, and is named, within a bound; checkpoints stay whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from llama_ft.recipe.run import Run
from llama_ft.train.checkpoints import verify
from llama_ft.train.headway import BACKWARD, FORWARD, Headway
from llama_ft.train.join import Company
from llama_ft.train.store import Board, Place
from llama_ft.train.verdict import GRACE, LOST, SOON, Seen, Verdict, judge
from tests.conftest import ROOT
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric, train_here
from tests.train.ranks import Hook, Ranks, block_of

SLACK = 8.0
"""Seconds beside a bound of the watch: two beats, what the others are given to hear, and the end of a process on a
loaded machine."""
SETTINGS = [
    "model.dtype=float32",
    "data.0.limit=24",
    "eval_data=null",
    "training.global_batch=4",
    "training.micro_batch=1",
    "training.save_every=2",
    "training.keep_checkpoints=3",
    "training.schedule=constant",
    "training.warmup=0",
    "export.merged=false",
    "tracking=[]",
]
ENDLESS = "training.max_steps=100000"


@pytest.fixture
def ranks(tiny_base, tmp_path) -> Iterator[Ranks]:
    made = Ranks(tmp_path, [f"model.base={tiny_base}", *SETTINGS])
    yield made
    made.end()


def lost(ranks: Ranks, rank: int, number: int, within: float) -> str:
    """Sends a signal to a process in the middle of its steps; returns the block that the others say within a bound."""
    for each in range(ranks.world):
        ranks.start(each, ENDLESS)
    ranks.until("step 7/")
    os.kill(ranks.processes[rank].pid, number)
    began = time.monotonic()
    gone = ranks.processes.pop(rank)
    try:
        statuses = ranks.wait(within + SLACK)
        print(f"{signal.Signals(number).name} of rank {rank}: {time.monotonic() - began:.1f} s")
    finally:
        gone.kill()
        gone.join()
    assert set(statuses.values()) == {1}
    return ranks.block()


@pytest.mark.parametrize("rank", [1, 0])
def test_a_killed_process_is_named_and_the_others_end(ranks, rank):
    """Rank 0 keeps the store here: its end is noticed by that."""
    block = lost(ranks, rank, signal.SIGKILL, SOON)
    assert block.startswith("llama-ft: stopped by the machine (1 problem)\n")
    assert f"rank {rank} on {os.uname().nodename}" in block
    steps = ranks.whole()
    assert len(steps) >= 2
    assert f"checkpoint step-{steps[-1]} is whole, go on with the same command and --resume" in block
    if rank:
        assert "no sign of life" in block
        status = json.loads((ranks.folder / "run" / "status.json").read_text())
        assert status["state"] == "failed" and "rank 1" in status["message"]


def test_of_three_the_two_that_are_left_agree(tiny_base, tmp_path):
    ranks = Ranks(tmp_path, [f"model.base={tiny_base}", *SETTINGS, "training.global_batch=6"], world=3)
    try:
        block = lost(ranks, 1, signal.SIGKILL, SOON)
    finally:
        ranks.end()
    assert "rank 1 on" in block and "rank 2" not in block
    ranks.whole()


def test_a_frozen_process_is_lost(ranks):
    """Its connections stay open, so nothing but its silence speaks."""
    block = lost(ranks, 1, signal.SIGSTOP, LOST)
    silent = re.search(r"rank 1 on .* was lost: no sign of life since .*, for (\d+) s", block)
    assert silent and LOST <= int(silent[1]) <= LOST + 3, block
    assert ranks.whole()


def test_a_process_that_stands_still_is_named_with_its_stack_and_its_documents(ranks):
    stall = 4
    for rank in (0, 1):
        hook = Hook("sleep", 9) if rank else Hook()  # two micro-batches a step, and one is read ahead
        ranks.start(rank, ENDLESS, f"training.stall_timeout={stall}", hook=hook)
    ranks.until("step 3/")
    began = time.monotonic()
    assert ranks.wait(stall + SLACK) == {0: 1, 1: 1}
    print(f"stood still for {stall} s: {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began >= stall
    block = ranks.block()
    assert re.search(r"rank 1 on .* stands still since .*, for \d s, between step 3 and the next \(at ", block), block
    assert "tests/train/ranks.py" in block and "collate" in block
    assert "rank 0 waits for it" in block
    folder = ranks.folder / "run" / "faults" / "hang-step-4"
    assert str(folder) in block
    stacks = {rank: (folder / f"rank-{rank}.txt").read_text() for rank in (0, 1)}
    assert "time.sleep(600)" in stacks[1] and "time.sleep" not in stacks[0]
    for rank, text in stacks.items():
        assert text.startswith(f"rank {rank} on ")
        assert re.search(r"micro-batch 0: .*, row \d+", text)
        assert "thread MainThread" in text
    assert ranks.whole() == [2]


def test_standing_still_may_be_allowed(ranks):
    """With the time-out off the same process is waited for."""
    for rank in (0, 1):
        ranks.start(rank, ENDLESS, "training.stall_timeout=0", hook=Hook("sleep", 9) if rank else Hook())
    ranks.until("step 3/")
    time.sleep(8)
    assert all(process.is_alive() for process in ranks.processes.values())
    listener = Board(Place(2, 2, 2, "none", "none", "127.0.0.1", ranks.port, False), 5)
    for beat in listener.get("beat/0", "beat/1"):  # nothing is written, for which there is no limit either
        assert (beat["doing"], beat["limit"]) == ("between step 3 and the next", 0)


def test_a_process_that_fails_is_named_by_the_others(ranks):
    for rank in (0, 1):
        ranks.start(rank, ENDLESS, hook=Hook("raise", 9) if rank else Hook())
    ranks.until("step 3/")
    assert ranks.wait(GRACE + SLACK) == {0: 1, 1: 1}
    assert ranks.said(1).count("Traceback") == 1  # a defect keeps its traceback, where it is
    block = block_of(ranks.said(0))
    assert "ended with exit status 1: KeyError: 'a field that only this machine lacks'" in block
    assert "Traceback" not in ranks.said(0)
    assert re.search(r"rank 1 on .* \(process \d+\) ended", block)


@pytest.mark.slow
def test_a_process_that_dies_between_meeting_and_connecting(ranks):
    for rank in (0, 1):
        ranks.start(rank, ENDLESS, hook=Hook("die") if rank else Hook())
    statuses = ranks.wait(LOST + SLACK + 10)
    assert statuses == {0: 1, 1: -signal.SIGKILL}
    block = ranks.block()
    assert "rank 1 on" in block and "while starting" in block
    assert "nothing is lost, start again" in block


def test_after_a_loss_the_run_goes_on_as_if_it_had_not_been(ranks, tmp_path, tiny_base):
    lost(ranks, 1, signal.SIGKILL, SOON)
    last = ranks.whole()[-1]
    until = f"training.max_steps={last + 4}"
    for rank in (0, 1):
        ranks.start(rank, until, "--resume")
    assert ranks.wait(90) == {0: 0, 1: 0}, ranks.said(0)
    whole = Ranks(tmp_path / "whole", ranks.settings)
    whole.folder.mkdir()
    for rank in (0, 1):
        whole.start(rank, until)
    assert whole.wait(90) == {0: 0, 1: 0}
    assert metric(ranks.folder / "run") == metric(whole.folder / "run")
    assert len(metric(whole.folder / "run")) == last + 4


def descendant(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The trainer of a rank below a launcher."""
    for one in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "llama_ft.train" in one.cmdline() and one.environ().get("RANK") == str(rank):
                return one
    raise AssertionError(f"no rank {rank}")


@pytest.mark.parametrize("door", ["llama-ft train", "accelerate launch"])
def test_through_the_launcher_the_block_comes_last(tiny_base, tmp_path, door):
    """The launcher ends what is left when one is killed; that must not come first."""
    config = str(ROOT / "accelerate_configs" / "cpu_ddp_2.yaml")
    recipe = ["quickstart", f"model.base={tiny_base}", *SETTINGS, ENDLESS, f"output_dir={tmp_path / 'run'}"]
    doors = {
        "llama-ft train": [sys.executable, "-m", "llama_ft.cli", "train", *recipe, f"launch={config}"],
        "accelerate launch": [*ACCELERATE, "--config_file", config, "-m", "llama_ft.train", *recipe],
    }
    with (tmp_path / "said").open("w") as file:
        process = subprocess.Popen(doors[door], stdout=file, stderr=file, text=True, env=ENVIRONMENT, cwd=ROOT)
    try:
        end = time.monotonic() + 150
        while "step 7/" not in (tmp_path / "said").read_text() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        descendant(process, 1).kill()
        began = time.monotonic()
        assert process.wait(SOON + SLACK) == 1
        print(f"{door}: {time.monotonic() - began:.1f} s")
    finally:
        for one in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            one.kill()
        process.kill()
    said = (tmp_path / "said").read_text()
    assert said.count("llama-ft: stopped by the machine (1 problem)") == 1, said
    assert re.search(r"rank 1 on .* was lost: no sign of life since", block_of(said))
    if door == "llama-ft train":
        assert said.endswith(block_of(said)) and "Traceback" not in said
    run = Run(tmp_path / "run")
    assert run.steps() and all(verify(run.checkpoint(step)) == [] for step in run.steps())


def test_one_process_meets_nobody_and_starts_no_thread(tiny_base, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Place.here() is None
    seen: set[str] = set()
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (seen.add(self.name), start(self))[1])
    run = train_here([f"model.base={tiny_base}", *SETTINGS, "training.max_steps=2", f"output_dir={tmp_path / 'run'}"])
    assert run.steps() == [2]
    assert not [name for name in seen if "llama_ft" in name]


class Everyone:
    """Three processes as rank 0 hears them, on a clock that is turned by hand."""

    def __init__(self, tmp_path: Path):
        place = Place(0, 3, 0, "a", "a", "127.0.0.1", 1, False)
        self.company = Company(place, None, ["a", "a", "b"], [10, 11, 12], ["a", "a", "b"])  # type: ignore[arg-type]
        self.run, self.now = Run(tmp_path), 1000.0
        self.seen = {rank: Seen(self.beat(0, 0), self.now, self.now) for rank in range(3)}

    def beat(self, number: int, count: int, place: tuple[int, ...] = (4, 1, 1, 9), **more: object) -> dict[str, object]:
        said = {"number": number, "count": count, "limit": 60.0, "doing": "beginning step 4", "step": 4}
        return {**said, "place": list(place), **more}

    def after(self, seconds: float, *beats: dict[str, object] | None, evidence: bool = False) -> Verdict | None:
        self.now += seconds
        for rank, beat in enumerate(beats):
            if beat is not None:
                self.seen[rank].hear(beat, self.now)
        return judge(self.seen, self.now, evidence=evidence, company=self.company, run=self.run)


def test_silence_is_judged_sooner_where_something_else_speaks_for_it(tmp_path):
    everyone = Everyone(tmp_path)
    for second in range(1, int(LOST) + 3):
        verdict = everyone.after(1, everyone.beat(second, second), everyone.beat(second, second))
        assert (verdict is not None) == (second > LOST), second
    assert verdict is not None and verdict.lost == [2] and "rank 2 on b (process 12) was lost" in verdict.block()
    everyone = Everyone(tmp_path)
    for second in range(1, int(SOON) + 3):
        verdict = everyone.after(1, everyone.beat(second, second), everyone.beat(second, second), evidence=True)
        assert (verdict is not None) == (second > SOON), second


def test_processes_of_one_machine_are_told_together(tmp_path):
    everyone = Everyone(tmp_path)
    verdict = everyone.after(LOST + 1, None, None, everyone.beat(1, 1))
    assert verdict is not None and verdict.lost == [0, 1]
    assert "ranks 0-1 on a were lost" in verdict.block() and "(1 problem)" in verdict.block()


def test_who_left_in_order_is_not_lost(tmp_path):
    everyone = Everyone(tmp_path)
    everyone.after(1, *(everyone.beat(1, 1, left=0) for _ in range(2)), everyone.beat(1, 1))
    assert everyone.after(2 * LOST, None, None, everyone.beat(2, 1, limit=0)) is None


@pytest.mark.parametrize(
    ("places", "blamed", "waiting"),
    [
        ([(5, 1, 1, 9), (4, 2, 4, 8), (5, 1, 1, 9)], "rank 1 on a", "ranks 0, 2 wait for it"),
        ([(5, 1, 1, 9), (5, 1, 1, 9), (5, 1, 1, 8)], "rank 2 on b", "ranks 0-1 wait for it"),
    ],
    ids=["by its step", "by its exchanges"],
)
def test_who_is_behind_is_to_blame(tmp_path, places, blamed, waiting):
    everyone = Everyone(tmp_path)
    for second in range(0, 90, 10):
        beats = [everyone.beat(second + 1, 1, place, at="at x.py:1") for place in places]
        verdict = everyone.after(10, *beats)
        assert (verdict is not None) == (second > 60), second
    assert verdict is not None and verdict.standstill == 5
    assert f"{blamed} (process" in verdict.block() and "(at x.py:1)" in verdict.block() and waiting in verdict.block()


def test_a_backward_pass_is_behind_the_next_forward_pass(tmp_path):
    """Of a step in two micro-batches: who waits in the second for the first is not to blame."""
    notes = []
    for passes in ((BACKWARD,), (BACKWARD, FORWARD), (BACKWARD, FORWARD)):
        headway = Headway()
        headway.move("beginning step 5", step=5)
        for phase in passes:
            if phase == FORWARD or not headway.pass_:
                headway.pass_ += 1
            headway.move("in a pass", phase=phase)
        notes.append(headway.note() | {"limit": 60.0})
    everyone = Everyone(tmp_path)
    for second in range(0, 90, 10):
        verdict = everyone.after(10, *({"number": second + 1, **note} for note in notes))
    assert verdict is not None and "rank 0 on a (process 10) stands still" in verdict.block()
    assert "ranks 1-2 wait for it" in verdict.block() and verdict.standstill == 5


def test_nobody_is_blamed_where_none_is_behind_and_nobody_while_one_writes(tmp_path):
    everyone = Everyone(tmp_path)
    for limit in (0, 60.0):
        for second in range(7):
            beats = [everyone.beat(int(100 * limit) + second + 1, 1) for _ in range(2)]
            verdict = everyone.after(10, *beats, everyone.beat(int(100 * limit) + second + 1, 1, limit=limit))
    assert verdict is not None and "and none is behind" in verdict.block()
    everyone = Everyone(tmp_path)
    for second in range(20):
        beats = [everyone.beat(second + 1, 1) for _ in range(2)]
        assert everyone.after(10, *beats, everyone.beat(second + 1, 1, limit=0)) is None
