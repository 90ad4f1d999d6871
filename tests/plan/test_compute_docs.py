"""The section of docs/plan.md on models from nothing: what the commands print, and each number from its formula."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_ft.llama.shapes import PRESETS
from llama_ft.plan.compute_table import EXAMPLES, documented

DOCS = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
pytestmark = pytest.mark.skipif(not DOCS.is_file(), reason="the documentation is not shipped with the package")
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6}
FITS = {
    "Chinchilla": (1.6934, 406.40, 410.72, 0.33917, 0.28491),
    "replicated": (1.8172, 482.01, 2085.43, 0.3478, 0.3658),
}
CLOSE = 6e-3
"""Three digits are printed of each number."""


def printed() -> str:
    text = DOCS.read_text(encoding="utf-8")
    return text.split("<!-- compute: begin -->\n")[1].split("<!-- compute: end -->")[0]


def value(text: str) -> float:
    """`7.38T`, `1,091,107`, `58.9`."""
    text = text.replace(",", "")
    return float(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else float(text)


def loss(fit: str, parameters: float, tokens: float) -> float:
    e, a, b, alpha, beta = FITS[fit]
    return e + a / parameters**alpha + b / tokens**beta


def rows(block: str) -> list[list[str]]:
    """Lines of models: name, parameters, tokens, ratio, FLOP, two losses, hours …"""
    return table(block, "model  ")


def table(block: str, head: str, number: int = 0) -> list[list[str]]:
    """The cells below the given line that begins so, up to an empty one."""
    lines = block.splitlines()
    starts = [at for at, line in enumerate(lines) if line.startswith(head)]
    rest = lines[starts[number] + 1 :]
    return [re.split(r"  +", line) for line in rest[: rest.index("") if "" in rest else None]]


def blocks() -> dict[str, str]:
    found = re.findall(r"```text\n\$ llama-ft plan (.*?)\n(.*?)```", printed(), re.S)
    return dict(found)


def test_the_page_is_what_the_commands_print() -> None:
    """If this fails: paste the output of `python -m llama_ft.plan.compute_table` between the two marks."""
    assert printed() == documented()
    assert tuple(blocks()) == EXAMPLES


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_number_of_a_model_follows_from_its_formula(example: str) -> None:
    block = blocks()[example]
    rate = 989.4e12 * 0.4 if "H100" in example else 312e12 * 0.47
    served = 2e12 if "--served" in example else None
    found = rows(block)
    assert len(found) >= 3
    for law, *cells in found:
        n, d, ratio, flops = (value(cell) for cell in cells[:4])
        assert flops == pytest.approx(6 * n * d, rel=2 * CLOSE), law
        assert ratio == pytest.approx(d / n, rel=2 * CLOSE), law
        for fit, cell in zip(FITS, cells[4:6], strict=True):
            assert value(cell) == pytest.approx(loss(fit, n, d), abs=2e-3), law
        hours = value(cells[6])
        assert hours == pytest.approx(flops / rate / 3600, rel=CLOSE), law
        assert value(cells[8]) == -(-hours // 720), law
        if served:
            assert value(cells[9]) == pytest.approx(6 * n * d + 2 * n * served, rel=2 * CLOSE), law
    by_law = {law: cells for law, *cells in found}
    first = by_law.get("as asked")
    for fit, (_, a, b, alpha, beta) in FITS.items():
        n, d = (value(cell) for cell in by_law[fit][:2])
        assert alpha * a / n**alpha == pytest.approx(beta * b / d**beta, rel=CLOSE), "the optimum"
        if served:
            start = value((first or by_law[fit])[9])
            small = by_law[f"{fit}, served"]
            saved = float(small[10].rstrip("%")) / 100
            assert saved == pytest.approx(1 - value(small[9]) / start, abs=CLOSE)
            n, d = (value(cell) for cell in small[:2])
            pays = 3 * d * (alpha * a / n**alpha / (beta * b / d**beta) - 1)
            assert pays == pytest.approx(served, rel=0.05), "the cheapest"


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_number_of_a_shape_follows_from_its_sizes(example: str) -> None:
    wanted = {law: value(cells[0]) for law, *cells in rows(blocks()[example])}
    shapes = table(blocks()[example], "model  ", 1)
    assert [law for law, *_ in shapes] == list(wanted)
    for law, *cells in shapes:
        width, layers, heads, inner, total = (value(cell) for cell in cells[:5])
        per_block = 4 * width**2 + 3 * width * inner
        parameters = layers * (per_block + 2 * width) + 2 * 32_000 * width + width
        assert total == pytest.approx(parameters, rel=CLOSE) and total == pytest.approx(wanted[law], rel=0.05), law
        exact = 6 * layers * per_block + 6 * 32_000 * width + 3.5 * 2 * layers * width * 2048
        assert float(cells[5]) == pytest.approx(exact / 6 / parameters, abs=6e-4), law
        assert width / heads in (64, 128), law


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_number_of_a_preset_follows_from_its_shape(example: str) -> None:
    rate = 989.4e12 * 0.4 if "H100" in example else 312e12 * 0.47
    target = {law: value(cells[5]) for law, *cells in rows(blocks()[example])}
    presets = table(blocks()[example], "preset  ")
    assert len(presets) == 5
    for name, layers, width, size, tokens, *cells in presets:
        shape = PRESETS[name]
        assert (shape.layers, shape.hidden) == (int(layers), value(width)), name
        n = float(shape.parameters)
        assert value(size) == pytest.approx(n, rel=CLOSE), name
        if tokens == "never":
            assert loss("replicated", n, 1e40) > target["replicated, served"], name
            continue
        d, flops = value(tokens), value(cells[1])
        assert flops == pytest.approx(6 * n * d, rel=CLOSE) and value(cells[0]) == pytest.approx(
            d / n, rel=CLOSE, abs=0.06
        ), name
        for fit, cell in zip(FITS, cells[2:4], strict=True):
            assert value(cell) == pytest.approx(loss(fit, n, d), abs=2e-3), name
        if "--served" in example:
            assert value(cells[3]) == pytest.approx(target["replicated, served"], abs=1.5e-3), name
            assert value(cells[7]) == pytest.approx(6 * n * d + 2 * n * 2e12, rel=CLOSE), name
        else:
            assert flops == 5.76e23, name
        assert value(cells[4]) == pytest.approx(flops / rate / 3600, rel=CLOSE), name
        context = min(shape.original_context, 8192)
        head = shape.vocabulary * shape.hidden
        exact = 6 * shape.linear_weights + 6 * head + 7 * shape.layers * shape.heads * shape.dim * context
        assert float(cells[6]) == pytest.approx(exact / 6 / n, abs=6e-4), name


def test_printed_hours_are_the_papers() -> None:
    hours = re.findall(r"^\| (Llama.*?|LLaMA.*?) \| \S+ \| ([\d,]+) \|", printed(), re.M)
    assert {name: value(cell) for name, cell in hours} == {
        "LLaMA 7B": 82_432, "LLaMA 13B": 135_168, "LLaMA 33B": 530_432, "LLaMA 65B": 1_022_362,
        "Llama 2 7B": 184_320, "Llama 2 13B": 368_640, "Llama 2 70B": 1_720_320,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters", "tokens"),
    [("LLaMA 7B", 6.738e9, 1e12), ("LLaMA 65B", 65.29e9, 1.4e12), ("Llama 2 70B", 68.98e9, 2e12)],
)
def test_what_each_is_made_for(name: str, parameters: float, tokens: float) -> None:
    table = printed().split("How much serving each is made for:")[1]
    cells = next(line for line in table.splitlines() if line.startswith(f"| {name} |")).strip("| ").split(" | ")
    assert float(cells[1]) == round(tokens / parameters)
    for fit, said, made in zip(FITS, cells[2::2], cells[3::2], strict=True):
        _, a, b, alpha, beta = FITS[fit]
        assert float(said) == pytest.approx(loss(fit, parameters, tokens), abs=1e-3)
        pays = 3 * tokens * (alpha * a / parameters**alpha / (beta * b / tokens**beta) - 1)
        if pays < 0:
            assert made == "too large for any"
        else:
            assert value(made.removesuffix(" tokens")) == pytest.approx(pays, rel=0.01)


def test_the_picture_is_there() -> None:
    picture = DOCS.parent / "pictures" / "compute.png"
    assert "(pictures/compute.png)" in DOCS.read_text(encoding="utf-8")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 50_000
