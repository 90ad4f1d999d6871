"""Our own training command, timed as its peers are.

    accelerate launch --quiet --config_file CONFIG -m benchmarks.peers.ours SPEC.json

It is `python -m llama_ft.train RECIPE key=value … --overwrite` with the clock around the trainer: the recipe is read,
data prepared, guards asked, the adapter saved as in every run. What a user would type is in the spec.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.common import Clock, Spec, main, timed


def run(spec: Spec, clock: Clock) -> None:
    """Trains the spec's recipe."""
    import llama_ft.train.run as training
    from llama_ft.recipe import load_recipe

    training.LlamaTrainer = timed(training.LlamaTrainer, clock)  # type: ignore[misc]
    recipe = load_recipe(spec.recipe, [*spec.overrides, f"output_dir={Path(spec.out).with_suffix('')}"])
    # The type is given, not chosen for this machine: contenders of one table compute in the same.
    training.train_recipe(recipe, overwrite=True, compute_dtype=spec.dtype)


if __name__ == "__main__":
    main(run)
