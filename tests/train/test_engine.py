"""The engine in force is the one that was asked for, or the run does not start; accelerate's own silence is broken."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from llama_ft import load_recipe
from llama_ft.errors import UserError
from llama_ft.recipe.launchers import read_launcher
from llama_ft.recipe.run import Run
from llama_ft.train.engine import Engine, asked_engine, check_engine, check_recipe_fits, contradictions
from llama_ft.train.launch import ASKED, STATUS_FILE, report_status, what_is_asked
from tests.conftest import ROOT
from tests.train.conftest import ACCELERATE, ENVIRONMENT, metric

SAYS = (ASKED, "WORLD_SIZE", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "FSDP_VERSION", "ACCELERATE_USE_CPU")
CONFIGS = {
    "multi-cpu": {"distributed_type": "MULTI_CPU", "use_cpu": True},
    "ddp": {"distributed_type": "MULTI_GPU", "use_cpu": False},
    "fsdp": {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": {"fsdp_version": 2}},
    "fsdp, version 1": {"distributed_type": "FSDP", "use_cpu": True, "fsdp_config": {"fsdp_version": 1}},
    "zero2": {
        "distributed_type": "DEEPSPEED",
        "use_cpu": True,
        "deepspeed_config": {"zero_stage": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0},
    },
}
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate does what it says where there is a GPU")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no launcher said anything."""
    for name in (*SAYS, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DEEPSPEED_ZERO_STAGE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def write_config(folder: Path, name: str) -> Path:
    whole = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "machine_rank": 0, "num_processes": 2}
    whole["main_process_port"] = 0  # a free one: another test may be on accelerate's own
    path = folder / "launch.yaml"
    path.write_text(json.dumps({**whole, "mixed_precision": "no", **CONFIGS[name]}))
    return path


def settings(base: Path, folder: Path) -> list[str]:
    return [
        f"model.base={base}",
        "model.dtype=float32",
        "data.0.limit=24",
        "eval_data=null",
        "training.global_batch=4",
        "training.max_steps=3",
        "export.merged=false",
        "tracking=[]",
        f"output_dir={folder / 'run'}",
    ]


def start(flags: list[str], overrides: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    line = [*ACCELERATE, *flags, "-m", "llama_ft.train", "quickstart", *overrides]
    where = os.environ | ENVIRONMENT | environment
    return subprocess.run(line, capture_output=True, text=True, env=where, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "2"}, Engine("DDP", 2)),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, Engine("FSDP2", 4)),
        ({"WORLD_SIZE": "4", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, Engine("FSDP", 4)),
        (
            {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
            Engine("ZeRO-3", 2),
        ),
        ({ASKED: '{"engine": "", "processes": 1, "use_cpu": true}'}, Engine("", 1)),
        ({ASKED: '{"engine": "FSDP2", "processes": 4, "use_cpu": false}', "WORLD_SIZE": "4"}, Engine("FSDP2", 4)),
    ],
)
def test_what_was_asked(silent, environment, expected):
    for name, value in environment.items():
        silent.setenv(name, value)
    assert asked_engine() == expected


@pytest.mark.parametrize(
    ("config", "found", "said"),
    [
        ("ddp", Engine("DDP", 2, "nccl"), None),
        ("ddp", Engine("", 1), "asked for 2 processes and 1 are in force"),
        ("fsdp", Engine("FSDP2", 2, "nccl"), None),
        ("fsdp", Engine("DDP", 2, "gloo"), "asked for FSDP2"),
        ("zero2", Engine("ZeRO-2", 2, "nccl"), None),
        ("zero2", Engine("ZeRO-3", 2, "nccl"), "asked for ZeRO-2"),
    ],
)
def test_a_launch_config_is_held_against_what_it_became(silent, tmp_path, config, found, said):
    """As `llama-ft train` passes it on."""
    launcher = read_launcher(write_config(tmp_path, config))
    assert not isinstance(launcher, list)
    silent.setenv(ASKED, what_is_asked(launcher))
    if said is None:
        check_engine(found)
        return
    with pytest.raises(UserError, match=said):
        check_engine(found)


