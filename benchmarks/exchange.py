"""Bytes that engines put on the wire in one optimizer step, beside what `llama-ft plan` calculates.

    python -m benchmarks.exchange                 # needs Linux, `unshare -n` (root) and, for ZeRO, deepspeed

Each case is a few processes in a network namespace of their own, whose loopback carries nothing else: accelerate's own
Accelerator around our LLaMA of four million weights, the passes of a step under the contexts in which transformers'
Trainer puts them, and the kernel's count of bytes sent before and after some steps. Prints the Markdown table of
docs/scaling.md. DeepSpeed keeps what is used again soon; so small a model would be kept whole, and its distance is set
to a quarter of the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from llama_ft.llama.shapes import Shape
from llama_ft.plan.communication import exchange
from llama_ft.plan.engine import Engine
from llama_ft.plan.memory import Case
from llama_ft.plan.weights import Weights
from llama_ft.recipe.schema import Adapter, Training

STEPS, WARM = 3, 2
NEAR = 1_000_000
"""DeepSpeed's stage3_max_reuse_distance here."""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


@dataclass(frozen=True)
class Setting:
    """One line of the table."""

    engine: str
    method: str = "full"
    passes: int = 1
    checkpointing: bool = False
    processes: int = 2
    tied: bool = False

    @property
    def shape(self) -> Shape:
        """A LLaMA of four layers."""
        return Shape(256, 4, 4, 2, 704, 2048, 512, tied=self.tied)

    @property
    def adapter(self) -> Adapter:
        """LoRA of rank 16 on all linear layers, or full tuning."""
        return Adapter(method="full") if self.method == "full" else Adapter(method="lora", r=16)

    def planned(self) -> int:
        """Bytes that the plan calculates for one process and step."""
        training = Training(gradient_checkpointing=self.checkpointing)
        engine = Engine(self.engine, self.processes)
        case = Case.of(Weights(self.shape, self.adapter), training, "float32", engine, on_gpu=False)
        return exchange(case, self.passes, near=NEAR).sent


CASES = (
    Setting("DDP"),
    Setting("DDP", passes=3),
    Setting("DDP", "lora", passes=3),
    Setting("DDP", processes=4),
    Setting("ZeRO-1"),
    Setting("ZeRO-1", passes=3),
    Setting("ZeRO-1", "lora", passes=3),
    Setting("ZeRO-2"),
    Setting("ZeRO-2", passes=3),
    Setting("ZeRO-2", processes=4),
    Setting("ZeRO-3"),
    Setting("ZeRO-3", passes=3),
    Setting("ZeRO-3", checkpointing=True),
    Setting("ZeRO-3", "lora"),
    Setting("ZeRO-3", "lora", checkpointing=True),
    Setting("ZeRO-3", tied=True),
    Setting("ZeRO-3", processes=4),
    Setting("FSDP2"),
    Setting("FSDP2", passes=3),
    Setting("FSDP2", checkpointing=True),
    Setting("FSDP2", "lora"),
    Setting("FSDP2", "lora", checkpointing=True),
    Setting("FSDP2", tied=True),
    Setting("FSDP2", processes=4),
)


def measured(setting: Setting, *, timeout: float = 300) -> int:
    """Bytes that one process sends in a step. RuntimeError with the processes' last lines where they fail."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(setting.processes)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "-m", "benchmarks.exchange", "--worker"]
    inside = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment |= FSDP2 if setting.engine == "FSDP2" else {}
    environment |= (
        {"ACCELERATE_USE_DEEPSPEED": "true"} if setting.engine.startswith("ZeRO") else {"ACCELERATE_USE_CPU": "true"}
    )
    command = [*inside, *launch, json.dumps(asdict(setting))]
    status, out, err = run_whole(command, environment, timeout)
    found = [line for line in out.splitlines() if line.startswith("sent ")]
    if status or not found:
        raise RuntimeError(f"{setting}:\n{err[-3000:]}")
    return int(found[-1].split()[1])


def run_whole(command: list[str], environment: dict[str, str], timeout: float) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command; after `timeout` seconds TimeoutExpired, and no process of it is left.

    torchrun starts each worker in a session of its own: neither its own end nor that of its group reaches them.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        with suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            for one in [*parent.children(recursive=True), parent]:
                with suppress(psutil.Error):
                    one.kill()
        process.communicate()
        raise
    return process.returncode, out, err


def free_port() -> int:
    """A port that nothing listens on at this moment; inside a namespace of its own any other would do."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def namespaces_allowed() -> bool:
    """Whether this user may make a network namespace."""
    try:
        made = subprocess.run(["unshare", "-n", "ip", "link", "set", "lo", "up"], check=False, capture_output=True)
    except OSError:
        return False
    return made.returncode == 0


