"""Saving what was trained, and reading it back before anyone calls the run done."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama_ft.errors import MachineFault
from llama_ft.files import publish
from llama_ft.llama.base import hub_id
from llama_ft.recipe.run import Run


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> None:
    """Writes adapter/ and compares it with the live adapter, tensor by tensor and bit by bit.

    Raises MachineFault if a tensor is missing, differs, or if every B is zero: an adapter that changes nothing.
    """
    aside = run.path / ".adapter.writing"
    shutil.rmtree(aside, ignore_errors=True)
    _name_base(model, run)
    # A vocabulary that has grown is trained and saved as a module of its own; PEFT would add embedding and head again.
    model.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
    tokenizer.save_pretrained(str(aside))
    (aside / "README.md").unlink(missing_ok=True)  # PEFT's own card; the run has one
    written = load_file(aside / "adapter_model.safetensors")
    trained = get_peft_model_state_dict(model, save_embedding_layers=False)
    live = {name: tensor.detach().cpu() for name, tensor in trained.items()}
    differing = sorted(
        name
        for name in live.keys() | written.keys()
        if name not in live or name not in written or not torch.equal(live[name], written[name])
    )
    if differing:
        raise MachineFault(
            f"the saved adapter differs from the trained one in {len(differing)} tensors, first {differing[0]}",
            where=str(aside),
            hint="the last checkpoint is whole; go on with --resume",
        )
    if not any(bool(tensor.any()) for name, tensor in written.items() if "lora_B" in name):
        raise MachineFault("the saved adapter is zero: training changed nothing", where=str(aside))
    publish(aside, run.adapter)


def _name_base(model: PeftModel, run: Run) -> None:
    """A base of the hub is named by its id there: whoever is given the adapter has no cache of this machine."""
    stated = run.recipe.model
    name = None if stated.starts_new else hub_id(stated.base)
    if name is not None:
        config: Any = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = name, stated.revision


def save_full(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run, dtype: torch.dtype) -> None:
    """Writes merged/ from a fully tuned model, in `dtype`, named as the plain LLaMA it is."""
    aside = run.path / ".merged.writing"
    shutil.rmtree(aside, ignore_errors=True)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    model.save_pretrained(str(aside), state_dict=state)
    tokenizer.save_pretrained(str(aside))
    publish(aside, run.merged)
