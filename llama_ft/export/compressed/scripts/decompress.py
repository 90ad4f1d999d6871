"""What the numbers of a compressed model stand for, by compressed-tensors' own code. Runs by itself.

Argument: a file with a JSON object: `model` (the compressed folder), `out` (a folder for an ordinary checkpoint in its
place), `dtype` of its weights, `threads`, `answer` file with `version`, or `error` where it cannot be read. One weight
file is in memory at a time.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Decompresses."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch: Any = import_module("torch")
    compressed_tensors: Any = import_module("compressed_tensors")
    convert: Any = import_module("compressed_tensors.entrypoints.convert")
    torch.set_num_threads(task["threads"])
    answer: dict[str, str] = {"version": compressed_tensors.__version__}
    try:
        # It knows no classes of modules, and takes every `weight` that is not named here for a quantised one.
        reader = convert.CompressedTensorsDequantizer(
            task["model"], ignore=["re:.*embed_tokens$", "re:.*norm$"], dtype=getattr(torch, task["dtype"])
        )
        convert.convert_checkpoint(task["model"], task["out"], reader, device="cpu")
    except (ValueError, KeyError, RuntimeError) as error:
        answer["error"] = f"{type(error).__name__}: {error}"
    Path(task["answer"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
