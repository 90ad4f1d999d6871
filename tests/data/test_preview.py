"""What `llama-ft preview` writes: JSON lines alone on stdout, and pages for people with and without a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from llama_ft.data import prepare
from llama_ft.data.preview import preview, preview_recipe
from llama_ft.data.render import MASKED
from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from tests.conftest import ROOT
from tests.data.conftest import chat, write_jsonl

ROWS = [
    chat("What does a llama eat?", "Grass."),
    chat("a", ""),
    chat("b", "long " * 60),
    chat("c\x1b[2J", "It \u2028 is <|im_end|> \x07 ü 🦙.", "d", "e"),
]


@pytest.fixture
def recipe(tmp_path: Path, mini: Path, cache: Path) -> Path:
    """A recipe file over four rows, two of which are dropped."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    content: dict[str, Any] = {
        "name": "preview",
        "model": {"base": str(mini), "tokenizer": str(mini)},
        "data": [{"path": "rows.jsonl", "layout": "messages"}],
        "template": "chatml",
        "sequence": {"max_length": 100},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_json_lines(recipe: Path, mini_tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]) -> None:
    preview_recipe(str(recipe), [], limit=10, as_json=True)
    out, err = capfd.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [set(line) for line in lines] == [{"row", "input_ids", "labels", "text", "dropped"}] * 4
    assert [line["row"] for line in lines] == [0, 1, 2, 3]
    assert [line["dropped"] for line in lines] == [None, "empty answer", "longer than max_length", None]
    for line in (lines[0], lines[2], lines[3]):
        assert mini_tokenizer.decode(line["input_ids"]) == line["text"]
        assert len(line["labels"]) == len(line["input_ids"])
    said = mini_tokenizer.decode([label for label in lines[3]["labels"] if label != MASKED])
    assert said == "It \u2028 is <|im_end|> \x07 ü 🦙.<|im_end|>e<|im_end|>"
    assert lines[1]["input_ids"] == lines[1]["labels"] == [] and lines[1]["text"] == "a\n\n"
    assert "1 empty answer (row 1)" in err  # the report goes beside


def test_limit_counts_dropped_rows(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_recipe(str(recipe), [], limit=2, as_json=True)
    assert [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()] == [0, 1]
    preview_recipe(str(recipe), [], as_json=True)
    lines = capsys.readouterr().out.splitlines()  # splits at U+2028 too: every line must still be whole JSON
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 2, 3]


