"""The signature of `llama-ft export`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import Problem, UserError, user_facing
from llama_ft.imports import for_good

TYPES = ("float32", "bfloat16", "float16")


def export(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN[=WEIGHT]...", help="A run folder; several are combined into one.")
    ],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.", show_default="the recipe's")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest weight file, as 5GB or 500MB.")] = "5GB",
    low_memory: Annotated[
        bool | None,
        typer.Option(
            "--low-memory/--whole-models", help="Prove reading weights from disk.", show_default="where memory is short"
        ),
    ] = None,
    gguf: Annotated[
        list[str] | None, typer.Option(help="Also f16, q8_0, q6_k, q5_k_m, q4_k_m; repeat for several.")
    ] = None,
    compressed: Annotated[
        list[str] | None,
        typer.Option(help="Also w8a8, fp8, awq, gptq for vLLM, by llm-compressor; repeat for several."),
    ] = None,
    nf4: Annotated[bool, typer.Option("--nf4", help="Also a 4-bit checkpoint for transformers.")] = False,
    out: Annotated[Path | None, typer.Option(help="Of several runs: the new run's folder.")] = None,
    how: Annotated[
        str, typer.Option(help="How adapters are combined: cat, svd, linear, ties, dare_linear, dare_ties.")
    ] = "cat",
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(help="Of what dare drops.")] = 42,
    push: Annotated[str | None, typer.Option(metavar="OWNER/NAME", help="Upload it to the hub.")] = None,
    public: Annotated[bool, typer.Option("--public", help="A new repository is open to all.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Merge a run's adapter into its base and prove the result equal to what was trained."""
    with user_facing(debug=debug):
        with for_good():
            from llama_ft.export.combine import combine_runs, parse_parts
            from llama_ft.export.compressed.types import check_types as check_compressed_types
            from llama_ft.export.gguf.formats import check_types
            from llama_ft.export.gguf.tools import check_quantiser
            from llama_ft.export.run import export_run
            from llama_ft.recipe.run import Run
            from llama_ft.sizes import parse_size

        parts = parse_parts(runs)
        shard_bytes = parse_size(shard_size, "--shard-size")
        _check(len(parts), dtype, shard_bytes, out, density, how)
        types = list(gguf or [])
        check_quantiser(check_types(types))
        kinds = check_compressed_types(compressed or [])
        if push is not None:
            from llama_ft.export.push import check_place, push_run

            check_place(push)
        if len(parts) > 1:
            assert out is not None
            run = combine_runs(parts, out, how=how, density=density, seed=seed)
        else:
            run = Run.open(parts[0][0])
        if nf4:
            from llama_ft.export.nf4 import check_nf4

            check_nf4(run)
        if kinds:
            from llama_ft.export.compressed.write import check_compressed, write_compressed

            check_compressed(run, kinds)
        export_run(run, dtype=dtype, shard_bytes=shard_bytes, low_memory=low_memory)
        if types := [*dict.fromkeys([*run.recipe.export.gguf, *types])]:
            from llama_ft.export.gguf.write import write_ggufs

            write_ggufs(run, types)
        if kinds:
            write_compressed(run, [kind.name for kind in kinds], low_memory=low_memory)
        if nf4:
            from llama_ft.export.nf4 import write_nf4

            proof = write_nf4(run)
            kl, size = proof["measured"]["mean_kl"], proof["bytes"] / 2**20
            print(f"proof passed: nf4 ({size:.0f} MiB) against merged, mean KL {kl:.3g} nats")
        if push is not None:
            print(f"pushed: {push_run(run, push, private=not public)}")


def _check(count: int, dtype: str | None, shard_bytes: int, out: Path | None, density: float | None, how: str) -> None:
    """What the options say together; all mistakes at once."""
    problems = []
    if dtype is not None and dtype not in TYPES:
        problems.append(Problem(f"--dtype is one of {', '.join(TYPES)}, not {dtype}"))
    if shard_bytes < 2**20:
        problems.append(Problem("--shard-size below 1 MB would give thousands of files", hint="--shard-size 5GB"))
    if count > 1 and out is None:
        problems.append(Problem("several adapters become a new run, which needs a folder", hint="--out runs/NAME"))
    if count == 1 and (out is not None or density is not None or how != "cat"):
        problems.append(Problem("--out, --how and --density are for several runs", hint="RUN=0.5 RUN=0.5 --out FOLDER"))
    if problems:
        raise UserError(problems)
