"""What llama.cpp itself makes of a file, through llama-cpp-python. Runs by itself.

Argument: a file with a JSON object: `model` file, `turns` (lists of messages), `prompts` and `documents` (lists of
ids), `new_tokens`, `threads`, `logits` (a folder: document N's logits [L, V] float32 go into N.npy), `answer` file with
`tokens` of each list of messages, and to each prompt an answer, its end token included; or `error`, where it cannot
open the file.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np


def without_repacking(low_level: Any) -> None:
    """Products on the weights as they lie in the file, and not in a form made for this machine's instructions.

    One of those forms ends in a crash: on CPUs with AMX, gcc 12 leaves out the set-up of the tiles
    (https://github.com/ggml-org/llama.cpp/pull/26954).
    """
    defaults = low_level.llama_model_default_params

    def plain() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    low_level.llama_model_default_params = plain


def read(llm: Any, turns: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, as its chat handlers make them: by the file's template, with the file's own tokens."""
    formatter = import_module("llama_cpp.llama_chat_format").Jinja2ChatFormatter(
        template=llm.metadata["tokenizer.chat_template"],
        eos_token=_text(llm, llm.token_eos()),
        bos_token=_text(llm, llm.token_bos()),
        add_generation_prompt=turns[-1]["role"] != "assistant",
    )
    # The template has written what begins a text.
    return llm.tokenize(formatter(messages=turns).prompt.encode(), add_bos=False, special=True)


def _text(llm: Any, token: int) -> str:
    return llm._model.token_get_text(token) if token != -1 else ""


def main() -> None:
    """Asks."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    llama_cpp: Any = import_module("llama_cpp")
    without_repacking(import_module("llama_cpp.llama_cpp"))
    longest = max(map(len, [*task["prompts"], *task["documents"]]))
    try:
        llm = llama_cpp.Llama(
            task["model"],
            n_ctx=longest + task["new_tokens"] + 8,
            n_batch=512,
            n_threads=task["threads"],
            n_threads_batch=task["threads"],
            logits_all=True,
            verbose=False,
        )
    except (ValueError, RuntimeError) as error:
        Path(task["answer"]).write_text(json.dumps({"error": str(error)}), encoding="utf-8")
        return
    vocabulary = llama_cpp.llama_model_get_vocab(llm.model)

    def ask(ids: list[int]) -> list[int]:
        answer: list[int] = []
        llm.reset()
        llm.eval(ids)
        while True:
            answer.append(int(llm.scores[llm.n_tokens - 1].argmax()))
            if len(answer) == task["new_tokens"] or llama_cpp.llama_vocab_is_eog(vocabulary, answer[-1]):
                return answer
            llm.eval(answer[-1:])

    for number, ids in enumerate(task["documents"]):
        llm.reset()
        llm.eval(ids)
        np.save(Path(task["logits"], f"{number}.npy"), llm.scores[: len(ids)])
    found = {
        "version": llama_cpp.__version__,
        "tokens": [read(llm, turns) for turns in task["turns"]],
        "answers": [ask(ids) for ids in task["prompts"]],
    }
    Path(task["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
