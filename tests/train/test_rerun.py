"""`llama-ft rerun`: the same run again, bit for bit on the same machine; what changed is refused or said."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe.diff import differences, open_side, values
from llama_ft.recipe.run import Run
from llama_ft.train.lock import folder_fingerprint, recipe_hash
from llama_ft.train.rerun import compare, rerun
from tests.conftest import ROOT
from tests.tiny_run import make_base
from tests.train.conftest import ENVIRONMENT, metric, train_here


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 8 steps with two evaluations, whose micro-batch was `auto`."""
    folder = tmp_path_factory.mktemp("rerun")
    make_base(folder / "base")
    rows = [
        {"messages": [{"role": "user", "content": f"And {i}?"}, {"role": "assistant", "content": f"Llama {i} eats."}]}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train_here(
        [
            f"model.base={folder / 'base'}",
            f"data={json.dumps([{'path': str(folder / 'rows.jsonl'), 'layout': 'messages'}])}",
            "eval_data={holdout: 0.1}",
            "training.global_batch=4",
            "training.max_steps=8",
            "training.eval_every=4",
            "adapter.dropout=0.1",
            "export.merged=false",
            "tracking=[]",
            f"output_dir={folder / 'run'}",
        ]
    )


@pytest.fixture
def copied(first: Run, tmp_path: Path) -> Run:
    """A copy of the run that a test may change; base and rows stay where they are."""
    shutil.copytree(first.path, tmp_path / "run")
    return Run(tmp_path / "run")


def change_lock(run: Run, **changes: Any) -> None:
    run.lock_file.write_text(json.dumps({**json.loads(run.lock_file.read_text()), **changes}))


def again(run: Run, *overrides: str, allow: tuple[str, ...] = ()) -> int:
    return rerun(run.lock_file, overrides, output_dir=None, allow=allow, flags=[])


def test_the_lock_holds_what_decides_a_run(first):
    lock = first.lock
    assert lock["recipe"] == recipe_hash(first.recipe)
    assert lock["base_hash"] == folder_fingerprint(Path(lock["base_folder"]))
    assert set(lock["hashes"]) == {"data", "template", "tokenizer"}
    assert {"torch", "transformers", "peft", "trl", "accelerate"} <= set(lock["versions"])
    assert "deepspeed" not in lock["versions"] and "bitsandbytes" not in lock["versions"], "not computed with"
    assert (lock["engine"], lock["world_size"], lock["compute_dtype"]) == ("one process", 1, "float32")
    assert lock["threads"] >= 1 and lock["device"] and lock["seed"] == 42


def test_a_rerun_is_equal_to_the_last_bit_and_says_what_changed(copied, tmp_path):
    change_lock(copied, versions={**copied.lock["versions"], "torch": "2.0.0"}, commit="0" * 40, device="a loom")
    line = [sys.executable, "-m", "llama_ft.cli", "rerun", str(copied.lock_file), "training.eval_every=8"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "run against run-rerun: steps of 8: equal to the last bit; evaluations of 2: equal" in done.stdout
    for said in ("changed: torch 2.0.0 → ", f"changed: commit {'0' * 40} → ", "changed: device a loom → "):
        assert said in done.stderr
    second = Run(tmp_path / "run-rerun")
    assert metric(second.path) == metric(copied.path)
    assert second.lock["hashes"] == copied.lock["hashes"]
    changed = differences(values(open_side(str(copied.path))), values(open_side(str(second.path))))
    assert [line.key for line in changed] == ["training.micro_batch", "training.eval_every", "output_dir"]
    assert second.recipe.training.micro_batch == copied.lock["micro_batch"], "`auto` is not resolved anew"


def test_the_distance_of_two_curves_is_told(copied, first):
    lines = [json.loads(line) for line in copied.metrics_file.read_text().splitlines()]
    for line in lines:
        if line["step"] == 5 and "loss" in line:
            line["loss"] += 0.25
    copied.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = compare(first, copied)
    assert (found.steps, found.held_out, found.held_out_apart) == (8, 3, 0.0)
    assert str(found) == "steps of 8: max |Δ loss| 0.25; evaluations of 3: equal to the last bit"


def test_other_rows_are_refused_by_name(copied, tmp_path, monkeypatch):
    rows = Path(next(iter(copied.lock["hashes"]["data"])))
    other = tmp_path / "rows.jsonl"
    other.write_text("\n".join(reversed(rows.read_text().splitlines())) + "\n")
    text = copied.recipe_file.read_text().replace(str(rows), str(other))
    copied.recipe_file.write_text(text)
    change_lock(copied, recipe=recipe_hash(Run(copied.path).recipe))
    with pytest.raises(UserError, match="the rows are not those of the run") as caught:
        again(copied)
    assert str(other) in str(caught.value) and "--allow changed-data" in str(caught.value)
    started = []
    monkeypatch.setattr("llama_ft.train.rerun.launch", lambda *line: started.append(line) or 1)
    assert again(copied, allow=("changed-data",)) == 1
    assert len(started) == 1


@pytest.mark.parametrize("part", ["template", "tokenizer"])
def test_another_template_or_tokenizer_is_refused(copied, part):
    change_lock(copied, hashes={**copied.lock["hashes"], part: "0" * 64})
    with pytest.raises(UserError, match=f"the {part} is not the run's"):
        again(copied)


def test_another_base_is_refused(copied):
    change_lock(copied, base_hash="0" * 64)
    with pytest.raises(UserError, match="the base model is not the run's"):
        again(copied)


def test_a_recipe_that_was_edited_is_refused(copied):
    copied.recipe_file.write_text(copied.recipe_file.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(UserError, match="the recipe is not the one that was trained"):
        again(copied)


def test_a_folder_without_a_lock(tmp_path):
    with pytest.raises(UserError, match=r"there is no run\.lock\.json"):
        rerun(tmp_path, [], output_dir=None, allow=[], flags=[])


def test_the_fingerprint_of_a_base_sees_a_change_of_one_weight(tmp_path):
    folder = make_base(tmp_path / "base")
    before = folder_fingerprint(folder)
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert folder_fingerprint(folder) != before
