"""How long TRL's SFTTrainer takes from rows of text to ids and labels.

    python -m benchmarks.peers.trl_prepare MODEL ROWS.jsonl PROCESSES

ROWS: prompt and completion, as its documentation shows for loss on answers alone. Only its own preparation is timed;
the model beside it is a tiny one. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer


class Timed(SFTTrainer):
    """SFTTrainer with a watch around its preparation."""

    seconds = 0.0

    def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        found = super()._prepare_dataset(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return found


def main() -> None:
    """See the module's docstring."""
    base, rows, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with Path(rows).open(encoding="utf-8") as file:
        dataset = Dataset.from_list([json.loads(line) for line in file])
    tokenizer = AutoTokenizer.from_pretrained(base)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_length=512, dataset_num_proc=processes, bf16=False, use_cpu=True, report_to=[]
        )
        trainer = Timed(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)),
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
    documents: Any = trainer.train_dataset
    print(json.dumps({"documents": len(documents), "seconds": trainer.seconds}))


if __name__ == "__main__":
    main()
