"""torchtune as a contender: its recipes `lora_finetune_single_device` and `full_finetune_single_device`.

    python -m benchmarks.peers.torchtune SPEC.json

torchtune 0.6.1, its last release (April 2025), under torch 2.13.0. torchao is 0.15.0: 0.16 and later have lost names
that torchtune imports (`int4_weight_only`, `nf4tensor`). The recipe's `setup` and `train` run unchanged, driven by a
config as `tune run` would make it; the small subclass below only feeds the adapter's first weights and tells the clock.

What is tuned, and what is as torchtune has it:

- the model is its Llama 3.2, which can tie the head, with its RoPE unscaled (`scale_factor` 1) unless the model's
  config says otherwise; dtype fp32 or bf16, in the latter the adapter, its gradients and AdamW's averages too.
- fused AdamW and its chunked cross-entropy, both as in its own configs; no checkpointing, no logging within the run.
- packed rows go through its own `PackedDataset`, which pads every row to `max_length` and, on a CPU, builds a dense
  mask; its flexible attention is for CUDA alone.
- it divides the gradients of a step by the step's labels: tokens weigh the same with accumulation too.
- packed rows, all of one length, are compiled (`compile: True`; needs a C++ compiler): with bfloat16 and one thread the
  second and third step took 5.1 seconds of processor time each instead of 5.8 (one run of each), the first 20 seconds
  and more on top. Padded rows are not: 14.8 instead of 15.9 in the third and fourth step, within the spread of the
  steps, and about 10 more in each of the first two, whose lengths it compiles for.
- its NF4 wants weights whose scales fill blocks of 256: not SmolLM2-135M's 576 × 576.
"""

from __future__ import annotations

import json
import runpy
import sys
from importlib.metadata import distribution, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

from benchmarks.peers.common import MASKED, Clock, Spec, adapter_name, main, weights_of

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


class Documents(Dataset[Any]):
    """The spec's documents, one a row: what the config names as dataset."""

    def __init__(self, tokenizer: Any, path: str):
        self.rows = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in Spec.read(path).joined()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


def packed(tokenizer: Any, path: str, packed: bool) -> Any:
    """torchtune's PackedDataset with the rows of the spec instead of its own greedy ones."""
    from torchtune.datasets import PackedDataset

    spec = Spec.read(path)

    class Rows(PackedDataset):
        def _pack(self) -> None:
            for row, documents in zip(spec.joined(), spec.rows(), strict=True):
                pack = {"tokens": row["input_ids"], "labels": row["labels"], "input_pos": row["position_ids"]}
                self._add_pack(pack | {"seq_lens": [len(document["input_ids"]) for document in documents]})

    return Rows([], max_seq_len=spec.max_length)


def config_of(spec: Spec, shape: dict[str, Any]) -> Any:
    """What a user's yaml would hold."""
    from omegaconf import OmegaConf

    out = Path(spec.out).resolve().with_suffix("")
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    model = {
        "_component_": "torchtune.models.llama3_2.llama3_2",
        "vocab_size": shape["vocab_size"],
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": shape["num_key_value_heads"],
        "embed_dim": shape["hidden_size"],
        "intermediate_dim": shape["intermediate_size"],
        "max_seq_len": spec.max_length,
        "norm_eps": shape["rms_norm_eps"],
        "rope_base": int(rope.get("rope_theta") or shape["rope_theta"]),
        "scale_factor": int(rope.get("factor", 1)),
        "tie_word_embeddings": shape["tie_word_embeddings"],
    }
    if spec.method != "full":
        model |= {
            "_component_": "torchtune.models.llama3_2.lora_llama3_2",
            "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"],
            "apply_lora_to_mlp": True,
            "lora_rank": spec.r,
            "lora_alpha": spec.alpha,
            "quantize_base": spec.method == "qlora",
        }
    rows = {"_component_": f"benchmarks.peers.torchtune.{'packed' if spec.packed else 'Documents'}"}
    return OmegaConf.create(
        {
            "output_dir": str(out),
            "device": spec.device,
            "dtype": DTYPES[spec.dtype],
            "seed": spec.seed,
            "model": model,
            "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0},
            "checkpointer": {
                "_component_": "torchtune.training.FullModelHFCheckpointer",
                "checkpoint_dir": spec.model,
                "checkpoint_files": sorted(file.name for file in Path(spec.model).glob("*.safetensors")),
                "output_dir": str(out),
                "model_type": "LLAMA3_2",
            },
            "resume_from_checkpoint": False,
            "dataset": rows | {"path": sys.argv[1]} | ({"packed": True} if spec.packed else {}),
            "shuffle": False,
            "batch_size": spec.micro_batch,
            "gradient_accumulation_steps": spec.accumulation,
            "epochs": 1,
            "max_steps_per_epoch": spec.steps,
            "clip_grad_norm": 1.0,
            "optimizer": {
                "_component_": "torch.optim.AdamW",
                "lr": spec.learning_rate,
                "betas": [0.9, 0.999],
                "eps": 1e-8,
                "weight_decay": 0.0,
                "fused": True,
            },
            "optimizer_in_bwd": False,
            "lr_scheduler": {
                "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
                "num_warmup_steps": 0,
            },
            "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
            "compile": spec.packed,
            "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(out)},
            "log_every_n_steps": 10**9,
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
        }
    )