def test_stdout_is_clean_even_if_libraries_print(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's print, and a write straight to descriptor 1 as a C library does it."""
    build = prepare.build

    def loud(*arguments: Any) -> Any:
        print("noise")
        os.write(1, b"more noise\n")
        return build(*arguments)

    monkeypatch.setattr(prepare, "build", loud)
    print("before")
    preview_recipe(str(recipe), [], as_json=True)
    print("after")
    out, err = capfd.readouterr()
    first, *lines, last = out.splitlines()
    assert (first, last) == ("before", "after") and len(lines) == 4
    assert all(json.loads(line)["text"] for line in lines)
    assert "noise\n" in err and "more noise\n" in err


@pytest.mark.parametrize("flags", ["--json", ""])
def test_a_reader_that_has_seen_enough(recipe: Path, flags: str) -> None:
    command = f"{sys.executable} -m llama_ft.cli preview {recipe} {flags} | head -c 12"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and len(done.stdout) == 12
    assert b"Traceback" not in done.stderr and b"Broken" not in done.stderr


def test_plain_page(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_recipe(str(recipe), [])
    page = capsys.readouterr().out
    folder = recipe.parent
    assert "\x1b" not in page and "\x07" not in page
    assert re.search(rf"^row 0 of {folder}/rows.jsonl: \d+ tokens, \d+ labelled$", page, re.MULTILINE)
    assert "<|im_start|>assistant↵\n⟦Grass.<|im_end|>■⟧↵\n" in page
    assert f"row 1 of {folder}/rows.jsonl: dropped (empty answer), 0 tokens, 0 labelled" in page
    assert "c␛[2J<|im_end|>↵" in page  # a row cannot drive the terminal
    assert "⟦It \\u2028 is <|im_end|> ␇ ü 🦙.<|im_end|>■⟧" in page
    assert f"dropped from {folder}/rows.jsonl: 1 longer than max_length (row 2)" in page
    assert re.search(r"rows\s+│\s+4 │", page) and re.search(r"dropped\s+│\s+2 │", page)


def test_colours_on_a_terminal(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    preview(load_recipe(str(recipe), []), screen, limit=1)
    page = screen.getvalue()
    assert "\x1b[1;30;42m<|im_end|>\x1b[0m" in page  # the end token that carries loss
    assert re.search("\x1b\\[(1;)?32m[^\x1b]*\\.\x1b\\[0m\x1b\\[1;30;42m", page)  # a green token before it
    assert re.search("\x1b\\[(2|90)m<\\|im_start\\|>\x1b\\[0m", page)  # context is dim
    assert "⟦" not in page


def test_faults_are_reported_and_nothing_is_raised(
    recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "outside.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    preview_recipe(str(recipe), [f"template={template}"], limit=1, as_json=True)
    out, err = capfd.readouterr()
    assert len(out.splitlines()) == 1 and "preflight fault end-token-unlabelled:" in err
    assert "training will not start unless accepted by name (--allow end-token-unlabelled)" in err
    preview_recipe(str(recipe), ["sequence.max_length=8"], limit=4, as_json=True)
    out, err = capfd.readouterr()
    assert [bool(json.loads(line)["dropped"]) for line in out.splitlines()] == [True] * 4
    assert "preflight fault no-documents" in err


PAIRS = [
    {"prompt": "Which?", "chosen": "This one.", "rejected": "No idea."},
    {"prompt": "What?", "chosen": "Alike.", "rejected": " Alike. "},
]
OF_PAIRS = ["data.0.path=rows.jsonl", "data.0.layout=preference", "training.objective=dpo", "sequence.packing=true"]


@pytest.fixture
def pairs(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same recipe over two pairs, packed; the template takes the second one's white space away."""
    write_jsonl(recipe.parent / "rows.jsonl", PAIRS)
    (recipe.parent / "bare.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content | trim }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}"
    )
    monkeypatch.chdir(recipe.parent)
    return recipe


def test_a_pair_shows_what_it_shares_once(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_recipe(str(pairs), [*OF_PAIRS, "template=bare.jinja"])
    page = capsys.readouterr().out
    first = page.split("row 0 of")[1].split("row 1 of")[0]
    assert re.search(r"jsonl: \d+ tokens, \d+ of them for both answers, \d+ labelled\n", first)
    assert first.endswith(
        "\n<|im_start|>user↵\nWhich?<|im_end|><|im_start|>assistant↵\n\n"
        "chosen:\n⟦This one.<|im_end|>■⟧\nrejected:\n⟦No idea.<|im_end|>■⟧\n\n"
    )
    assert "row 1 of rows.jsonl: dropped (chosen and rejected are the same tokens)" in page


def test_a_pair_as_a_line(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preview_recipe(str(pairs), [*OF_PAIRS, "template=bare.jinja"], as_json=True)
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    worse, shared = first["rejected"], first["shared"]
    assert set(worse) == {"input_ids", "labels", "text"}
    assert first["input_ids"][:shared] == worse["input_ids"][:shared]
    assert set(first["labels"][:shared]) == set(worse["labels"][:shared]) == {MASKED}
    assert first["labels"][shared] != MASKED != worse["labels"][shared]
    assert second["dropped"] == "chosen and rejected are the same tokens"


def test_a_page_of_packed_pairs(pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = pairs.parent / "page.html"
    preview_recipe(str(pairs), [*OF_PAIRS, "template=bare.jinja"], html=page)
    html = page.read_text()
    assert "1 pair," in html and "<code>shared</code> -1, 0, 0" in html
    assert re.search(r"row 0 of rows.jsonl, rejected, positions \d+–\d+", html)
    sizes = [int(size) for size in re.findall(r"<code>cu_seqlens</code> 0, (\d+), (\d+), (\d+)", html)[0]]
    assert f">{sizes[2]}</td>" in html  # tokens of the set: what a pack holds of them
    assert "page.html is written" in capsys.readouterr().out


def test_malformed_rows_are_one_block_and_exit_2(recipe: Path) -> None:
    with (recipe.parent / "rows.jsonl").open("a") as file:
        file.write('{"messages": 3}\n')
    command = [sys.executable, "-m", "llama_ft.cli", "preview", str(recipe), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        f"  {recipe.parent}/rows.jsonl, row 4: messages: found a number (3), expected a list of messages"
    )


def test_importing_it_is_cheap() -> None:
    heavy = {"torch", "transformers", "datasets", "rich", "numpy"}
    code = f"import sys, llama_ft.data.preview; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_standard_output_without_a_file(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = io.StringIO()
    monkeypatch.setattr(sys, "stdout", page)
    preview_recipe(str(recipe), [], limit=1, as_json=True)
    assert json.loads(page.getvalue())["row"] == 0


def test_unknown_file(recipe: Path) -> None:
    with pytest.raises(UserError):
        preview_recipe(str(recipe.parent / "nothing.yaml"), [])
