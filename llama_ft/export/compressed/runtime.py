"""The compressed checkpoint itself, opened by transformers and compressed-tensors in their own environment.

It computes in float32 and rounds each product's inputs where the type says so (w8a8, fp8), which the weights alone do
not show; vLLM's products sum in other ways.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_ft.export.compressed.types import Compression
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.child import run_script
from llama_ft.export.job import finite
from llama_ft.export.proof import NEW_TOKENS, Answer, Seen
from llama_ft.export.tolerance import judge

SCRIPTS = Path(__file__).parent / "scripts"


def by_transformers(folder: Path, kind: Compression, asked: Asked, aside: Path, path: Sequence[Path]) -> dict[str, Any]:
    """What it says to what merged/ was asked.

    aside: a folder for the logits in between. path: of the environment. Faults alone where it does not open;
    MachineFault where the process dies.
    """
    logits = aside / "logits"
    logits.mkdir()
    task = {
        "model": str(folder),
        "documents": [document.ids for document in asked.documents],
        "prompts": [prompt.ids for prompt in asked.prompts],
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "logits": str(logits),
    }
    try:
        said = run_script("ask", task, aside, what=f"asking {kind.name}", scripts=SCRIPTS, alone_with=path)
        if "error" in said:
            return {"faults": [f"it cannot open the checkpoint: {said['error']}"]}
        seen = [torch.from_numpy(np.load(logits / f"{number}.npy")) for number in range(len(asked.documents))]
    finally:
        shutil.rmtree(logits, ignore_errors=True)
    measured, greedy = asked.compare(Seen(seen, [Answer(ids, []) for ids in said["answers"]]), side="compressed")
    return {
        "version": f"transformers {said['version']}",
        "faults": judge(kind.runtime, measured, greedy),
        "measured": {key: finite(value) for key, value in measured.items()},
        "greedy": greedy,
    }
