"""transformers.Trainer and PEFT, tuned: what a careful user without a further library runs.

    python -m benchmarks.peers.hf SPEC.json

transformers 5.23.0, peft 0.21.2. Tuning: weights in the spec's type instead of bf16 autocast (which casts frozen
float32 weights anew in every call), no gradient checkpointing, sdpa attention, the order of the documents as given.
torch.compile stays off: on two cores its first step took 102 s for 6 % afterwards. The adapter stays in float32,
as PEFT makes it by itself. In bfloat16 (`autocast_adapter_dtype=False`) a fifth more tokens a second and 0.6 GiB less
were measured (2 × 5 steps, A-B-A-B, one thread), but on packed rows, with an adapter that is not 0, the first loss was
off by 4.5e-3 instead of 1.3e-3: the gate is 2e-3. `Trainer` weights the tokens of a step equally, because it hands the
model `num_items_in_batch`.

Packed rows go through `DataCollatorWithFlattening`: without an attention mask and without a cache, transformers reads
from position_ids where documents start and makes sdpa a mask of blocks. With a cache it does not, and documents would
see one another without a word: hence `use_cache = False`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.common import Clock, Spec, main, timed, weights_of

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def open_model(spec: Spec, dtype: Any) -> Any:
    """The folder's weights; for qlora in 4 bits, the rest in `dtype`."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
    if spec.method == "qlora":
        settings |= {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=spec.torch_dtype,
            ),
            "device_map": {"": 0 if spec.device == "cuda" else "cpu"},
        }
    model = AutoModelForCausalLM.from_pretrained(spec.model, **settings)
    model.config.use_cache = False
    module: Any
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks weights in the first forward pass without gradients and
        # computes wrong ones from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def with_adapter(model: Any, spec: Spec) -> Any:
    """The model with PEFT's LoRA at the spec's first weights."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = LoraConfig(task_type="CAUSAL_LM", r=spec.r, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=LINEAR)
    model = get_peft_model(model, config)
    if spec.adapter is not None:
        found: Any = set_peft_model_state_dict(model, load_file(spec.adapter))
        lacking = [name for name in found.missing_keys if "lora_" in name]
        assert not lacking and not found.unexpected_keys, (lacking, found.unexpected_keys)
    return model


def arguments(spec: Spec) -> dict[str, Any]:
    """What the arguments of `transformers.TrainingArguments` and of its children are set to."""
    # Packed rows of one micro-batch would be flattened into one, whose dense mask grows with the square of its length.
    rows = 1 if spec.packed else spec.micro_batch
    return {
        "output_dir": str(Path(spec.out).with_suffix("")),
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": spec.micro_batch * spec.accumulation // rows,
        # The cosine's end; :func:`stop_after` ends the run.
        "max_steps": spec.total_steps,
        "learning_rate": spec.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "seed": spec.seed,
        "use_cpu": spec.device == "cpu",
        "dataloader_pin_memory": spec.device != "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def stop_after(steps: int) -> Any:
    """A callback that ends the run there."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= steps

    return Stop()


def flattened(rows: Sequence[Sequence[dict[str, list[int]]]]) -> Any:
    """A micro-batch of packed rows, by transformers' own collator, which wants the documents one by one."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening()([document for row in rows for document in row])


def run(spec: Spec, clock: Clock) -> None:
    """Trains `spec.steps` steps."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = open_model(spec, spec.torch_dtype)
    if spec.method != "full":
        model = with_adapter(model, spec)
    clock.about["weights"] = weights_of(model)
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows: list[Any] = spec.rows()
    settings = arguments(spec)
    if not spec.packed:
        rows = [{"input_ids": document["input_ids"], "labels": document["labels"]} for [document] in rows]
    settings |= {"train_sampling_strategy": "sequential", "remove_unused_columns": False}
    assert settings.keys() <= inspect.signature(TrainingArguments).parameters.keys()
    trainer = timed(Trainer, clock)(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows,
        data_collator=flattened if spec.packed else DataCollatorForSeq2Seq(tokenizer),
        callbacks=[stop_after(spec.steps)],
    )
    trainer.train()


if __name__ == "__main__":
    main(run)
