"""SkyPilot's own reader and schemas; in an environment that has it (pip install skypilot, 98 packages)."""

from __future__ import annotations

import pytest

from llama_ft.launch.commands import launch_recipe

pytestmark = pytest.mark.peers


@pytest.mark.parametrize(
    ("recipe", "keys"),
    [
        ("alpaca/llama-7b-full", {"nodes": 2, "hardware": "8xH100-80GB"}),
        ("alpaca/llama-7b-full", {"nodes": 1, "hardware": "8xH100-80GB", "storage": "s3://mine/runs"}),
        ("quickstart", {"nodes": 1}),
    ],
    ids=["volume", "bucket", "cpu"],
)
def test_sky_reads_the_task(recipe, keys, tmp_path):
    sky = pytest.importorskip("sky", reason="SkyPilot is not installed beside llama_ft here")
    launch_recipe(recipe, [], on="skypilot", out=tmp_path / "task.yaml", dry_run=True, **keys)
    task = sky.Task.from_yaml(str(tmp_path / "task.yaml"))
    assert task.num_nodes == keys["nodes"]
    (resources,) = task.resources
    assert resources.accelerators == ({"H100": 8} if "hardware" in keys else None)
    assert resources.job_recovery["recover_on_exit_codes"] == [130]
