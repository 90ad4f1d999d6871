"""The contents of export.json for a model that writes text: both sides are asked, one after the other, and compared.

Where both fit into memory they are whole and also answer prompts. A model that memory does not hold is read from disk
as it is asked (llama_ft/export/streamed.py), and answers none.
"""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer

from llama_ft.adapters.quantised import requantised
from llama_ft.errors import UserError
from llama_ft.export.folder import greedy_config
from llama_ft.export.job import Job, adapter_facts, finite, reopen, trained_model
from llama_ft.export.prompts import Prompt, choose_prompts, template_faults
from llama_ft.export.proof import Document, Seen, compare, compare_answers, observe, pick_device
from llama_ft.export.streamed import DOCUMENTS, LONGEST, merged_side, observe_streamed, trained_side
from llama_ft.export.tolerance import TOLERANCES, judge
from llama_ft.export.trained import newest_weights
from llama_ft.llama.load import DTYPES, load_config


def prove(job: Job, staged: Path) -> dict[str, Any]:
    """Measures `staged` against what was trained. UserError where it does not open, or a run holds no weights."""
    documents, prompts = choose_prompts(job.prepared)
    if job.streamed:
        documents = [Document(one.ids[:LONGEST], one.labels[:LONGEST]) for one in documents[:DOCUMENTS]]
        if not documents:
            raise UserError(
                "nothing is held out or trained on that both models could be asked", where=str(job.run.path)
            )
        measured, greedy, tokenizer = _ask_streamed(job, staged, documents)
        how = "float32 on cpu, weights read from disk as they are multiplied with"
        opened = f"transformers {transformers.__version__} LlamaForCausalLM, its weights row by row"
    else:
        measured, greedy, tokenizer, device = _ask_whole(job, staged, documents, prompts)
        how = f"float32 on {device}, weights as stored"
        opened = f"transformers {transformers.__version__} LlamaForCausalLM"
    tolerance = TOLERANCES[job.dtype]
    faults = judge(tolerance, measured, greedy) + template_faults(prompts, tokenizer)
    return {
        "ok": not faults,
        "faults": faults,
        "dtype": job.dtype,
        "computed_in": how,
        "tolerance": asdict(tolerance),
        "measured": {key: finite(value) for key, value in measured.items()},
        "prompts": [tokenizer.decode(document.ids) for document in documents],
        "greedy": greedy,
        "adapter": adapter_facts(job),
        "opened_with": opened,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ask_whole(job: Job, staged: Path, documents: list[Document], prompts: list[Prompt]) -> Any:
    """(measured, greedy answers, tokenizer, device): one whole model in memory after the other."""
    seen = _ask_trained(job, documents, prompts)
    model, tokenizer = reopen(staged, transformers.LlamaForCausalLM)
    device = pick_device(model)
    merged = observe(model.to(device), documents, [prompt.ids for prompt in prompts])
    greedy = []
    for prompt, left, right in zip(prompts, seen.answers, merged.answers, strict=True):
        answers = {"trained": tokenizer.decode(left.ids), "merged": tokenizer.decode(right.ids)}
        greedy.append({"prompt": tokenizer.decode(prompt.ids), **answers, **compare_answers(left, right)})
    return compare(seen, merged, documents), greedy, tokenizer, device.type


def _ask_trained(job: Job, documents: list[Document], prompts: list[Prompt]) -> Seen:
    """What the trained model says. What was loaded for it leaves memory with this function."""
    model = trained_model(job)
    own, model.generation_config = model.generation_config, greedy_config(job.stop, job.prepared.tokenizer)
    try:
        return observe(model, documents, [prompt.ids for prompt in prompts])
    finally:
        model.generation_config = own


def _ask_streamed(job: Job, staged: Path, documents: list[Document]) -> Any:
    """(measured, no answers, tokenizer): neither model is ever whole in memory."""
    recipe, full = job.run.recipe, job.lora is None
    folder = newest_weights(job.run) if full else job.base
    config = load_config(folder, recipe.model.rope_scaling, recipe.sequence.max_length)
    if job.lora is not None and "model.embed_tokens.weight" in job.lora.whole:
        config.vocab_size = len(job.lora.whole["model.embed_tokens.weight"])
    requantise = None
    if recipe.adapter.method == "qlora":
        requantise = requantised(recipe.adapter, job.device, job.compute)
    dtype = DTYPES["float32" if full else recipe.model.dtype]
    seen = observe_streamed(trained_side(config, folder, job.lora, dtype, requantise), documents)
    measured = compare(seen, observe_streamed(merged_side(staged), documents), documents)
    return measured, [], AutoTokenizer.from_pretrained(staged, local_files_only=True)