@pytest.mark.parametrize(
    ("dtype", "precision", "said"),
    [
        ("bfloat16", "no", []),
        ("bfloat16", "bf16", []),
        ("float32", "bf16", ["precision"]),
        ("bfloat16", "fp16", ["precision"]),
        ("float16", "fp16", []),
    ],
)
def test_a_precision_that_contradicts_the_recipe_is_said(silent, dtype, precision, said):
    silent.setenv("ACCELERATE_MIXED_PRECISION", precision)
    recipe = load_recipe("quickstart", [f"model.dtype={dtype}", "launch=accelerate_configs/ddp.yaml"])
    assert [name for name, _ in contradictions(recipe, torch.device("cuda"))] == said


def test_a_gpu_that_is_asked_for_and_not_there_is_said(silent):
    recipe = load_recipe("quickstart")
    for use_cpu, said in (("true", []), ("false", ["no-gpu"])):
        silent.setenv(ASKED, f'{{"engine": "", "processes": 1, "use_cpu": {use_cpu}}}')
        assert [name for name, _ in contradictions(recipe, torch.device("cpu"))] == said
        assert contradictions(recipe, torch.device("cuda")) == []


@without_gpu
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("multi-cpu", "asked for several processes and started one"),
        (
            "fsdp, version 1",
            "asked for FSDP, which accelerate has on GPUs alone; torch sees none here: DDP on 2 processes (gloo)",
        ),
    ],
)
def test_accelerates_fallbacks_are_refused(tiny_base, tmp_path, config, said):
    done = start(["--config_file", str(write_config(tmp_path, config))], settings(tiny_base, tmp_path))
    assert done.returncode != 0
    assert said in done.stderr
    assert not (tmp_path / "run").exists()


@without_gpu
def test_two_processes_without_their_gpus_train_and_say_so(tiny_base, tmp_path):
    done = start(["--config_file", str(write_config(tmp_path, "ddp"))], settings(tiny_base, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("engine: DDP on 2 processes (gloo), float32 on cpu\n") == 1
    assert done.stdout.count("warning: the launch config asks for a GPU and torch sees none here") == 1
    run = Run(tmp_path / "run")
    assert (run.lock["engine"], run.lock["world_size"]) == ("DDP", 2)
    warnings = json.loads((run.path / "warnings.json").read_text())
    assert [(one["step"], one["name"]) for one in warnings] == [(0, "no-gpu")]
    assert len(metric(run.path)) == 3


def test_autocast_that_the_recipe_did_not_ask_for_is_said(tiny_base, tmp_path):
    done = start(["--mixed_precision", "bf16"], settings(tiny_base, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "engine: one process, float32 on cpu, products in bfloat16" in done.stdout
    assert "mixed_precision: bf16, the recipe model.dtype: float32" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "engine", "new_tokens", "key"),
    [
        (["adapter.method=qlora"], "FSDP2", False, "adapter.method"),
        (["adapter.method=qlora"], "ZeRO-2", False, None),
        (["training.optimizer=adamw_8bit"], "ZeRO-1", False, "training.optimizer"),
        ([], "ZeRO-3", False, None),
        ([], "ZeRO-3", True, "adapter.modules_to_save"),
        (["adapter.method=full"], "ZeRO-3", True, None),
    ],
)
def test_the_engine_in_force_is_held_against_the_recipe(overrides, engine, new_tokens, key):
    """`accelerate launch` may be given another config than the recipe names."""
    recipe = load_recipe("quickstart", overrides)
    if key is None:
        check_recipe_fits(recipe, Engine(engine, 2), new_tokens=new_tokens)
        return
    with pytest.raises(UserError) as error:
        check_recipe_fits(recipe, Engine(engine, 2), new_tokens=new_tokens)
    assert [one.key for one in error.value.problems] == [key]


def test_the_exit_status_is_that_of_the_first_process_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv(STATUS_FILE, str(tmp_path / "status"))
    report_status(2)
    report_status(130)
    assert (tmp_path / "status").read_text() == "2"
