"""A LLaMA from nothing on two cores: its own tokenizer, some minutes of training, and a mark to pass.

    python -m benchmarks.from_nothing --data DIR --out runs/from-nothing

DIR holds `text/wikitext2_valid.txt`, whose last tenth (whole articles, a document a line) is held out, and other texts
(tinyshakespeare.txt, c4_demo.jsonl); the documentation of the Python that runs comes beside them. Every step is the
command a user types: `llama-ft tokenizer train`, `llama-ft train pretrain/from-nothing`. The mark is a Kneser-Ney model
of five bytes (benchmarks.kneser_ney) of the same training documents, and of those of wikitext alone: the network must
need fewer bits per byte of the held-out lines than the better of the two. Headings come again in other articles, for
both. `--plain N` trains the first N steps again with transformers' own LLaMA, eager, in a plain loop, and compares the
curve. FOLDER/from-nothing.md and .json.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.kneser_ney import bits_per_byte
from benchmarks.machine import describe, machine
from benchmarks.plain_pretrain import plain_curve
from llama_ft import load_recipe
from llama_ft.data.problems import Problems
from llama_ft.data.sources import open_sources
from llama_ft.errors import UserError, user_facing
from llama_ft.files import write_json, write_text
from llama_ft.recipe.run import Run
from llama_ft.recipe.schema import Data

RECIPE = "pretrain/from-nothing"
SHARES = {"wikitext": 0.6, "c4": 0.15, "shakespeare": 0.1, "python-docs": 0.15}
PROMPTS = ("The game was", "In the early years", "She had been", "The song was written", "During the war ,")


def texts(data: Path, folder: Path) -> tuple[list[dict[str, Any]], Path]:
    """The sources as a recipe names them, and the file of held-out lines. Writes wikitext's two parts into `folder`."""
    lines = [line for line in (data / "wikitext2_valid.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    border = next(i for i in range(len(lines) * 9 // 10, len(lines)) if is_title(lines[i]))
    held_out = folder / "held-out.txt"
    write_text(folder / "wikitext.txt", "\n".join(lines[:border]) + "\n")
    write_text(held_out, "\n".join(lines[border:]) + "\n")
    text: dict[str, Any] = {"layout": "text", "unit": "line"}
    sources = [
        {"path": str(folder / "wikitext.txt"), **text, "share": SHARES["wikitext"]},
        {"path": str(data / "c4_demo.jsonl"), "layout": "text", "share": SHARES["c4"]},
        {"path": str(data / "tinyshakespeare.txt"), **text, "share": SHARES["shakespeare"]},
        {"use": "python-docs", "share": SHARES["python-docs"]},
    ]
    return sources, held_out


def is_title(line: str) -> bool:
    """Whether an article of wikitext begins: ` = Title = `, and no section of it, which has more signs."""
    words = line.split()
    return len(words) > 2 and words[0] == "=" == words[-1] and words[1] != "="


def documents(source: dict[str, Any]) -> list[bytes]:
    """A source's texts, as a recipe reads them."""
    problems = Problems()
    (opened,) = open_sources([Data(**{key: value for key, value in source.items() if key != "share"})])
    found = [row["text"] if isinstance(row, dict) else str(row) for _, row in opened.rows(problems)]
    problems.raise_if_any()
    return [text.encode() for text in found]


def command(*line: str) -> float:
    """Runs `llama-ft` with this process's output; seconds. SystemExit with its status where it fails."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "llama_ft.cli", *line], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return time.perf_counter() - start


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Tokenizer, run, mark and samples; what is not there yet is made."""
    out: Path = options.out
    (out / "text").mkdir(parents=True, exist_ok=True)
    sources, held_out = texts(options.data / "text", out / "text")
    found: dict[str, Any] = {"machine": machine(), "steps": options.steps}
    names = [str(source.get("path", source.get("use"))) for source in sources]
    if not (out / "tokenizer" / "tokenizer.json").exists():
        size = ["--vocab-size", str(options.vocabulary)]
        found["tokenizer_seconds"] = command("tokenizer", "train", *names, *size, "-o", str(out / "tokenizer"))
    overrides = [
        f"model.tokenizer={out / 'tokenizer'}",
        f"data={json.dumps(sources)}",
        f"eval_data={json.dumps([{'path': str(held_out), 'layout': 'text', 'unit': 'line'}])}",
        f"training.max_steps={options.steps}",
        f"output_dir={out / 'run'}",
    ]
    run = Run(out / "run")
    if not (run.merged / "config.json").exists():
        found["training_seconds"] = command("train", RECIPE, *overrides, "--overwrite", "--allow", "eval-in-train")
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    found["held_out"] = [
        {key: line[key] for key in ("step", "eval_loss", "eval_bits_per_byte")} for line in lines if "eval_loss" in line
    ]
    trained = [line for line in lines if "tokens" in line]
    found |= {"tokens": trained[-1]["tokens"], "tokens_by_source": total(trained)}
    found["step_seconds"] = sum(line["seconds"] for line in trained)
    all_text = [one for source in sources for one in documents(source)]
    lines_out = documents({"path": str(held_out), "layout": "text", "unit": "line"})
    found["held_out_bytes"] = sum(map(len, lines_out))
    found["kneser_ney"] = {
        "all sources": bits_per_byte(all_text, lines_out),
        "wikitext alone": bits_per_byte(documents(sources[0]), lines_out),
    }
    found["bits_per_byte"] = bits_of(run, lines_out)
    words = {word for one in all_text for word in one.decode().split()}
    found["samples"], found["words_known"] = samples(run, words)
    if options.plain:
        found["plain"] = compared(overrides, run, options.plain)
    return found


def total(lines: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens of every source over all steps."""
    return {name: sum(line["tokens_by_source"][name] for line in lines) for name in lines[0]["tokens_by_source"]}


@torch.no_grad()
def bits_of(run: Run, lines: list[bytes]) -> float:
    """Bits per byte of the held-out lines by the exported model in plain transformers, ends and newlines counted.

    The end token stands for the newline that the byte model has to predict.
    """
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    model = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32).eval()
    nats = 0.0
    for line in lines:
        ids = tokenizer(line.decode(), add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids) + 1, 511):  # what is longer than a context goes in parts
            part = ids[start : start + 511] + ([tokenizer.eos_token_id] if start + 511 > len(ids) else [])
            row = torch.tensor([[tokenizer.bos_token_id, *part][:512]])
            logits = model(row).logits[0, :-1].double()
            nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    return nats / math.log(2) / sum(len(line) + 1 for line in lines)


@torch.no_grad()
def samples(run: Run, words: set[str]) -> tuple[list[str], float]:
    """What the model writes after some beginnings, and the share of its words that the training texts have too."""
    tokenizer = AutoTokenizer.from_pretrained(run.merged)
    model = AutoModelForCausalLM.from_pretrained(run.merged, dtype=torch.float32).eval()
    torch.manual_seed(0)
    written = []
    for prompt in PROMPTS:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        # Most lines of wikitext are short: the end is put off, or there would be little to read.
        out = model.generate(ids, do_sample=True, temperature=0.7, top_k=50, min_new_tokens=60, max_new_tokens=60)
        written.append(tokenizer.decode(out[0], skip_special_tokens=True))
    said = [word for text, prompt in zip(written, PROMPTS, strict=True) for word in text[len(prompt) :].split()]
    return written, sum(word in words for word in said) / max(1, len(said))


def compared(overrides: list[str], run: Run, steps: int) -> dict[str, float]:
    """The largest differences of the first steps' losses and gradient norms from those of a plain loop."""
    losses, norms = plain_curve(load_recipe(RECIPE, overrides), run, steps)
    lines = [json.loads(line) for line in run.metrics_file.read_text(encoding="utf-8").splitlines()]
    ours = [line for line in lines if "loss" in line][:steps]
    return {
        "steps": steps,
        "loss": max(abs(a["loss"] - b) for a, b in zip(ours, losses, strict=True)),
        "grad_norm": max(abs(a["grad_norm"] / b - 1) for a, b in zip(ours, norms, strict=True)),
    }


def table(found: dict[str, Any], line: str) -> str:
    """Markdown."""
    mark = min(found["kneser_ney"].values())
    rows = [(f"Kneser-Ney of five bytes, {name}", f"{bits:.4f}") for name, bits in found["kneser_ney"].items()]
    rows.append((f"LLaMA, {found['steps']} steps, {found['tokens']:,} tokens", f"{found['bits_per_byte']:.4f}"))
    verdict = "passed" if found["bits_per_byte"] < mark else "NOT passed"
    parts = [f"`{line}`", "", describe(found["machine"]), "", "| bits per byte of held-out wikitext2 lines | |"]
    parts += ["|---|---|", *(f"| {name} | {bits} |" for name, bits in rows), "", f"The mark is {verdict}."]
    parts += [f"Training took {found['step_seconds'] / 60:.1f} minutes in steps."]
    if "plain" in found:
        plain = found["plain"]
        said = f"Plain transformers, first {plain['steps']} steps: losses within {plain['loss']:.1e}"
        parts.append(f"{said}, gradient norms within {plain['grad_norm']:.1e} of theirs.")
    parts += ["", f"{found['words_known']:.0%} of the words it writes stand in the texts. It writes:", ""]
    parts += ["> " + text.replace("\n", " ") + "\n>" for text in found["samples"]]
    return "\n".join(parts) + "\n"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="A LLaMA from nothing, and a mark to pass.")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="Folder with text/ in it.")
    parser.add_argument("--out", type=Path, default=Path("runs/from-nothing"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--plain", type=int, default=10, help="Steps that a plain loop repeats.")
    options = parser.parse_args()
    options.out, options.data = options.out.resolve(), options.data.resolve()
    with user_facing():
        if not (options.data / "text" / "wikitext2_valid.txt").is_file():
            raise UserError(f"no text/wikitext2_valid.txt below {options.data}", hint="name its folder with --data")
        found = train(options)
    text = table(found, f"python -m benchmarks.from_nothing --steps {options.steps} --plain {options.plain}")
    write_json(options.out / "from-nothing.json", found)
    write_text(options.out / "from-nothing.md", text)
    print(text)


if __name__ == "__main__":
    main()
