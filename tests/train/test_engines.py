"""One recipe on every engine: two real processes train the curve of one, save what it saves, and go on from each other.

The first four layers of SmolLM2-135M, real rows, float32, over gloo. `cpu_ddp_2.yaml` and its kin are the launch
configs that users have; DeepSpeed and FSDP2 really cut weights and states in two.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llama_ft.recipe.run import Run
from llama_ft.train.checkpoints import verify
from tests.train.conftest import ACCELERATE, ENVIRONMENT, cut_short, metric

ENGINES = {
    "cpu_ddp_2": "DDP",
    "cpu_fsdp2_2": "FSDP2",
    "cpu_zero1_2": "ZeRO-1",
    "cpu_zero2_2": "ZeRO-2",
    "cpu_zero3_2": "ZeRO-3",
}
METHODS = ["lora", "full"]
LONGER = {("cpu_ddp_2", "full"), ("cpu_zero1_2", "full"), ("cpu_fsdp2_2", "full"), ("cpu_zero2_2", "lora")}
LONGER |= {("cpu_zero3_2", "lora")}
"""A minute each; in CI every engine has its other half, and FSDP2 goes on with a full run of ZeRO-3."""
EVERY = [
    pytest.param(config, method, marks=pytest.mark.slow if (config, method) in LONGER else ())
    for config in ENGINES
    for method in METHODS
]
SAME = 1e-5
"""Nats: how far losses of the same step may lie apart in float32."""
CLOSE = 2e-3
"""Of what was learnt: AdamW turns a gradient near zero into a step of full size, and rounding decides its sign."""
STEPS = 4


@pytest.fixture(scope="module")
def base(smollm2, tmp_path_factory) -> Path:
    """SmolLM2-135M cut to four layers."""
    return cut_short(smollm2, tmp_path_factory.mktemp("four"), layers=4)


def train(base: Path, folder: Path, method: str, config: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The real command on the quickstart's rows; `folder` is the run's, `config` may say `NAME × processes`."""
    overrides = [
        f"model.base={base}",
        "model.dtype=float32",
        f"adapter.method={method}",
        f"training.learning_rate={'1e-4' if method == 'full' else '2e-3'}",
        "data.0.limit=48",
        "eval_data.holdout=0.125",
        "training.global_batch=8",
        "training.micro_batch=2",
        f"training.max_steps={STEPS}",
        "training.save_every=2",
        "tracking=[]",
        f"output_dir={folder}",
    ]
    config, _, processes = config.partition(" × ")
    start = ["--main_process_port", "0", "--config_file", f"accelerate_configs/{config}.yaml"]
    start += ["--num_processes", processes] if processes else []
    line = [*ACCELERATE, *start, "-m", "llama_ft.train", "quickstart", *overrides, *more]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """runs(config, method): the finished run of four steps, made once; a gigabyte each, gone at the end."""
    folder = tmp_path_factory.mktemp("runs")
    made: dict[tuple[str, str], Run] = {}

    def make(config: str, method: str) -> Run:
        if (config, method) not in made:
            path = folder / f"{config}-{method}"
            done = train(base, path, method, config)
            assert done.returncode == 0, done.stderr[-3000:]
            made[config, method] = Run(path)
        return made[config, method]

    yield make
    shutil.rmtree(folder)


def apart(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) > 0
    return max(abs(one - other) for one, other in zip(found, wanted, strict=True))


def learnt(run: Run, method: str, base: Path) -> dict[str, torch.Tensor]:
    """What training changed: an adapter's B, which begins as zero, or the difference to the base."""
    if method == "lora":
        factors = load_file(run.adapter / "adapter_model.safetensors")
        return {name: tensor for name, tensor in factors.items() if "lora_B" in name}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run.merged))
    return {name: after[name] - before[name] for name in before}


