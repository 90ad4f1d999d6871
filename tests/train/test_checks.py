"""What is checked before a run starts does not depend on how many processes look at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe.run import Run
from llama_ft.train.checks import check_same_everywhere, check_writable, differing_parts


def test_many_processes_look_whether_the_folder_can_be_written_to(tmp_path: Path) -> None:
    """With one probe file for all, the second to remove it found it gone and refused the run."""
    run = Run(tmp_path / "run")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: check_writable(run), range(800)))
    assert list(run.path.iterdir()) == []


def test_a_process_that_reads_other_rows_is_named():
    same = {"data": {"/here/rows.jsonl": "a1"}, "template": "t", "tokenizer": "k"}
    moved = same | {"data": {"/there/rows.jsonl": "a1"}}
    check_same_everywhere([same, moved, same])
    with pytest.raises(UserError) as error:
        check_same_everywhere([same, same | {"data": {"/here/rows.jsonl": "b2"}}, moved | {"template": "u"}])
    assert [(one.where, one.what.partition(" differ")[0]) for one in error.value.problems] == [
        ("rank 1", "the rows"),
        ("rank 2", "the template"),
    ]


def test_a_process_whose_sources_are_swapped_is_named():
    """A resumed run may find a file under another name; processes of one step may not have another order."""
    first = {"data": {"/a.jsonl": "a1", "/b.jsonl": "b1"}, "template": "t", "tokenizer": "k"}
    swapped = first | {"data": {"/a.jsonl": "b1", "/b.jsonl": "a1"}}
    assert differing_parts(first, swapped) == []
    with pytest.raises(UserError, match="the rows differ from those of rank 0"):
        check_same_everywhere([first, swapped])
