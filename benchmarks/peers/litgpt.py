"""litgpt as a contender: `litgpt.finetune.lora` and `litgpt.finetune.full` from their own `setup` to the last step.

    python -m benchmarks.peers.litgpt SPEC.json

litgpt 0.5.13 with lightning 2.6.6. Its own command, which wants `requests` without saying so, converts the model, once,
into a folder beside `out`: a process of its own, whose memory does not count and whose seconds are told apart
(`convert_seconds`; `ready_seconds` of that first run hold them). Its `setup`, `main` and `fit` run unchanged;
names that their module imported are replaced by ones that also tell the clock, and the run ends where checkpoints would
be written.

What is tuned, and what is as litgpt has it:

- precision 32-true or bf16-true; with the latter the adapter, its gradients and AdamW's averages are bfloat16 too.
- fused AdamW, an option of torch that litgpt passes on; no logging within the run, no validation.
- its fine-tuning neither compiles, checkpoints (on one device) nor packs. The head runs in chunks of 128 positions
  with LoRA and whole with full tuning.
- it has no gradient clipping (`validate_args` refuses `max_norm`) and its schedule cannot do without warm-up (it
  divides by it): both are given to the optimizer from here, torch's own ones.
- with accumulation every micro-batch weighs the same, however many labels it has.
- its fine-tuning knows of no tied embeddings: head and embedding are two tensors. With full tuning that would be
  another model, so they are tied from here, with the line that litgpt's own pretraining has for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.peers.common import MASKED, Clock, Spec, adapter_name, main, weights_of

PRECISION = {"float32": "32-true", "bfloat16": "bf16-true"}
# litgpt's modules and the ones of Hugging Face's Llama whose weights, one below the other, are theirs.
STACKED = {
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.o_proj"],
    "mlp.fc_1": ["mlp.gate_proj"],
    "mlp.fc_2": ["mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
    "norm_1": ["input_layernorm"],
    "norm_2": ["post_attention_layernorm"],
}
OUTER = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}


class Trained(Exception):
    """The last step is done: what litgpt does after it, saving and merging, is not measured."""


def finished(*_: Any) -> None:
    """Stands where litgpt reports that training is over."""
    raise Trained


def names(name: str) -> list[str]:
    """The names, PEFT's, of what lies stacked in a weight of litgpt's."""
    module, _, leaf = name.removesuffix(".weight").rpartition(".lora_")
    leaf = f".lora_{leaf}.weight" if module else ".weight"
    module = module or name.removesuffix(".weight")
    if module in OUTER:
        return [OUTER[module] + leaf]
    layer, _, inner = module.removeprefix("transformer.h.").partition(".")
    return [f"model.layers.{layer}.{part}{leaf}" for part in STACKED[inner]]


def apart(named: Iterable[tuple[str, torch.nn.Parameter]], shape: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Gradients under PEFT's names, the stacked ones taken apart."""
    size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    heads = [shape[f"num_{kind}_heads"] * size for kind in ("attention", "key_value", "key_value")]
    for name, parameter in named:
        if parameter.grad is not None:
            parts = names(name)
            even = len(parts) == 1 or name.endswith("lora_A")
            sizes = [len(parameter) // len(parts)] * len(parts) if even else heads
            yield from zip(parts, parameter.grad.split(sizes), strict=True)


def refuse(spec: Spec) -> None:
    """Ends where litgpt cannot do what the spec asks for."""
    library = f"litgpt {version('litgpt')}"
    if spec.method == "qlora":
        raise SystemExit(f"{library} quantises on a GPU alone: 'Bitsandbytes is only supported on CUDA GPUs.'")
    if spec.method not in ("lora", "full"):
        raise SystemExit(f"{library} has no {spec.method} among its ways of fine-tuning.")
    if spec.packed:
        raise SystemExit(
            f"{library} cannot pack: its GPT.forward takes neither a mask nor positions without a KV cache ('You need "
            "to call `gpt.set_kv_cache()`'), so that a row's documents would attend to each other."
        )


def known_as(shape: dict[str, Any]) -> str:
    """The name under which litgpt knows a model of this shape."""
    from litgpt.config import configs

    rope = shape.get("rope_theta") or shape["rope_parameters"]["rope_theta"]
    wanted = {
        "n_layer": shape["num_hidden_layers"],
        "n_embd": shape["hidden_size"],
        "n_head": shape["num_attention_heads"],
        "n_query_groups": shape["num_key_value_heads"],
        "intermediate_size": shape["intermediate_size"],
        "padded_vocab_size": shape["vocab_size"],
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": rope,
    }
    for config in configs:
        if all(config.get(name) == value for name, value in wanted.items()):
            return str(config["name"])
    raise SystemExit(f"litgpt {version('litgpt')} has no configuration of this model's shape: {wanted}")


def converted(spec: Spec, clock: Clock, shape: dict[str, Any]) -> Path:
    """The model as litgpt wants it, made once, by litgpt's own command, beside `out`."""
    model = Path(spec.model)
    folder = Path(spec.out).resolve().parent / f"litgpt-{model.name}"
    if not (folder / "lit_model.pth").is_file():
        start = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())
        command = [sys.executable, "-m", "litgpt", "convert_to_litgpt", str(folder), "--model_name", known_as(shape)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        clock.about["convert_seconds"] = time.perf_counter() - start
    return folder


def data_of(spec: Spec) -> Any:
    """The spec's documents as a data module of litgpt's."""
    from litgpt.data import DataModule, get_sft_collate_fn
    from torch.utils.data import DataLoader

    class Documents(DataModule):
        """The spec's documents in their order, padded by litgpt's own collate function."""

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
            self.batch_size = batch_size

        def train_dataloader(self) -> Any:
            rows: Any = []
            for (document,) in spec.rows():
                tensors: dict[str, Any] = {name: torch.tensor(document[name]) for name in ("input_ids", "labels")}
                lengths = dict.fromkeys(("raw", "raw_plus_prompt_template"), len(document["input_ids"]))
                rows.append(tensors | {"token_counts": lengths})
            return DataLoader(rows, batch_size=self.batch_size, collate_fn=get_sft_collate_fn(ignore_index=MASKED))

        def val_dataloader(self) -> Any:
            nothing: Any = []
            return DataLoader(nothing)

    return Documents()


def run(spec: Spec, clock: Clock) -> None:
    """One run of litgpt's."""
    refuse(spec)
    if spec.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # litgpt takes whatever accelerator it finds
    shape = json.loads((Path(spec.model) / "config.json").read_text(encoding="utf-8"))
    folder = converted(spec, clock, shape)

    from litgpt.args import EvalArgs, TrainArgs

    library: Any = import_module(f"litgpt.finetune.{spec.method}")
    entropy, load_base, make = (
        library.chunked_cross_entropy,
        library.load_checkpoint,
        library.instantiate_torch_optimizer,
    )
    trained: list[tuple[str, torch.nn.Parameter]] = []
    micro_batches: list[tuple[torch.Tensor, int]] = []

    class TellingIterator(library.CycleIterator):
        def __next__(self) -> Any:
            batch = super().__next__()
            if not micro_batches:
                clock.begin_step()
            ids, lengths = batch["input_ids"], batch["token_counts"]["raw_plus_prompt_template"]
            clock.saw(ids, batch["labels"], torch.arange(ids.shape[1]) < lengths.cpu())
            return batch

    def telling_loss(logits: Any, targets: Any, **settings: Any) -> Any:
        loss = entropy(logits, targets, **settings)
        micro_batches.append((loss.detach(), int((targets != MASKED).sum())))
        return loss

    class Cosine(torch.optim.lr_scheduler.CosineAnnealingLR):
        """Its `step` is the last thing that litgpt does in a step."""

        def step(self, epoch: int | None = None) -> None:
            super().step(epoch)
            if micro_batches:
                labelled = sum(count for _, count in micro_batches)
                clock.end_step(sum(float(loss) * count for loss, count in micro_batches) / labelled)
                micro_batches.clear()

    class Tied(library.GPT):
        def __init__(self, config: Any):
            super().__init__(config)
            if spec.method == "full" and shape["tie_word_embeddings"]:
                self.lm_head.weight = self.transformer.wte.weight

    def load(fabric: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        load_base(fabric, model, *args, **kwargs)
        model = model.module
        if spec.method == "lora":
            first = {adapter_name(name): tensor for name, tensor in load_file(str(spec.adapter)).items()}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter.data.copy_(torch.cat([first[part] for part in names(name)]))
        clock.about["weights"] = weights_of(model)
        # Of two names of one weight the later: the embedding's, which is what transformers calls a tied head.
        by_weight = {id(p): (name, p) for name, p in model.named_parameters(remove_duplicate=False)}
        trained.extend((name, p) for name, p in by_weight.values() if p.requires_grad)

    def before(optimizer: Any, *_: Any) -> None:
        clock.save_gradients(apart(trained, shape))
        torch.nn.utils.clip_grad_norm_((parameter for _, parameter in trained), 1.0)

    def optimizer(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.register_step_pre_hook(before)
        return made

    library.GPT = Tied
    library.CycleIterator = TellingIterator
    library.chunked_cross_entropy = telling_loss
    library.load_checkpoint = load
    library.instantiate_torch_optimizer = optimizer
    library.get_lr_scheduler = lambda made, **_: Cosine(made, T_max=spec.total_steps)
    library.create_finetuning_performance_report = finished
    settings = {"lr": spec.learning_rate, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    adapter = {"lora_r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": 0.0}
    adapter |= {f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")}
    clock.about["versions"] = {name: version(name) for name in ("litgpt", "lightning", "torch")}
    with suppress(Trained):
        library.setup(
            checkpoint_dir=folder,
            out_dir=Path(spec.out).resolve().with_suffix(""),
            precision=PRECISION[spec.dtype],
            data=data_of(spec),
            train=TrainArgs(
                save_interval=None,
                log_interval=10**9,
                global_batch_size=spec.micro_batch * spec.accumulation,
                micro_batch_size=spec.micro_batch,
                lr_warmup_steps=None,
                epochs=1,
                max_steps=spec.steps,
                max_seq_length=spec.max_length,
            ),
            eval=EvalArgs(interval=10**9, max_new_tokens=1, final_validation=False),
            optimizer={"class_path": "torch.optim.AdamW", "init_args": settings},
            seed=spec.seed,
            **(adapter if spec.method == "lora" else {}),
        )


if __name__ == "__main__":
    main(run)
