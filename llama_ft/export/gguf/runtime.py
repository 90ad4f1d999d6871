"""llama.cpp itself, where llama-cpp-python is installed: its tokens, logits and answers beside the merged model's.

Its arithmetic rounds more than the file does (16-bit caches, inputs of a product in 8 bits), so it has limits of its
own (:attr:`Format.runtime`); what the file holds is judged by :mod:`llama_ft.export.gguf.proof`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.child import run_script
from llama_ft.export.gguf.formats import Format
from llama_ft.export.job import finite
from llama_ft.export.proof import NEW_TOKENS, Answer, Seen
from llama_ft.export.tolerance import judge


def by_llama_cpp(file: Path, kind: Format, asked: Asked, aside: Path) -> dict[str, Any]:
    """What llama.cpp makes of the prompts' messages, by the template in the file, and of all the ids.

    aside: a folder for the logits in between. Faults alone where llama.cpp cannot open the file; MachineFault where it
    dies.
    """
    folder = aside / "logits"
    folder.mkdir()
    task = {
        "model": str(file),
        "turns": [turns for turns, _ in asked.turns],
        "prompts": [prompt.ids for prompt in asked.prompts],
        "documents": [document.ids for document in asked.documents],
        "new_tokens": NEW_TOKENS,
        "threads": torch.get_num_threads(),
        "logits": str(folder),
    }
    try:
        said = run_script("runtime", task, aside, what=f"llama.cpp with {file.name}")
        if "error" in said:
            return {"faults": [f"it cannot open the file: {said['error']}"]}
        logits = [torch.from_numpy(np.load(folder / f"{number}.npy")) for number in range(len(asked.documents))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    measured, greedy = asked.compare(Seen(logits, [Answer(ids, []) for ids in said["answers"]]))
    faults = judge(kind.runtime, measured, greedy)
    pairs = zip(asked.turns, said["tokens"], strict=True)
    unequal = [number for number, ((_, ids), found) in enumerate(pairs, 1) if found != ids]
    faults += [f"prompt {number} has other tokens than in training" for number in unequal]
    return {
        "version": said["version"],
        "faults": faults,
        "prompts_tokenised": len(asked.turns),
        "prompts_equal": len(asked.turns) - len(unequal),
        "measured": {key: finite(value) for key, value in measured.items()},
        "greedy": greedy,
    }