def worker(setting: Setting) -> None:
    """One process: trains, and the first of them prints what all sent over the loopback, divided among them."""
    import torch
    import torch.distributed as dist

    from llama_ft.adapters.lora import attach_lora
    from llama_ft.llama.load import build_random

    torch.set_num_threads(1)
    accelerator = accelerator_of(setting)
    from transformers import LlamaConfig

    model: Any = build_random(LlamaConfig(**setting.shape.config_dict()), 0)
    if setting.method == "lora":
        model = attach_lora(model, setting.adapter)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-4))
    model.train()
    for step in range(WARM + STEPS):
        if step == WARM:
            dist.barrier()
            before = bytes_sent()
            dist.barrier()
        one_step(accelerator, model, optimizer, setting)
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"sent {round((bytes_sent() - before) / STEPS / setting.processes)}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def accelerator_of(setting: Setting) -> Any:
    """As the trainer comes to it: by the launcher's variables, and FSDP2 on CPUs by our own door."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DeepSpeedPlugin

    from llama_ft.train.sharding.on_cpus import allow_fsdp2_on_cpus

    if not setting.engine.startswith("ZeRO"):
        PartialState(cpu=True)
        allow_fsdp2_on_cpus()
        return Accelerator(cpu=True)
    zero = {"stage": int(setting.engine[-1])}
    if zero["stage"] == 3:
        zero |= {"stage3_max_reuse_distance": NEAR, "stage3_max_live_parameters": NEAR}
        zero |= {"stage3_prefetch_bucket_size": 1000, "stage3_param_persistence_threshold": 1000}
    config = {
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": setting.passes,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))


def one_step(accelerator: Any, model: Any, optimizer: Any, setting: Setting) -> None:
    """Under DDP all passes but the last keep their gradients; DeepSpeed and FSDP2 are asked for a sum in each pass."""
    import torch

    for number in range(setting.passes):
        last = number == setting.passes - 1
        accelerator.gradient_state._set_sync_gradients(last)
        ids = torch.randint(0, setting.shape.vocabulary, (1, 64))
        with nullcontext() if last or setting.engine != "DDP" else accelerator.no_sync(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
    if not setting.engine.startswith("ZeRO"):
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def bytes_sent() -> int:
    """What the loopback of this namespace has carried so far, headers included."""
    lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[9]) for line in lines if line.strip().startswith("lo:"))


def row(setting: Setting) -> str:
    """One line of the table."""
    planned, found = setting.planned(), measured(setting)
    what = f"{setting.method}{', tied' if setting.tied else ''}{', checkpointing' if setting.checkpointing else ''}"
    sizes = f"{planned / 1e6:.2f} | {found / 1e6:.2f} | {found / planned - 1:+.1%}"
    return f"| {setting.engine} | {what} | {setting.processes} | {setting.passes} | {sizes} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of engines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(Setting(**json.loads(options.worker)))
        return
    if not namespaces_allowed():
        raise SystemExit("needs a network namespace: run as root, with the commands `unshare` and `ip`")
    print("| engine | | processes | passes | MB a process and step, plan | measured | |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for setting in CASES:
        if not options.only or setting.engine in options.only:
            print(row(setting), flush=True)


if __name__ == "__main__":
    main()