def timed(recipe: Any, spec: Spec, clock: Clock, shape: dict[str, Any]) -> Any:
    """The recipe's class, made to tell the clock."""
    from torchtune import training
    from torchtune.models import convert_weights

    scale = training.scale_grads
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    size = shape.get("head_dim") or shape["hidden_size"] // heads
    to_hf = convert_weights.tune_to_hf if spec.method == "full" else convert_weights.tune_to_peft_adapter_weights
    lengths = iter([len(row["input_ids"]) for row in spec.joined()])
    losses: list[tuple[torch.Tensor, int]] = []

    def named(tensors: dict[str, Any]) -> dict[str, Any]:
        return to_hf(tensors, num_heads=heads, num_kv_heads=groups, dim=shape["hidden_size"], head_dim=size)

    def telling_scale(model: Any, scaler: Any) -> None:
        """The recipe divides the gradients by the labels; after that it clips them."""
        scale(model, scaler)
        if spec.gradients is not None and not clock.steps:
            clock.save_gradients(
                named({name: p.grad for name, p in model.named_parameters() if p.grad is not None}).items()
            )

    training.scale_grads = telling_scale

    class Timed(recipe):
        def _setup_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._setup_model(*args, **kwargs)
            if spec.method != "full":
                first = {adapter_name(name): tensor for name, tensor in load_file(str(spec.adapter)).items()}
                for name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        tensor = first[adapter_name(*named({name: parameter}))]
                        if name.endswith(("q_proj.lora_b.weight", "k_proj.lora_b.weight")):
                            # Its rotary embeddings turn neighbours where Hugging Face's turn halves.
                            tensor = tensor.view(-1, 2, size // 2, spec.r).transpose(1, 2).reshape(tensor.shape)
                        parameter.data.copy_(tensor)
            clock.about["weights"] = weights_of(model)
            return model

        def _setup_lr_scheduler(self, *args: Any, **kwargs: Any) -> Any:
            made = super()._setup_lr_scheduler(*args, **kwargs | {"num_training_steps": spec.total_steps})
            step = made.step

            def telling() -> None:
                """The last thing that the recipe does in a step."""
                step()
                labelled = sum(count for _, count in losses)
                clock.end_step(sum(float(loss) * count for loss, count in losses) / labelled)
                losses.clear()

            made.step = telling
            return made

        def _loss_step(self, batch: Any) -> Any:
            if not losses:
                clock.begin_step()
            tokens, labels = batch["tokens"], batch["labels"]
            real = torch.arange(tokens.shape[1]) < torch.tensor(list(islice(lengths, len(tokens))))[:, None]
            clock.saw(tokens, labels, real, batch.get("input_pos"))
            loss = super()._loss_step(batch)
            losses.append((loss.detach(), int((labels[:, 1:] != MASKED).sum())))
            return loss

        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            """Nothing: what comes after the last step is not measured."""

    return Timed


def run(spec: Spec, clock: Clock) -> None:
    """One run of torchtune's."""
    if spec.method not in ("lora", "qlora", "full"):
        raise SystemExit(f"{spec.method} of torchtune {version('torchtune')} is not compared here.")
    kind = "full" if spec.method == "full" else "lora"
    # The recipes are files that `tune run` runs, not modules: "you should not import anything from here".
    file = distribution("torchtune").locate_file(f"recipes/{kind}_finetune_single_device.py")
    recipe = runpy.run_path(str(file))[f"{'Full' if kind == 'full' else 'LoRA'}FinetuneRecipeSingleDevice"]
    shape = json.loads((Path(spec.model) / "config.json").read_text(encoding="utf-8"))
    config = config_of(spec, shape)
    clock.about["versions"] = {name: version(name) for name in ("torchtune", "torchao", "torch")}
    running = timed(recipe, spec, clock, shape)(cfg=config)
    try:
        running.setup(cfg=config)
    except AssertionError as error:
        # Its NF4 wants weights whose scales fill blocks of 256.
        raise SystemExit(f"torchtune {version('torchtune')} cannot hold this model in NF4: {error}") from error
    running.train()
    running.cleanup()


if __name__ == "__main__":
    main(run)
