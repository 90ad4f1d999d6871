"""The code in an answer: what stands between its fences, and the tests that a row brings."""

from __future__ import annotations

import textwrap
import warnings


def code_in(answer: str) -> str:
    """The last fenced block of an answer, or all of it where there is none; a fence that is left open ends with it."""
    blocks = blocks_in(answer)
    return blocks[-1] if blocks else answer


def blocks_in(answer: str) -> list[str]:
    """The fenced blocks of an answer, in order, the last one perhaps left open.

    A fence is a line of three or more ``` or ~~~, as in CommonMark; a block's common margin is taken off.
    """
    return [textwrap.dedent("\n".join(block)) for block in _parts(answer)[1:]]


def before_fences(answer: str) -> str:
    """What stands before the first fence of an answer; all of one without a fence."""
    return "\n".join(_parts(answer)[0])


def _parts(answer: str) -> list[list[str]]:
    """The lines before the first fence, then those of each block."""
    blocks: list[list[str]] = [[]]
    fence = ""
    for line in answer.split("\n"):  # and at nothing else that may stand in a string
        bare = line.strip()
        marker = bare[: len(bare) - len(bare.lstrip(bare[0]))] if bare[:3] in ("```", "~~~") else ""
        if not fence and marker and "`" not in bare[len(marker) :]:
            fence = marker
            blocks.append([])
        elif fence and bare == marker and marker.startswith(fence):
            fence = ""
        elif fence or len(blocks) == 1:
            blocks[-1].append(line)
    return blocks


def tests_in(reference: str) -> str:
    """The tests of a row: its own answer, or the fenced block in it. ValueError says why they are no Python."""
    tests = code_in(reference)
    if not tests.strip():
        raise ValueError("it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's strings
            compile(tests, "<tests>", "exec", dont_inherit=True)
    except SyntaxError as error:
        raise ValueError(f"{error.msg} (line {error.lineno})") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"Python cannot read it ({type(error).__name__})") from error
    return tests
