"""The wheels that a machine without a network lacks for `benchmarks.gpu_run`, in folders that can be carried there.

    python -m benchmarks.wheels FOLDER --limit-mib 48
    python -m pip install --no-index --no-deps --target SITE FOLDER/base/*.whl       # there, once for each folder

What is there already is listed in `--there FILE` (lines as of `pip freeze`); built in is a machine with CUDA 13.0,
torch 2.11, transformers 5.17 and the usual scientific packages. Every root of `CONTENDERS` is downloaded, its needs are
read from its metadata, and what is missing follows. `base` is for all; a contender whose needs contradict those of the
others has a folder of its own, which stands alone beside what the machine has. Parts that no run here touches are left
out of a wheel (`SLIM`), its RECORD is written anew. What is not carried, and why, is printed.
"""

from __future__ import annotations

import argparse
import fnmatch
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

PYTHON, MIB = "3.12", 2**20
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in (34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64")
CONTENDERS: dict[str, tuple[str, ...]] = {
    # Ours by its own direct needs: those of the command line's screens and of serving are not imported in training.
    "base": (
        *("transformers==5.23.0", "peft==0.21.2", "trl==1.16.0", "datasets==5.2.0", "bitsandbytes==0.50.2"),
        *("liger-kernel==0.8.5", "pydantic>=2.11,<3", "gguf==0.19.0", "prompt-toolkit>=3.0.50", "xxhash>=3.5"),
    ),
    # The newest that Unsloth 2026.10.9 allows; transformers 5.17.0 is there.
    "unsloth": (
        *("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5"),
        *("peft==0.21.2", "bitsandbytes==0.50.2"),
    ),
    "torchtune": ("torchtune==0.6.1", "torchao==0.18.0"),
}
SKIPPED = {
    "xformers": "0.0.35 is built for torch 2.10; Unsloth then takes torch's own attention",
    "diffusers": "for images",
    "hf-transfer": "for downloads",
    "kagglehub": "for downloads",
    "json5": "for Unsloth's application",
    "structlog": "for Unsloth's application",
    "nest-asyncio": "for Unsloth's application",
    "axolotl": "wants torch>=2.13 and 36 packages of one release each",
    "certifi": "for downloads",
    "wheel": "for building",
}
SLIM = {
    "bitsandbytes": ("*_cuda1[12]?.so", "*_rocm*.so", "*_xpu*.so", "*_hpu*"),
    "unsloth": ("studio/*",),
}
THERE = """
torch==2.11.0 torchvision==0.26.0 transformers==5.17.0 tokenizers==0.23.2 accelerate==1.15.0
huggingface-hub==1.33.0 triton==3.6.0 safetensors==0.8.0 sentencepiece==0.2.2 tiktoken==0.14.0 numpy==2.5.2
pyarrow pandas psutil pyyaml regex requests tqdm packaging filelock fsspec httpx jinja2 rich typer click
protobuf matplotlib tensorboard einops scipy pillow typing-extensions xxhash certifi aiohttp networkx sympy
setuptools urllib3 wheel lxml pytest markdown-it-py pygments
"""


@dataclass
class Folder:
    """Wheels of one folder by name, who asked for each, and what is left out."""

    wheels: dict[str, Path] = field(default_factory=dict)
    asked: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def needs(wheel: Path) -> list[Requirement]:
    """What a wheel's metadata asks for on that machine, without extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1]
        lines = archive.read(name).decode(errors="replace").splitlines()
    machine = {"python_version": PYTHON, "python_full_version": f"{PYTHON}.3", "sys_platform": "linux", "extra": ""}
    machine |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    found = [Requirement(line.partition(":")[2].strip()) for line in lines if line.startswith("Requires-Dist:")]
    return [one for one in found if one.marker is None or one.marker.evaluate(machine)]


def is_there(need: Requirement, there: Mapping[str, str]) -> bool:
    """Whether the machine has it, in a version that will do; a version that nobody knows will do."""
    name = canonicalize_name(need.name)
    if name not in there:
        return False
    return not there[name] or need.specifier.contains(there[name], prereleases=True)


def collect(roots: tuple[str, ...], there: Mapping[str, str], fetch: Callable[[str], Path]) -> Folder:
    """The roots and all they need that is not there. `fetch` brings the wheel of a requirement."""
    found, open_ = Folder(), [(Requirement(root), "asked for") for root in roots]
    while open_:
        need, asker = open_.pop(0)
        name = canonicalize_name(need.name)
        if name in SKIPPED:
            found.missing.setdefault(name, SKIPPED[name])
        elif name in found.wheels:
            has = parse_wheel_filename(found.wheels[name].name)[1]
            if not need.specifier.contains(has, prereleases=True):
                found.missing[f"{name}{need.specifier}"] = f"{asker} asks for it, {has} is carried"
        elif not is_there(need, there):
            try:
                wheel = fetch(f"{need.name}{need.specifier}")
            except FileNotFoundError as error:
                found.missing[name] = f"{asker} asks for it: {error}"
                continue
            found.wheels[name], found.asked[name] = wheel, asker
            open_ += [(one, name) for one in needs(wheel)]
    return found


def slim(wheel: Path, patterns: tuple[str, ...]) -> int:
    """Leaves files of these patterns out of a wheel and out of its RECORD, in place; bytes saved."""
    before, packed = wheel.stat().st_size, io.BytesIO()
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as made:
        for entry in archive.infolist():
            if any(fnmatch.fnmatch(entry.filename, pattern) for pattern in patterns):
                continue
            content = archive.read(entry)
            if entry.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines()
                kept = [n for n in lines if not any(fnmatch.fnmatch(n.split(",")[0], p) for p in patterns)]
                content = ("\n".join(kept) + "\n").encode()
            made.writestr(entry, content, zipfile.ZIP_DEFLATED)
    wheel.write_bytes(packed.getvalue())
    return before - wheel.stat().st_size


def split(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in as few groups as the largest-first rule finds, none above `limit`. ValueError where one alone is."""
    groups: list[tuple[int, list[str]]] = []
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        if size > limit:
            raise ValueError(f"{name} has {size / MIB:.1f} MiB, the limit is {limit / MIB:.1f}")
        for number, (held, names) in enumerate(groups):
            if held + size <= limit:
                groups[number] = (held + size, [*names, name])
                break
        else:
            groups.append((size, [name]))
    return [sorted(names) for _, names in groups]


def fetcher(folder: Path) -> Callable[[str], Path]:
    """Downloads the one wheel of a requirement by pip. FileNotFoundError where it has none for that machine."""
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(need: str) -> Path:
        held = folder / "one"
        held.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(held)]
        command += ["--python-version", PYTHON, "--implementation", "cp", need]
        command += [part for platform in PLATFORMS for part in ("--platform", platform)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(held.glob("*.whl"))
        if done.returncode or not wheels:
            raise FileNotFoundError((done.stderr.strip().splitlines() or ["no wheel"])[-1])
        return wheels[0].rename(folder / wheels[0].name)

    return fetch


def read_there(lines: list[str]) -> dict[str, str]:
    """Names and versions of `pip freeze`'s lines; a bare name has the version ""."""
    pairs = (line.strip().partition("==") for line in lines if line.strip() and not line.startswith("#"))
    return {canonicalize_name(name): str(Version(found)) if found else "" for name, _, found in pairs}


def main(arguments: list[str] | None = None) -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="benchmarks.wheels")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contenders", default="base,unsloth", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--limit-mib", type=float, default=64, help="of one folder")
    parser.add_argument("--there", type=Path, help="what the machine has, as pip freeze says it")
    options = parser.parse_args(arguments)
    there = read_there(options.there.read_text().splitlines() if options.there else THERE.split())
    report: dict[str, dict[str, object]] = {}
    for contender in options.contenders.split(","):
        place = options.folder / contender
        found = collect(CONTENDERS[contender], there, fetcher(place))
        (place / "one").rmdir()
        for name, patterns in SLIM.items():
            if name in found.wheels:
                slim(found.wheels[name], patterns)
        sizes = {wheel.name: wheel.stat().st_size for wheel in found.wheels.values()}
        groups = split(sizes, int(options.limit_mib * MIB))
        for number, names in enumerate(groups[1:], 2):  # the first stays where it is
            other = options.folder / f"{contender}-{number}"
            other.mkdir(exist_ok=True)
            for name in names:
                (place / name).rename(other / name)
        print(f"{contender}: {len(sizes)} wheels, {sum(sizes.values()) / MIB:.1f} MiB, {len(groups)} folder(s)")
        for name, wheel in sorted(found.wheels.items()):
            print(f"  {sizes[wheel.name] / MIB:6.2f} MiB  {wheel.name}  for {found.asked[name]}")
        for name, why in sorted(found.missing.items()):
            print(f"  not carried: {name}: {why}")
        report[contender] = {"wheels": sizes, "missing": found.missing}
    (options.folder / "wheels.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
