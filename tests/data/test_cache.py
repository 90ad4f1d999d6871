"""The cache of prepared data: what its key holds, many processes at once, a kill in the middle, damage, a full disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llama_ft.data import cache_key, prepare
from llama_ft.data.prepare import prepare_data
from llama_ft.data.store import MANIFEST, open_folder
from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe.schema import Recipe
from tests.conftest import ROOT
from tests.data.conftest import chats, write_jsonl

Make = Callable[..., Recipe]

WORKER = """
import json, os, signal, sys
from llama_ft.data.prepare import prepare_data
from llama_ft.recipe.schema import Recipe
recipe = Recipe.model_validate_json(sys.argv[1])
kill_at = int(sys.argv[2])
built = []
def progress(label, rows):
    built.append(rows)
    if kill_at and rows >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
prepared = prepare_data(recipe, progress=progress)
ids = [token for row in prepared.train["input_ids"] for token in row]
print(json.dumps([bool(built), str(prepared.folder), len(prepared.train), len(prepared.eval), sum(ids)]))
"""


def start(recipe: Recipe, kill_at: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, recipe.model_dump_json(), str(kill_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_eight_processes_prepare_once(tmp_path: Path, make_recipe: Make, cache: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3000))
    recipe = make_recipe(path, eval_data={"holdout": 0.01})
    workers = [start(recipe) for _ in range(8)]
    outputs = [worker.communicate(timeout=180) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 8, outputs
    results = [json.loads(out) for out, _ in outputs]
    assert sorted(built for built, *_ in results) == [False] * 7 + [True]
    assert len({json.dumps(rest) for _, *rest in results}) == 1
    assert results[0][2:4] == [2970, 30]
    assert folders(cache) == [Path(results[0][1]).name]


def test_killed_in_the_middle(tmp_path: Path, make_recipe: Make, cache: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3000))
    recipe = make_recipe(path, eval_data={"holdout": 0.01})
    victim = start(recipe, kill_at=1500)
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    (left,) = folders(cache)
    assert left.startswith(".") and (cache / left / "made" / "candidates.arrow").exists()  # it died while writing
    prepared = prepare_data(recipe)
    assert len(prepared.train) == 2970
    assert folders(cache) == [prepared.folder.name]  # what the killed process left is gone


@pytest.mark.alone
def test_second_time_is_fast_and_builds_nothing(tmp_path: Path, make_recipe: Make) -> None:
    recipe = make_recipe(write_jsonl(tmp_path / "rows.jsonl", chats(3000)))
    first = prepare_data(recipe)
    begin = time.perf_counter()
    second = prepare_data(recipe, progress=lambda *_: pytest.fail("rows were read again"))
    assert time.perf_counter() - begin < 1.0
    assert second.folder == first.folder and second.report == first.report
    assert second.train[:] == first.train[:]


def key(recipe: Recipe) -> str:
    return prepare_data(recipe).folder.name


def test_everything_that_matters_is_in_the_key(tmp_path: Path, make_recipe: Make, llama2: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(30))
    template = tmp_path / "mine.jinja"
    chatml = (Path(prepare.__file__).parent / "templates" / "chatml.jinja").read_text()
    template.write_text(chatml)
    base: dict[str, Any] = {"template": str(template), "eval_data": {"holdout": 0.1}}
    first = key(make_recipe(path, **base))
    assert key(make_recipe(path, **base)) == first
    other = {
        "max_length": {"sequence": {"max_length": 512}},
        "train_on": {"sequence": {"train_on": "all"}},
        "overlong": {"sequence": {"overlong": "truncate"}},
        "holdout": {"eval_data": {"holdout": 0.2}},
        "no evaluation": {"eval_data": None},
        "seed": {"training": {"seed": 1}},
        "limit": {"data": [{"path": str(path), "layout": "messages", "limit": 20}]},
        "system": {"data": [{"path": str(path), "layout": "messages", "system": "S"}]},
        "twice": {"data": [{"path": str(path), "layout": "messages"}] * 2},
        "dedupe": {"mixture": {"dedupe": "exact"}},
        "max_truncated": {"sequence": {"max_truncated": 0.5}},
    }
    keys = {name: key(make_recipe(path, **{**base, **changes})) for name, changes in other.items()}
    # Packing, batch sizes and shares come later: they share what was prepared.
    assert key(make_recipe(path, **base, training={"global_batch": 4, "learning_rate": 1})) == first
    twice = [{"path": str(path), "layout": "messages", "weight": 2, "epochs": 3}]
    assert key(make_recipe(**{**base, "data": twice})) == first
    template.write_text(chatml + "{# edited #}")
    keys["template edit"] = key(make_recipe(path, **base))
    template.write_text(chatml)
    write_jsonl(path, chats(31))
    keys["a row more"] = key(make_recipe(path, **base))
    assert len({first, *keys.values()}) == 1 + len(keys), keys


def test_the_tokenizer_and_the_code_are_in_the_key(
    tmp_path: Path, make_recipe: Make, smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    first = key(make_recipe(path))
    assert key(make_recipe(path, model={"base": str(smollm2)})) != first
    monkeypatch.setattr(cache_key, "_code_hash", lambda: "edited")
    assert key(make_recipe(path)) != first


def test_moved_rows_are_prepared_under_their_new_name(tmp_path: Path, make_recipe: Make) -> None:
    first = prepare_data(make_recipe(write_jsonl(tmp_path / "a.jsonl", chats(3))))
    second = prepare_data(make_recipe(write_jsonl(tmp_path / "b.jsonl", chats(3))))
    assert second.folder == first.folder
    assert second.report.sources[0].label == str(tmp_path / "b.jsonl")


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest", "no manifest"])
def test_damaged_cache_is_made_again(tmp_path: Path, make_recipe: Make, damage: str) -> None:
    recipe = make_recipe(write_jsonl(tmp_path / "rows.jsonl", chats(50)))
    prepared = prepare_data(recipe)
    wanted, folder = prepared.train[:], prepared.folder
    arrow, manifest = folder / "train.arrow", folder / MANIFEST
    raw = bytearray(arrow.read_bytes())
    if damage == "cut":
        arrow.write_bytes(raw[:-100])
    elif damage == "flip":
        raw[len(raw) // 2] ^= 1
        arrow.write_bytes(raw)
    elif damage == "gone":
        arrow.unlink()
    elif damage == "manifest":
        manifest.write_text('{"files": 3}')
    else:
        manifest.unlink()
    assert open_folder(folder) is None
    assert prepare_data(recipe).train[:] == wanted
    assert open_folder(folder) is not None


def test_a_file_that_changes_while_it_is_read(tmp_path: Path, make_recipe: Make, cache: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(600))

    def progress(label: str, rows: int) -> None:
        with path.open("a") as file:
            file.write(json.dumps(chats(1)[0]) + "\n")

    with pytest.raises(UserError, match="the file changed while it was read"):
        prepare_data(make_recipe(path), progress=progress)
    assert folders(cache) == []


def test_no_room_for_the_cache(tmp_path: Path, make_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers every write as a full disk does."""
    if not os.path.exists("/dev/full"):  # noqa: PTH110
        pytest.skip("no /dev/full on this system")
    path = write_jsonl(tmp_path / "rows.jsonl", chats(2000))

    def to_full_disk(folder: Path) -> dict[str, Any]:
        with Path("/dev/full").open("w") as file:
            file.write("x" * 100_000)
        return {}

    monkeypatch.setattr(prepare, "build", lambda job, aside, progress: to_full_disk(aside))
    with pytest.raises(MachineFault, match="No space left on device") as caught:
        prepare_data(make_recipe(path))
    assert "LLAMA_FT_CACHE" in str(caught.value)
