"""Ours on a machine with a GPU: our model, our adapter and our packing under transformers' own loop.

    python -m benchmarks.peers.ours_gpu SPEC.json

What `llama-ft train` runs is this model in a child of TRL's trainer; here it is transformers' `Trainer` with the same
loss, without the checks, reports and checkpoints around it, for their files have no place in a measurement of minutes.
Contenders: `ours`, and `ours-checkpointed` for long documents. Rows, packed or not, are laid end to end in one row of a
micro-batch: there is no padding. Frozen weights are held in the spec's type, the adapter in float32.

torch 2.11, which a machine may hold for its other libraries, has the flash kernel for documents of different lengths,
which shares key heads among query heads by itself, but not the argument `enable_gqa`, which later releases check the
number of heads by: :func:`fit_varlen` leaves it out there.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Clock, Spec, known, main, timed, weights_of


def fit_varlen() -> bool:
    """Lets our call of torch's varlen kernel work in a torch that does not know `enable_gqa`; whether it had to."""
    try:
        from torch.nn.attention import varlen
    except ImportError:  # older still: our kernels say so where they are asked for
        return False
    own: Any = varlen.varlen_attn
    if "enable_gqa" in inspect.signature(own).parameters:
        return False

    def varlen_attn(query: Any, key: Any, *args: Any, enable_gqa: bool = False, **settings: Any) -> Any:
        heads, shared = query.shape[1], key.shape[1]
        assert heads == shared or (enable_gqa and heads % shared == 0), (heads, shared)
        return own(query, key, *args, **settings)

    varlen.varlen_attn = varlen_attn
    return True


def open_model(spec: Spec) -> Any:
    """The folder's weights on the device, and our adapter at the spec's first weights."""
    import torch
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    from llama_ft.adapters.lora import attach_lora
    from llama_ft.adapters.quantised import load_quantised
    from llama_ft.llama.load import load_model
    from llama_ft.recipe.schema import Adapter

    folder, device, dtype = Path(spec.model), torch.device(spec.device), spec.torch_dtype
    if spec.method == "full":
        whole: Any = load_model(folder, dtype)
        return whole.to(device)
    adapter = Adapter(method="qlora" if spec.method == "qlora" else "lora", r=spec.r, alpha=spec.alpha)
    if spec.method == "qlora":
        model: Any = load_quantised(folder, adapter, dtype, compute=dtype, device=device)
    else:
        model = load_model(folder, dtype)
        model.to(device)
    model = attach_lora(model, adapter)
    if spec.adapter is not None:
        found: Any = set_peft_model_state_dict(model, load_file(spec.adapter))
        lacking = [name for name in found.missing_keys if "lora_" in name]
        assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
    return model.to(device)


def run(spec: Spec, clock: Clock) -> None:
    """Trains `spec.steps` steps."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llama_ft.adapters.lora import stack_projections
    from llama_ft.data.batches import PackedCollator

    clock.about["without_enable_gqa"] = fit_varlen()
    model = open_model(spec)
    clock.about["weights"] = weights_of(model)
    if spec.method == "lora":
        stack_projections(model.get_base_model())
    checkpointed = spec.contender.endswith("-checkpointed")
    settings = {
        "output_dir": str(Path(spec.out).with_suffix("")),
        "per_device_train_batch_size": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "max_steps": spec.total_steps,  # the cosine's end; `Stop` ends the run
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": checkpointed,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointed else None,
        "seed": spec.seed,
        "use_cpu": spec.device == "cpu",
        "dataloader_pin_memory": spec.device != "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= spec.steps

    def collate(rows: Sequence[Sequence[dict[str, list[int]]]]) -> dict[str, Any]:
        batch = PackedCollator()([document for row in rows for document in row])
        # A list stays on the host, where the kernels want the borders.
        return batch | {"cu_seqlens": batch["cu_seqlens"].tolist()}

    trainer = timed(InOrder, clock)(
        model=model,
        args=TrainingArguments(**known(TrainingArguments, settings)),
        train_dataset=spec.rows(),
        data_collator=collate,
        callbacks=[Stop()],
    )
    trainer.train()


if __name__ == "__main__":
    main(run)
