"""500 spoilt recipes: no traceback, exit 2, and every problem names a file and a line."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.paths import shipped_root
from llama_ft.recipe import load_recipe
from tests.recipe.mutate import MUTATORS

INVALID = 500
SEED = 20240718
ROOT = Path(__file__).resolve().parents[2]
SPOILT = ("quickstart.yaml", "alpaca/smollm2-135m-lora.yaml", "alpaca/llama-7b-full.yaml", "_base/lora.yaml")
"""What is mutated; a mutant of the parent is read through the quickstart."""


@dataclass
class Tree:
    """A copy of the shipped recipes whose files can be spoilt one at a time."""

    folder: Path

    def spoil(self, name: str, raw: bytes) -> tuple[Path, list[str] | None]:
        """The recipe that was read, and its problems; None when it is still valid."""
        target = self.folder / name
        kept = target.read_bytes()
        target.write_bytes(raw)
        recipe = target if not name.startswith("_base") else self.folder / "quickstart.yaml"
        try:
            load_recipe(recipe)
        except UserError as error:
            assert error.exit_code == 2
            assert error.problems
            for problem in error.problems:
                assert problem.where is not None
                assert re.fullmatch(r"recipes/[\w./-]+\.yaml:[1-9]\d*:[1-9]\d*", problem.where), problem
                assert problem.what
                assert str(problem).isprintable(), problem
            return target, [str(problem) for problem in error.problems]
        finally:
            target.write_bytes(kept)
        return target, None


@pytest.fixture
def tree(here: Path) -> Tree:
    """In the working directory, so that problems name `recipes/…`."""
    shutil.copytree(shipped_root() / "recipes", here / "recipes")
    return Tree(here / "recipes")


def test_500_mutants_are_refused_in_plain_words(tree: Tree) -> None:
    rng = random.Random(SEED)
    invalid: Counter[str] = Counter()
    valid: Counter[str] = Counter()
    while invalid.total() < INVALID:
        mutate, name = rng.choice(MUTATORS), rng.choice(SPOILT)
        text = (tree.folder / name).read_text(encoding="utf-8")
        _, problems = tree.spoil(name, mutate(rng, text))
        (valid if problems is None else invalid)[mutate.__name__] += 1
    assert invalid.total() == INVALID
    assert set(invalid) == {mutate.__name__ for mutate in MUTATORS}
    assert min(invalid.values()) >= 20
    # Mutants that are still recipes (a comment cut off) are not among the 500; nine of ten must be truly spoilt.
    assert valid.total() <= INVALID / 9, valid


CALLS = """
import contextlib, io, json, sys
from llama_ft.cli import main
for path in sys.argv[1:]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = ["llama-ft", "validate", path]
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([path, code, out.getvalue(), err.getvalue()]))
"""


def test_the_command_line_refuses_mutants_without_a_traceback(tree: Tree) -> None:
    rng = random.Random(SEED + 1)
    paths = []
    while len(paths) < 90:
        mutate, name = MUTATORS[len(paths) % len(MUTATORS)], rng.choice(SPOILT[:3])
        raw = mutate(rng, (tree.folder / name).read_text(encoding="utf-8"))
        if tree.spoil(name, raw)[1] is not None:
            path = (tree.folder / name).with_name(f"mutant-{len(paths)}.yaml")
            path.write_bytes(raw)
            paths.append(str(path.relative_to(Path.cwd())))
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CALLS, *paths], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer[0] for answer in answers] == paths
    for path, code, out, err in answers:
        assert (code, out) == (2, ""), path
        assert "Traceback" not in err
        head, *lines = err.splitlines()
        assert head == f"llama-ft: cannot go on ({len(lines)} problem{'s' * (len(lines) > 1)})"
        assert all(re.match(rf"  {re.escape(path)}:[1-9]\d*:[1-9]\d*: ", line) for line in lines), err
    whole = subprocess.run(
        [sys.executable, "-m", "llama_ft.cli", "validate", *paths], env=env, capture_output=True, text=True
    )
    assert whole.returncode == 2
    assert "Traceback" not in whole.stderr
    assert all(f"  {path}:" in whole.stderr for path in paths)
