"""llm-compressor's own environment: it wants another transformers than ours, so the two can never share one.

A folder of exactly the packages that pinned.txt names, filled by pip on first use. torch is not among them: it is ours,
linked beside them for each run, so that no gigabytes come twice and it is the one that was made for this machine's
GPU. A process with this environment (:func:`llama_ft.export.gguf.child.run_script`) sees nothing else of ours.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from llama_ft.errors import MachineFault
from llama_ft.export.gguf.child import ALONE, only
from llama_ft.export.toolbox import tool_folder

PACKAGE = "llmcompressor"
PINNED = Path(__file__).with_name("pinned.txt")
"""What pip resolved for llmcompressor on 2026-11-22, torch left out; the one place that says which version it is."""
_SHOWN = 600


def pins() -> dict[str, str]:
    """Name → version of every package of the environment but torch."""
    lines = PINNED.read_text(encoding="utf-8").split()
    return dict(line.split("==") for line in lines)


def version() -> str:
    """Of llm-compressor."""
    return pins()[PACKAGE]


def folder_name() -> str:
    """Other pins, and another Python, whose compiled packages these cannot be, get another folder."""
    listed = hashlib.sha256(PINNED.read_bytes()).hexdigest()[:8]
    return f"llm-compressor-{version()}-{sys.implementation.cache_tag}-{listed}"


def compressor_folder() -> Path:
    """The folder of packages, installed on first use; safe when several processes ask at once.

    Raises MachineFault when pip cannot fetch them, or when they do not start with our torch.
    """
    requirement = f"{PACKAGE}=={version()}"
    return tool_folder(
        folder_name(),
        PINNED.read_text(encoding="utf-8"),
        what=f"llm-compressor {version()} and what it needs (0.7 GB beside our torch)",
        package=requirement,
        by_hand=f"--only-binary :all: --target {{folder}} -r {PINNED}",
        unfit=_unfit,
    )


def environment(aside: Path) -> list[Path]:
    """The folders that a process of the environment imports from; links to our torch are made in `aside`."""
    links = aside / "torch"
    if not links.is_dir():
        link_torch(links)
    return [compressor_folder(), links]


def link_torch(links: Path) -> None:
    """Makes a folder of links to what torch and its own needs (CUDA's libraries, triton) have installed here.

    What pinned.txt brings itself is left out. MachineFault when torch was not installed as a package.
    """
    links.mkdir(parents=True)
    known = {_plain(name) for name in pins()}
    for found in _with_needs("torch", known):
        for file in found.files or []:
            top = file.parts[0]
            # Scripts lie outside (..); a folder of several packages, such as nvidia/, is linked once.
            if top not in {"..", "__pycache__"} and not (links / top).is_symlink():
                (links / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    if not (links / "torch").exists():
        hint = "install it by pip: python -m pip install --force-reinstall --no-deps torch==VERSION"
        raise MachineFault("torch's own list of files names no folder torch", hint=hint)


def _with_needs(name: str, known: set[str]) -> Iterator[Distribution]:
    """An installed package and all that it needs, those known elsewhere apart."""
    waiting, done = [(name, "")], set()
    while waiting:
        wanted, extra = waiting.pop()
        if wanted in known or (wanted, extra) in done:
            continue
        done.add((wanted, extra))
        try:
            found = distribution(wanted)
        except PackageNotFoundError:
            continue  # torch itself says whether it can do without
        if not extra:
            yield found
        for line in found.requires or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(_plain(need.name), more) for more in ("", *need.extras)]


def _plain(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _unfit(folder: Path) -> str | None:
    """Why a filled folder is of no use: what its packages say when they start with our torch."""
    code = "import llmcompressor, compressed_tensors, transformers, torch; print(torch.__version__)"
    with tempfile.TemporaryDirectory() as aside:
        link_torch(Path(aside, "torch"))
        surroundings = only([folder, Path(aside, "torch")])
        done = subprocess.run(
            [*ALONE, "-c", code], check=False, capture_output=True, text=True, env=surroundings, cwd=aside
        )
    if done.returncode:
        return "it does not start: " + " / ".join(done.stderr.strip().splitlines()[-2:])[-_SHOWN:]
    return None
