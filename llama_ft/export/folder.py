"""The files beside the merged weights: config, generation_config, tokenizer with the run's template."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from llama_ft.llama.reward import reward_config
from llama_ft.recipe.schema import ExportSampling

# Where configs keep the place they were read from. An export must not carry the paths of the machine that made it.
_PLACES = ("_name_or_path", "_model_name_or_path", "_commit_hash")


def stop_ids(end_token: int | None, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids that end an answer: the template's end token, then the tokenizer's own."""
    found = [end_token, tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))


def write_companions(
    folder: Path,
    config: LlamaConfig,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerFast,
    stop: list[int],
    reward: bool = False,
    sampling: ExportSampling | None = None,
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files into `folder`.

    config: the base's shapes; changed here. dtype: what the weights are stored in. tokenizer: as trained with,
    `chat_template` set. stop: ids that end an answer. reward: a reward model, which generates nothing.
    sampling: how servers draw answers that nobody said more about; None is greedy.
    """
    for place in _PLACES:
        config.__dict__.pop(place, None)
    config.architectures = ["LlamaForCausalLM"]
    if reward:
        reward_config(config)
    config.dtype = dtype
    config.eos_token_id = stop if len(stop) > 1 else (stop[0] if stop else None)
    config.pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    config.save_pretrained(folder)
    if not reward:
        # Written afresh: a base's own file may ask for what nobody wants of this model.
        settings = greedy_config(stop, tokenizer, bos=config.bos_token_id)
        if sampling is not None:  # top_k: transformers would take the best 50, which nobody asked for
            settings.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
        settings.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def greedy_config(stop: list[int], tokenizer: PreTrainedTokenizerFast, bos: int | None = None) -> GenerationConfig:
    """Greedy answers that end at `stop`, and nothing else that a base's own file might ask for."""
    return GenerationConfig(
        bos_token_id=bos, eos_token_id=stop or None, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
