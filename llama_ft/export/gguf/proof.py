"""The proof of a GGUF file: read back, its weights compared with merged/, and asked what merged/ was asked.

Twice, where llama-cpp-python is installed: by transformers with the file's weights in float32, which shows what the
file holds, and by llama.cpp itself.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers
from gguf import GGUFReader

from llama_ft.errors import UserError
from llama_ft.export.gguf.asked import Asked
from llama_ft.export.gguf.entries import Entries, entry_faults
from llama_ft.export.gguf.formats import Format
from llama_ft.export.gguf.opened import ask_file
from llama_ft.export.gguf.runtime import by_llama_cpp
from llama_ft.export.gguf.tools import quantiser_installed
from llama_ft.export.gguf.weights import weight_distances, weight_faults
from llama_ft.export.job import finite
from llama_ft.export.tolerance import judge
from llama_ft.llama.checkpoints.gguf import open_gguf


def prove_file(file: Path, kind: Format, asked: Asked, entries: Entries, aside: Path) -> dict[str, Any]:
    """What export.json says about a file: `ok`, `faults`, and what was measured.

    A file that cannot be opened as a LLaMA has faults and no measurements. aside: a folder for what is needed in
    between. MachineFault where llama.cpp dies.
    """
    proof: dict[str, Any] = {"ok": False, "faults": [], "bytes": file.stat().st_size}
    try:
        weights = open_gguf(file)
        reader = GGUFReader(file)
        faults = entry_faults(reader, entries)
        seen = ask_file(weights, asked)
    except UserError as error:
        return proof | {"faults": [problem.what for problem in error.problems]}
    found = weight_distances(weights, asked.merged)
    measured, greedy = asked.compare(seen)
    faults += weight_faults(found, kind) + judge(kind.tolerance, measured, greedy)
    own = by_llama_cpp(file, kind, asked, aside) if quantiser_installed() else None
    if own is not None:
        faults += [f"in llama.cpp: {fault}" for fault in own["faults"]]
    how = ", read as they are multiplied with" if asked.streamed else ""
    counts = Counter(tensor.tensor_type.name.lower() for tensor in reader.tensors)
    return proof | {
        "ok": not faults,
        "faults": faults,
        "tensor_types": dict(sorted(counts.items())),
        "computed_in": f"float32, weights as the file holds them{how}",
        "tolerance": asdict(kind.tolerance) | {"weight_error": kind.error, "weight_scale": kind.scale},
        "weights": found,
        "measured": {key: finite(value) for key, value in measured.items()},
        "greedy": greedy,
        "llama_cpp": own,
        "opened_with": f"gguf, transformers {transformers.__version__} LlamaForCausalLM",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
