"""`accelerate launch … -m llama_ft.train RECIPE [key=value…] [--resume] [--overwrite] [--allow NAME] [--debug]`"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

from llama_ft.errors import user_facing
from llama_ft.imports import for_good, leave_out
from llama_ft.train.launch import report_status

BITSANDBYTES = "bitsandbytes"
"""PEFT imports it wherever it is installed, and it torch's compiler: a second, for runs that quantise something."""


def main() -> None:
    """Trains one recipe in this process; the launcher decides how many such processes there are."""
    parser = argparse.ArgumentParser(prog="llama_ft.train", description="Train a recipe, merge it and prove the merge.")
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. training.learning_rate=1e-4")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a run in the same folder")
    parser.add_argument("--allow", action="append", default=[], metavar="NAME", help="accept a preflight fault by name")
    parser.add_argument(
        "--compute-dtype", choices=["float32", "bfloat16", "float16"], help="hold weights in it, as an earlier run did"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_intermixed_args()
    # The libraries' deprecation notes are for us, not for the user; faults of ours are errors, not warnings.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if os.environ.get("WORLD_SIZE", "1") != "1" and not arguments.debug:
        # torch's C++ tells every broken connection with its addresses of machine code; ours is told once, in words.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    try:
        with user_facing(debug=arguments.debug):
            from llama_ft.recipe import load_recipe

            recipe = load_recipe(arguments.recipe, arguments.overrides)
            from llama_ft.train.lock import used_besides

            if BITSANDBYTES not in used_besides(recipe, ""):
                leave_out(BITSANDBYTES)
            with for_good():
                from llama_ft.train.run import train_recipe

            train_recipe(
                recipe,
                resume=arguments.resume,
                overwrite=arguments.overwrite,
                allow=arguments.allow,
                compute_dtype=arguments.compute_dtype,
            )
    except SystemExit as stop:
        report_status(stop.code if isinstance(stop.code, int) else 1)
        raise
    except KeyboardInterrupt:  # before the run answers Ctrl-C itself
        if arguments.debug:
            raise
        report_status(130)
        raise SystemExit(130) from None
    finally:
        leave_group()


def leave_group() -> None:
    """Ends this process's part in a group of several: threads of its that outlive the interpreter would abort it."""
    group = sys.modules.get("torch.distributed")  # a mistake in the recipe ends before torch is there
    if group is not None and group.is_available() and group.is_initialized():
        group.destroy_process_group()


if __name__ == "__main__":
    main()
