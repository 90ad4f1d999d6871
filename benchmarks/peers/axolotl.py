"""Axolotl: why it has no row.

    python -m benchmarks.peers.axolotl SPEC.json

Axolotl 0.21.0 is a command around transformers, PEFT and TRL, whose trainers are rows of their own. Its wheel wants
torch from 2.13 on and pins 36 packages to one release each (transformers 5.20.1, trl 1.14.1, gradio, lm_eval,
mistral-common, clients of four clouds …): a machine without network that has another torch cannot be given that. On a
CPU it wants xformers, torchao and flash-linear-attention, which are there for GPUs.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from benchmarks.peers.common import Clock, Spec, main


def run(spec: Spec, clock: Clock) -> None:
    """Says why."""
    try:
        there = version("axolotl")
    except PackageNotFoundError:
        there = ""
    if there:
        raise SystemExit(f"axolotl {there} is installed, but nobody has written its harness: see this module")
    found = version("torch")
    raise SystemExit(
        f"Axolotl 0.21.0 wants torch>=2.13,<2.15 (here: {found}) and pins 36 further packages to one release each, "
        "which cannot all be had without a network"
    )


if __name__ == "__main__":
    main(run)
