"""What a trainer imports before it trains: nothing heavy that only other runs need, and nothing twice looked after."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.train.conftest import ENVIRONMENT

HEAVY = ("bitsandbytes", "torch._inductor.lowering", "deepspeed", "matplotlib", "torch.utils.tensorboard")
CODE = f"""
import gc, sys
from llama_ft.train.__main__ import main
try: main()
except SystemExit: pass
assert sys.modules["trl"] and gc.isenabled() and gc.get_freeze_count() > 100_000
print(*[name for name in {HEAVY} if sys.modules.get(name)], file=sys.stderr)
"""


def imported(base, folder, *overrides: str) -> list[str]:
    """What of HEAVY is in a trainer that has imported all it trains with, and then finds a run in its folder."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text("name: another\n")
    line = [f"model.base={base}", *overrides, f"output_dir={folder}"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, "quickstart", *line], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert "already holds a run" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split()


@pytest.mark.parametrize(
    ("overrides", "needed"),
    [([], False), (["adapter.method=qlora"], True)],
    ids=["lora", "qlora"],
)
def test_a_trainer_imports_what_its_recipe_needs(tiny_base, tmp_path, overrides, needed):
    pytest.importorskip("bitsandbytes")
    found = imported(tiny_base, tmp_path / "run", *overrides)
    assert ("bitsandbytes" in found) == needed
    assert set(found) <= ({"bitsandbytes", "torch._inductor.lowering"} if needed else set())
