"""A Modelfile for Ollama beside the files: which one, what ends an answer, the context, and the template in Go's form.

Ollama does not read the Jinja template inside a GGUF file: `ollama create` looks for the nearest of the templates that
it knows itself, and finding none within 100 letters it sends questions as they are (ollama/ollama, `server/model.go`
and `template/template.go`). So the shipped templates are also there as Go templates (`ollama/NAME.gotmpl`); a run with
another template gets a Modelfile that says so. Ollama begins a text with BOS itself, where the file asks for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from llama_ft.data.template import TEMPLATES
from llama_ft.files import write_text
from llama_ft.recipe.run import Run

CONTEXT = 8192
"""Tokens Ollama is asked to hold at most: it sets memory aside for all of them."""
_GO = Path(__file__).parent / "ollama"
_WITHOUT_SYSTEM = {"alpaca", "alpaca-lora", "qlora-alpaca", "guanaco", "plain"}
_QUOTES = '"""'


def write_modelfile(
    run: Run, proofs: list[dict[str, Any]], tokenizer: PreTrainedTokenizerFast, stop: list[int]
) -> Path | None:
    """Writes gguf/Modelfile for the smallest of the files, or removes it where there is none. Returns its path.

    proofs: entries of export.json. tokenizer: of merged/. stop: ids that end an answer.
    """
    place = run.path / "gguf" / "Modelfile"
    names = [Path(proof["file"]).name for proof in sorted(proofs, key=lambda proof: proof["bytes"])]
    if not names:
        place.unlink(missing_ok=True)
        return None
    shipped = shipped_name(str(tokenizer.chat_template))
    config = json.loads((run.merged / "config.json").read_text(encoding="utf-8"))
    lines = [f"# ollama create {run.recipe.name} -f Modelfile", f"FROM ./{names[0]}"]
    lines += [f"# or FROM ./{name}" for name in names[1:]]
    if shipped is None:
        lines.append("# No TEMPLATE: the run's own is Jinja, which Ollama does not read. Write it in Go's form here;")
        lines.append("# without one Ollama sends a question as it is, and the model was not trained on that.")
    else:
        lines.append(f"TEMPLATE {_QUOTES}{go_template(shipped, tokenizer)}{_QUOTES}")
    ends = [token for token in tokenizer.convert_ids_to_tokens(stop) if '"' not in token]
    lines += [f'PARAMETER stop "{token}"' for token in ends]
    lines.append(f"PARAMETER num_ctx {min(int(config['max_position_embeddings']), CONTEXT)}")
    if (sampling := run.recipe.export.sampling) is not None:  # top_k: Ollama would take the best 40
        lines += [f"PARAMETER temperature {sampling.temperature:g}", f"PARAMETER top_p {sampling.top_p:g}"]
        lines.append("PARAMETER top_k 0")
    system = _system(run)
    if system is not None and shipped not in _WITHOUT_SYSTEM:
        lines.append(f"SYSTEM {_QUOTES}{system}{_QUOTES}")
    write_text(place, "\n".join(lines) + "\n")
    return place


def shipped_name(source: str) -> str | None:
    """The shipped template with this very source that has a Go form; None for any other."""
    for go in sorted(_GO.glob("*.gotmpl")):
        jinja = TEMPLATES / f"{go.stem}.jinja"
        if jinja.is_file() and jinja.read_text(encoding="utf-8") == source:
            return go.stem
    return None


def go_template(name: str, tokenizer: PreTrainedTokenizerFast) -> str:
    """A shipped template in Go's form, on one line, with the tokenizer's own tokens.

    It writes what the Jinja template writes behind BOS, tools and an Alpaca row's `input` apart. llama2-chat and
    codellama-instruct strip no contents. A template of one question takes the last one.
    """
    text = "".join((_GO / f"{name}.gotmpl").read_text(encoding="utf-8").splitlines())
    bos = str(tokenizer.bos_token or "")
    for mark, value in (("@bos@", bos), ("@space@", " " if bos == "<s>" else ""), ("@eos@", str(tokenizer.eos_token))):
        text = text.replace(mark, json.dumps(value, ensure_ascii=False)[1:-1])
    return text.replace('{{- "" -}}', "")


def _system(run: Run) -> str | None:
    """The system prompt that all rows were trained with, if they have one in common that can be quoted."""
    systems = {entry.system for entry in run.recipe.data}
    found = systems.pop() if len(systems) == 1 else None
    return found if found and _QUOTES not in found and not found.endswith('"') else None
