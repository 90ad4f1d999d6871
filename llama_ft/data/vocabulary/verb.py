"""The signatures of `llama-ft tokenizer …`; what they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llama_ft.errors import UserError, user_facing

tokenizer = typer.Typer(help="Train a tokenizer, measure several, add tokens to a model.", no_args_is_help=True)

Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, patterns, or cards' names; text.")
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The folder to write.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Rows of each source.", show_default="all")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier one.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@tokenizer.command()
def train(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option(help="Pieces in all: control tokens, 256 bytes, learnt ones.")],
    output: Output,
    kind: Annotated[str, typer.Option(help="byte-bpe (as Llama 3), sentencepiece (as Llama 1, 2).")] = "byte-bpe",
    special: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further control token; repeat for several.")
    ] = None,
    limit: Limit = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Learn a vocabulary from text; the folder is one that model.tokenizer takes."""
    with user_facing(debug=debug):
        from llama_ft.data.vocabulary.train import print_training

        print_training(
            sources,
            output,
            vocab_size=vocab_size,
            kind=kind,
            special=special or [],
            limit=limit,
            overwrite=overwrite,
        )


@tokenizer.command()
def report(
    tokenizers: Annotated[
        list[str], typer.Argument(metavar="TOKENIZER...", help="Folders, files, hub ids, or smollm2-135m.")
    ],
    on: Annotated[list[str], typer.Option(metavar="SOURCE", help="A text, as for train; repeat for several.")],
    limit: Limit = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list on stdout; shares from 0 to 1.")] = False,
    debug: Debug = False,
) -> None:
    """Compare how tokenizers cut the same texts, by source and by language."""
    with user_facing(debug=debug):
        from llama_ft.data.vocabulary.report import print_tokenizer_report

        print_tokenizer_report(tokenizers, on, limit=limit, as_json=as_json)


@tokenizer.command()
def grow(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model's folder, hub id or smollm2-135m.")],
    output: Output,
    tokens: Annotated[
        str | None, typer.Option(metavar='FILE|"<A>,<B>"', help="Tokens by name; a file has one a line.")
    ] = None,
    other: Annotated[
        str | None, typer.Option("--from", metavar="TOKENIZER", help="Take pieces of this BPE tokenizer.")
    ] = None,
    add: Annotated[int, typer.Option(min=0, metavar="N", help="How many, in the order it learnt them.")] = 0,
    multiple: Annotated[int, typer.Option(min=1, help="Round the rows up to a multiple, as 64.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model folder of that name.")] = False,
    debug: Debug = False,
) -> None:
    """Add tokens to a model and its tokenizer; old ids keep their rows, and that is proven."""
    with user_facing(debug=debug):
        if (other is None) != (add == 0):
            raise UserError("--from and --add N go together", key="add", hint="--from TOKENIZER --add 500")
        from llama_ft.llama.grow import print_grown

        print_grown(base, output, tokens=tokens, other=other, count=add, multiple=multiple, overwrite=overwrite)
