"""llama.cpp's quantiser, through llama-cpp-python. Runs by itself: native code may take its process with it.

Argument: a file with a JSON object: `source` and `out` files, `type` (q4_k_m …), `stated` (patterns of
tensors' names, each with the number of ggml's type it is to have), `threads`, `answer` file.
"""

from __future__ import annotations

import ctypes
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Quantises; ends with 1 and llama.cpp's own words where that fails."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llama_cpp: Any = import_module("llama_cpp")
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + task["type"].upper())
    params.nthread = task["threads"]
    # An entry without a pattern ends the list.
    stated = (llama_cpp.llama_model_tensor_override * (len(task["stated"]) + 1))()
    for entry, (pattern, kind) in zip(stated, task["stated"], strict=False):
        entry.pattern, entry.type = pattern.encode(), kind
    params.tt_overrides = stated
    paths = [task[name].encode() for name in ("source", "out")]
    code = llama_cpp.llama_model_quantize(*paths, ctypes.byref(params))
    if code:
        raise SystemExit(f"llama_model_quantize returned {code}")
    Path(task["answer"]).write_text(json.dumps({"version": llama_cpp.__version__}), encoding="utf-8")


if __name__ == "__main__":
    main()
