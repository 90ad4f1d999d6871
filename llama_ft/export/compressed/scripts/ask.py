"""What transformers makes of a compressed model, activations rounded as its config says. Runs by itself.

Argument: a file with a JSON object: `model` (the compressed folder), `documents` and `prompts` (lists of ids),
`new_tokens`, `threads`, `logits` (a folder: document N's logits [L, V] float32 go into N.npy), `answer` file with to
each prompt an answer, its end token included; or `error`, where it cannot be opened.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def main() -> None:
    """Asks."""
    task: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch: Any = import_module("torch")
    numpy: Any = import_module("numpy")
    transformers: Any = import_module("transformers")
    torch.set_num_threads(task["threads"])
    torch.set_float32_matmul_precision("highest")
    try:
        # float32: what is measured is the rounding that the file asks for, and none of the moment's arithmetic.
        model, report = transformers.LlamaForCausalLM.from_pretrained(
            task["model"], dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        unfit = [f"{kind}: {', '.join(map(str, sorted(report[kind])[:3]))}" for kind in sorted(report) if report[kind]]
        if unfit:
            raise ValueError("; ".join(unfit))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        Path(task["answer"]).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}), encoding="utf-8")
        return
    model.eval()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 2 * size:
        model = model.to("cuda")
    answers = []
    with torch.inference_mode():
        for number, ids in enumerate(task["documents"]):
            logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]
            numpy.save(Path(task["logits"], f"{number}.npy"), logits.float().cpu().numpy())
        for prompt in task["prompts"]:
            ids = torch.tensor([prompt], device=model.device)
            asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": task["new_tokens"]}
            answers.append(model.generate(**asked, do_sample=False)[0, len(prompt) :].tolist())
    found = {"version": transformers.__version__, "answers": answers}
    Path(task["answer"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
