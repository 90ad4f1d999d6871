"""A virtual environment for each contender, by exact pins, made once and kept.

Their pins conflict (transformers, torchao), and none of them may change what another one measures. The folder's name
holds a digest of the pins and of Python's version: a changed file makes a new environment, an old one is never mended.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from filelock import FileLock

from llama_ft.paths import cache_dir

PINS = Path(__file__).parent / "peers" / "pins"


class NoEnvironment(RuntimeError):
    """A contender whose packages could not be installed; says what pip said."""


def python_of(pins: str) -> Path:
    """The interpreter of the environment with the packages of `peers/pins/NAME.txt`; makes it if there is none.

    NoEnvironment where pip fails, with its last words.
    """
    file = PINS / f"{pins}.txt"
    text = file.read_text(encoding="utf-8")
    digest = hashlib.sha256(f"{sys.version_info[:3]}\n{text}".encode()).hexdigest()[:12]
    folder = cache_dir("peers") / f"{pins}-{digest}"
    python = folder / "bin" / "python"
    with FileLock(folder.with_suffix(".lock")):
        if (folder / "complete").exists():
            return python
        shutil.rmtree(folder, ignore_errors=True)
        print(f"making an environment for {pins}: a few minutes, once", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(file)]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise NoEnvironment(f"pip could not install {file.name}: {last}")
        (folder / "complete").touch()
    return python
