"""Every method, optimizer and schedule on the same 200 real rows: `python -m benchmarks.methods --data alpaca.json`.

Each run goes through `llama-ft train`, with the export and its proof. Prints a Markdown table: held-out loss before and
after, weights trained, the proof. A run that does not learn, or fails its proof, ends the benchmark with status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS: dict[str, list[str]] = {
    "LoRA": [],
    "LoRA, attention": ["adapter.targets=attention"],
    "LoRA, two projections": ["adapter.targets=[q_proj, v_proj]"],
    "LoRA, a regex": [r"adapter.targets=.*layers\.[1-9]\d*\.mlp\..*"],
    "LoRA, dropout 0.1": ["adapter.dropout=0.1"],
    "rsLoRA": ["adapter.rslora=true"],
    "DoRA": ["adapter.dora=true"],
    "LoRA+": ["adapter.lora_plus=16", "training.learning_rate=1e-4"],
    "LoRA and norms": ["adapter.modules_to_save=[norms]"],
    "LoRA and embedding": ["adapter.modules_to_save=[embed_tokens]"],
    "LoRA, new tokens": ["model.tokenizer={tokenizer}"],
    "LoRA, NEFTune": ["training.neftune_alpha=5"],
    "QLoRA": ["adapter.method=qlora"],
    "QLoRA, plain scales": ["adapter.method=qlora", "adapter.double_quant=false"],
    "QLoRA, dropout 0.1": ["adapter.method=qlora", "adapter.dropout=0.1"],
    "QLoRA, DoRA": ["adapter.method=qlora", "adapter.dora=true"],
    "QLoRA, new tokens": ["adapter.method=qlora", "model.tokenizer={tokenizer}"],
    "8-bit LoRA": ["adapter.method=qlora", "adapter.bits=8"],
    "full": ["adapter.method=full", "training.learning_rate=5e-5"],
    "full, frozen embedding": ["adapter.method=full", "adapter.freeze=[embed_tokens]", "training.learning_rate=5e-5"],
    "full, new tokens": ["adapter.method=full", "model.tokenizer={tokenizer}", "training.learning_rate=5e-5"],
    "AdamW, 8-bit states": ["training.optimizer=adamw_8bit"],
    "AdamW, paged": ["training.optimizer=paged_adamw"],
    "AdamW, 8-bit paged": ["training.optimizer=paged_adamw_8bit"],
    "Adafactor": ["training.optimizer=adafactor"],
    "Muon": ["training.optimizer=muon"],
    "full, Muon": ["adapter.method=full", "training.optimizer=muon", "training.learning_rate=5e-5"],
    "linear": ["training.schedule=linear"],
    "constant": ["training.schedule=constant"],
    "WSD": ["training.schedule=wsd", "training.decay=0.3"],
    "cosine to 10 %": ["training.final_rate=0.1"],
    "accumulated, padded, checkpointed": [
        "training.micro_batch=4",
        "sequence.packing=false",
        "training.gradient_checkpointing=true",
    ],
}
"""What each run changes; `{tokenizer}` is a folder with the base's tokenizer and two tokens more."""
NEW_TOKENS = ("<|note|>", "<|source|>")


def settings(name: str, tokenizer: Path) -> list[str]:
    """The overrides of a method."""
    return [change.replace("{tokenizer}", str(tokenizer)) for change in METHODS[name]]


def write_tokenizer(base: Path, folder: Path) -> Path:
    """The base's tokenizer with NEW_TOKENS, saved into `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    tokenizer.add_tokens([*NEW_TOKENS])
    tokenizer.save_pretrained(folder)
    return folder


def held_out(run: Path) -> list[float]:
    """Held-out losses of metrics.jsonl, in nats per labelled token."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [record["eval_loss"] for record in records if "eval_loss" in record]


def main() -> None:
    """Runs all methods, or those that are named, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, type=Path, help="rows in Alpaca's layout, such as alpaca_data.json")
    parser.add_argument("--base", default="smollm2-135m", help="base model")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    arguments = parser.parse_args()
    from llama_ft.llama.base import locate_base

    failed = []
    print(
        "| method | overrides | trained weights | held-out loss | seconds | proof |\n|---|---|---|---|---|---|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_tokenizer(locate_base(arguments.base, None), Path(folder, "tokenizer"))
        for name in arguments.only:
            run = Path(folder, "run")
            line = [
                *[sys.executable, "-m", "llama_ft.cli", "train", "alpaca/smollm2-135m-lora", "--overwrite"],
                f"model.base={arguments.base}",
                f"data.0.path={arguments.data}",
                f"data.0.limit={arguments.rows}",
                "eval_data.holdout=0.1",
                "training.epochs=1",
                "training.global_batch=16",
                "training.eval_every=1000",
                f"output_dir={run}",
                *settings(name, tokenizer),
            ]
            began = time.perf_counter()
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - began
            if done.returncode:
                failed.append(name)
                print(f"| {name} | failed: {done.stderr.strip().splitlines()[-1]} | | | | |", flush=True)
                continue
            losses = held_out(run)
            trained = next(part for part in done.stdout.split(", ") if "weights trained" in part).split(" of ")[0]
            proof = json.loads((run / "export.json").read_text(encoding="utf-8"))["ok"]
            shown = " ".join(f"`{change}`" for change in METHODS[name]) or "–"
            print(
                f"| {name} | {shown} | {trained} | {losses[0]:.3f} → {losses[-1]:.3f} | {seconds:.0f} | "
                f"{'passed' if proof else 'FAILED'} |",
                flush=True,
            )
            if not proof or losses[-1] >= losses[0]:
                failed.append(name)
    if failed:
        raise SystemExit(f"did not learn, or was not proven: {', '.join(failed)}")


if __name__ == "__main__":
    main()
