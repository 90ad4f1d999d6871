"""The house keeps its shape: folders import only from those above, rooms stay small, nothing shadows a library."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "llama_ft"
ORDER = [
    *("recipe", "tokenizer", "llama", "data", "adapters", "plan", "sandbox", "launch", "export", "train", "serve"),
    "evaluate",
]
BELOW_ALL = {"errors", "files", "imports", "paths", "sizes"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """First names below llama_ft that a module imports anywhere, lazily too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            names = [node.module]
            if node.module == "llama_ft":
                names = [f"llama_ft.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("llama_ft.")}
    return found


@pytest.mark.parametrize("folder", ORDER)
def test_folders_import_only_from_those_above(folder):
    allowed = {*ORDER[: ORDER.index(folder) + 1], *BELOW_ALL, "__version__"}
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        extra = imports_of(path) - allowed
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}, which stand below {folder}"


def test_foundations_import_nothing_of_the_house():
    for name in BELOW_ALL:
        assert imports_of(PACKAGE / f"{name}.py") <= BELOW_ALL


def test_every_folder_is_in_the_drawing():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= set(ORDER)
    drawing = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for folder in folders:
        assert f"{folder}/" in drawing, f"docs/architecture.md does not draw {folder}/"


def test_rooms_are_small():
    large = {str(path): len(path.read_text().splitlines()) for path in modules()}
    assert not {path: lines for path, lines in large.items() if lines > 330}


def test_datasets_does_not_shadow_the_library():
    assert not list((ROOT / "datasets").rglob("*.py"))


def test_nothing_names_this_machine():
    """No absolute path of a developer's machine in what is shipped."""
    for folder in ("llama_ft", "recipes", "datasets", "accelerate_configs", "docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".md", ".jsonl", ".jinja", ".json"}:
                text = path.read_text(encoding="utf-8")
                for prefix in ("/ro" + "ot/", "/wo" + "rk/", "/ho" + "me/", "/tm" + "p/w"):
                    assert prefix not in text, f"{path} holds {prefix}"


@pytest.mark.alone
@pytest.mark.parametrize(
    ("arguments", "limit"), [(["--help"], 0.5), (["validate", "quickstart"], 1.5)], ids=["help", "validate"]
)
def test_start_up_is_quick_and_without_torch(arguments, limit):
    """The best of three: a loaded machine slows single runs."""
    code = (
        "import sys; from llama_ft.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert best < limit