@pytest.mark.parametrize(("config", "method"), EVERY)
def test_two_processes_train_save_and_prove_what_one_does(runs, base, config, method):
    one, two = runs("cpu", method), runs(config, method)
    assert (two.lock["engine"], two.lock["world_size"]) == (ENGINES[config], 2)
    assert ("deepspeed" in two.lock["versions"]) == ENGINES[config].startswith("ZeRO")
    assert not (two.path / "warnings.json").exists() or "no-gpu" not in (two.path / "warnings.json").read_text()
    assert apart(metric(two.path), metric(one.path)) <= SAME
    assert apart(metric(two.path, "eval_loss"), metric(one.path, "eval_loss")) <= SAME
    assert metric(two.path, "tokens") == metric(one.path, "tokens")
    assert json.loads(two.proof_file.read_text())["ok"]
    wanted, found = learnt(one, method, base), learnt(two, method, base)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert found[name].any(), name
        assert (found[name] - tensor).norm() <= CLOSE * tensor.norm(), name
    samples = json.loads(two.samples_file.read_text())
    assert samples and all(one["before"] and one["after"] for one in samples)


@pytest.mark.parametrize(("config", "method"), EVERY)
def test_a_checkpoint_holds_what_one_process_would_have_written(runs, config, method):
    one, two = (run.checkpoint(2) for run in (runs("cpu", method), runs(config, method)))
    assert verify(two) == []
    random = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in one.iterdir()} - random == {path.name for path in two.iterdir()} - random
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    weights, other = load_file(one / name), load_file(two / name)
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in weights.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in other.items()
    }
    wanted, found = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in (one, two))
    assert [group["params"] for group in wanted["param_groups"]] == [group["params"] for group in found["param_groups"]]
    assert [group["lr"] for group in wanted["param_groups"]] == [group["lr"] for group in found["param_groups"]]
    assert wanted["state"].keys() == found["state"].keys()
    for number, state in wanted["state"].items():
        assert state.keys() == found["state"][number].keys()
        assert float(found["state"][number]["step"]) == float(state["step"]) == 2
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (found["state"][number][moment] - state[moment]).norm() <= CLOSE * state[moment].norm(), number


@pytest.mark.parametrize(
    ("before", "after", "method"),
    [
        ("cpu_ddp_2", "cpu", "lora"),
        ("cpu", "cpu_ddp_2", "lora"),
        ("cpu_zero2_2", "cpu", "full"),
        ("cpu", "cpu_zero2_2", "full"),
        ("cpu_zero3_2", "cpu_fsdp2_2", "full"),
        pytest.param("cpu_fsdp2_2", "cpu_zero3_2", "lora", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_other_processes_and_under_another_engine(runs, base, tmp_path, before, after, method):
    began, whole = runs(before, method), runs("cpu", method)
    path = tmp_path / "run"
    shutil.copytree(began.path, path, ignore=shutil.ignore_patterns("step-4", "adapter", "merged", "eval"))
    done = train(base, path, method, after, "export.merged=false", "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "going on from step-2" in done.stdout
    assert "from here on the losses equal an unbroken run's to rounding: " in done.stdout
    assert len(metric(path)) == STEPS
    assert apart(metric(path), metric(whole.path)) <= SAME
    resumed = Run(path).lock["resumed"][-1]
    assert (resumed["step"], resumed["engine"]) == (2, ENGINES.get(after, "one process"))
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu_fsdp2_2", "cpu_zero2_2", "cpu_zero3_2"])
def test_weights_that_do_not_divide_come_back_whole(tiny_base, tmp_path, config):
    """64 rows and 360 tokens among three processes: some hold fewer than others, or padding. Then two go on."""
    batch = ("training.global_batch=6", "training.micro_batch=1", "export.merged=false", "eval_data=null")
    for name, started in (("one", "cpu"), ("three", f"{config} × 3")):
        done = train(tiny_base, tmp_path / name, "full", started, *batch)
        assert done.returncode == 0, done.stderr[-3000:]
    one, three = Run(tmp_path / "one"), Run(tmp_path / "three")
    assert three.lock["world_size"] == 3
    assert apart(metric(three.path), metric(one.path)) <= SAME
    wanted, found = (load_file(run.checkpoint(STEPS) / "model.safetensors") for run in (one, three))
    assert all((found[name] - tensor).abs().max() <= 1e-3 for name, tensor in wanted.items())
    shutil.rmtree(three.checkpoint(STEPS))
    done = train(tiny_base, three.path, "full", config, *batch, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert apart(metric(three.path), metric(one.path)) <= SAME
