"""The proof of a compressed checkpoint: read back, its weights compared with merged/, asked what merged/ was asked.

Twice: by transformers in our environment with the weights that it stands for in float32, as compressed-tensors' own
code unpacks them, and by transformers in the other environment with the checkpoint itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, LlamaForCausalLM

from llama_ft.errors import MachineFault, UserError
from llama_ft.export.compressed.entries import entry_faults
from llama_ft.export.compressed.runtime import SCRIPTS, by_transformers
from llama_ft.export.compressed.types import UNROUNDED_ERROR, UNROUNDED_SCALE, Compression
from llama_ft.export.compressed.weights import compare_weights, weight_faults
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.child import run_script
from llama_ft.export.job import finite, reopen
from llama_ft.export.proof import Seen, observe, pick_device
from llama_ft.export.streamed import merged_side, observe_streamed
from llama_ft.export.tolerance import judge
from llama_ft.llama.load import quiet_transformers


def prove_checkpoint(
    folder: Path, kind: Compression, group: int, dtype: str, asked: Asked, aside: Path, path: Sequence[Path]
) -> dict[str, Any]:
    """What export.json says about a checkpoint: `ok`, `faults`, and what was measured.

    group: weights that share a scale. dtype: of what is not rounded. aside: a folder for what is needed in between, 2
    bytes a weight. path: of llm-compressor's environment. A checkpoint that cannot be opened has faults and no
    measurements. MachineFault where a process of that environment dies.
    """
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    faults: list[str] = []
    proof: dict[str, Any] = {"ok": False, "faults": faults, "bytes": size}
    plain = aside / "plain"
    try:
        faults += entry_faults(folder, asked.merged, kind, group, dtype)
        task = {"model": str(folder), "out": str(plain), "dtype": dtype, "threads": torch.get_num_threads()}
        unpacking = f"unpacking {kind.name}"
        said = run_script("decompress", task, aside, what=unpacking, scripts=SCRIPTS, alone_with=path)
        if "error" in said:
            return proof | {"faults": [*faults, f"compressed-tensors cannot read it: {said['error']}"]}
        seen = _ask(plain, asked)
    except MachineFault:
        raise
    except UserError as error:
        return proof | {"faults": [*faults, *(problem.what for problem in error.problems)]}
    found = compare_weights(plain, asked.merged, kind)
    measured, greedy = asked.compare(seen, side="compressed")
    faults += weight_faults(found, kind) + judge(kind.tolerance, measured, greedy)
    own = None if asked.streamed else by_transformers(folder, kind, asked, aside, path)
    if own is not None:
        faults += [f"as it runs: {fault}" for fault in own["faults"]]
    reader = f"compressed-tensors {said['version']}"
    how = ", read as they are multiplied with" if asked.streamed else ""
    return proof | {
        "ok": not faults,
        "faults": faults,
        "computed_in": f"float32, weights as the checkpoint stands for{how}",
        "tolerance": asdict(kind.tolerance)
        | {"weight_error": kind.error, "weight_scale": kind.scale}
        | {"unrounded_error": UNROUNDED_ERROR, "unrounded_scale": UNROUNDED_SCALE, "runtime": asdict(kind.runtime)},
        "weights": found.facts() | {"compared_without": kind.folds},
        "measured": {key: finite(value) for key, value in measured.items()},
        "greedy": greedy,
        "runtime": own,
        "opened_with": f"{reader}, transformers {transformers.__version__} LlamaForCausalLM",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _ask(plain: Path, asked: Asked) -> Seen:
    """What the unpacked weights say. UserError where they are no LLaMA."""
    if asked.streamed:
        return observe_streamed(merged_side(plain), asked.documents)
    with quiet_transformers():
        model, _ = reopen(plain, LlamaForCausalLM)
    # With the merged model's own settings of generation: that the checkpoint has the same is looked at as an entry.
    model.generation_config = GenerationConfig.from_pretrained(asked.merged)
    return observe(model.to(pick_device(model)), asked.documents, [prompt.ids for prompt in asked.prompts])
