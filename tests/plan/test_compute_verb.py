"""`llama-ft plan` without a recipe: what it takes, what it refuses, what it prints and draws."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llama_ft.errors import UserError
from llama_ft.plan.commands import plan_asked
from llama_ft.plan.compute_ask import ask, number, share
from llama_ft.plan.words import count

NOTHING = dict.fromkeys(("compute", "tokens", "params", "served", "utilisation"))


def call(recipe: str | None = None, overrides: tuple[str, ...] = (), **keys: Any) -> None:
    question = {name: keys.pop(name, None) for name in NOTHING}
    given = {"hardware": None, "price": None, "as_json_text": False, "sweeping": False, "chart": None} | keys
    plan_asked(recipe, list(overrides), question=question, **given)


def answered(capsys: pytest.CaptureFixture[str], **keys: Any) -> dict[str, Any]:
    call(as_json_text=True, **keys)
    return json.loads(capsys.readouterr().out)


def refused(**keys: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        call(**keys)
    return caught.value


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e12", 1e12), ("7B", 7e9), ("1.4T", 1.4e12), ("350M", 3.5e8), (" 1_000_000 ", 1e6), ("7 b", 7e9), ("5e9", 5e9)],
)
def test_numbers_are_read(text: str, value: float) -> None:
    assert number(text, "--params") == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("abc", "'abc' is not a number"),
        ("", "'' is not a number"),
        ("nan", "'nan' is not a number"),
        ("1e21 FLOP", "is not a number"),
        ("1,5e21", "a point, no comma"),
        ("-1e21", "-1e21 is negative"),
        ("1e40", "beyond reason"),
        ("1e400", "beyond reason"),
        ("0", "beyond reason"),
    ],
)
def test_numbers_that_are_none_are_said(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        number(text, "--compute")
    assert said in str(caught.value) and caught.value.problems[0].key == "--compute"


def test_a_share_is_one() -> None:
    assert share("0.47") == share("47%") == 0.47 and share("1") == 1
    for text, said in (("47", "did you mean 0.47?"), ("0", "above 0"), ("x", "not a share"), ("-0.5", "above 0")):
        with pytest.raises(UserError) as caught:
            share(text)
        assert said in str(caught.value)


def test_all_mistakes_are_said_together(tmp_path: Path) -> None:
    error = refused(
        compute="1e40", served="much", utilisation="47", hardware="8xA10O-80GB", price=-1.0, chart=tmp_path / "x.jpg"
    )
    keys = [problem.key for problem in error.problems]
    assert keys == ["--compute", "--served", "--utilisation", "--hardware", "--chart", "--price"]
    text = error.block()
    assert "did you mean 'A100-80GB'?" in text and "did you mean '.png'?" in text and "(6 problems)" in text
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_go_together() -> None:
    assert "nothing to plan" in str(refused())
    assert "RECIPE" in str(refused()) and "--compute" in str(refused())
    both = str(refused(recipe="quickstart", compute="1e21", served="1T"))
    assert "'quickstart'" in both and "--compute or --served" in both
    assert "not planned with --chart" in str(refused(recipe="quickstart", chart=Path("x.png")))
    assert "--served alone" in str(refused(served="1T"))
    assert "a sweep is of a recipe" in str(refused(compute="1e21", sweeping=True))
    for hardware in ("cpu", "24GiB"):
        assert "no rate is known" in str(refused(compute="1e21", hardware=hardware))


def test_three_numbers_must_agree() -> None:
    error = str(refused(compute="1e21", tokens="1T", params="7B"))
    assert "4.2e+22" in error and "leave one of the three out" in error
    found = ask(compute="4.04e22", tokens="1T", params="7B")  # LLaMA 7B by its 6.74e9
    assert found.pair is not None and found.pair.compute == 4.2e22
    assert ask(compute="1e23", params="7B").pair.tokens == pytest.approx(1e23 / 6 / 7e9)
    assert ask(compute="1e23", tokens="1T").pair.parameters == pytest.approx(1e23 / 6 / 1e12)


def test_a_budget(capsys: pytest.CaptureFixture[str]) -> None:
    found = answered(capsys, compute="1e21", hardware="8xH100-80GB", utilisation="0.4", price=2.0)
    assert [one["law"] for one in found["models"]] == ["Chinchilla", "replicated", "20 per parameter"]
    for one in found["models"]:
        assert 6 * one["parameters"] * one["tokens"] == pytest.approx(1e21)
        assert one["gpu_hours"] == pytest.approx(1e21 / (989.4e12 * 0.4) / 3600)
        assert one["hours"] == pytest.approx(one["gpu_hours"] / 8) and one["price"] == 2 * one["gpu_hours"]
        assert one["saved"] is None and one["lifetime_flops"] == pytest.approx(1e21)
    assert len(found["presets"]) == 5 and all(one["compute"] == pytest.approx(1e21) for one in found["presets"])
    assert found["notes"] == []  # within what the fits have seen


def test_serving(capsys: pytest.CaptureFixture[str]) -> None:
    found = answered(capsys, compute="1e22", served="2T")
    models = {one["law"]: one for one in found["models"]}
    for fit in ("Chinchilla", "replicated"):
        plain, small = models[fit], models[f"{fit}, served"]
        assert small["parameters"] < plain["parameters"] / 2 and small["tokens"] > 2 * plain["tokens"]
        assert small["loss"][fit] == pytest.approx(plain["loss"][fit])
        for one in (plain, small):
            by_hand = 6 * one["parameters"] * one["tokens"] + 2 * one["parameters"] * 2e12
            assert one["lifetime_flops"] == pytest.approx(by_hand)
        assert small["saved"] == pytest.approx(1 - small["lifetime_flops"] / plain["lifetime_flops"])
        assert 0.3 < small["saved"] < 0.4
    loss = models["replicated"]["loss"]["replicated"]
    reached = [one for one in found["presets"] if one["tokens"] is not None]
    assert len(reached) == 4 and all(one["loss"]["replicated"] == pytest.approx(loss) for one in reached)
    never = next(one for one in found["presets"] if one["tokens"] is None)
    assert never["name"] == "llama-3.2-1b" and never["gpu_hours"] is None
    assert answered(capsys, compute="1e22", served="0")["models"] == answered(capsys, compute="1e22")["models"]


def test_the_other_sides(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = answered(capsys, tokens="1.4T")
    assert all(one["tokens"] == 1.4e12 for one in [*tokens["models"], *tokens["presets"]])
    params = answered(capsys, params="7B")
    assert all(one["parameters"] == 7e9 for one in params["models"])
    by_law = {one["law"]: one["tokens"] for one in params["models"]}
    assert by_law["20 per parameter"] == 1.4e11 and by_law["Chinchilla"] == pytest.approx(2.96e11, rel=0.01)
    # A model that is asked for and the tokens that it wants are each other's answer.
    best = by_law["replicated"]
    back = answered(capsys, tokens=repr(best))
    assert next(m for m in back["models"] if m["law"] == "replicated")["parameters"] == pytest.approx(7e9)


def test_a_pair_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    found = answered(capsys, params="7B", tokens="1T", served="2T")
    laws = [one["law"] for one in found["models"]]
    assert laws == [
        "as asked",
        "Chinchilla",
        "replicated",
        "20 per parameter",
        "Chinchilla, served",
        "replicated, served",
    ]
    assert all(one["compute"] == pytest.approx(4.2e22) for one in found["models"][:4])
    assert any("0.71 of the FLOP at 15.8B" in note and "3.09T tokens are served" in note for note in found["notes"])
    assert any(note.startswith("extrapolated") for note in found["notes"])
    large = answered(capsys, params="70B", tokens="20B")
    assert sum("a smaller one is cheaper" in note for note in large["notes"]) == 2


def test_absurd_but_allowed_questions_are_finite(capsys: pytest.CaptureFixture[str]) -> None:
    """The corners of what may be asked: no overflow, no zero, nothing that JSON cannot hold."""

    def numbers(value: Any) -> list[float]:
        if isinstance(value, dict):
            return [found for one in value.values() for found in numbers(one)]
        if isinstance(value, list):
            return [found for one in value for found in numbers(one)]
        return [value] if isinstance(value, int | float) else []

    corners = [{"compute": "1e15"}, {"compute": "1e30"}, {"params": "1e6", "tokens": "1e18"}]
    corners += [{"params": "1e15", "tokens": "1e6"}, {"tokens": "1e6"}, {"params": "1e15"}]
    for corner in corners:
        found = answered(capsys, **corner, served="1e20")
        assert all(math.isfinite(one) for one in numbers(found)), corner
        call(**corner, served="1e20")
        assert "nan" not in capsys.readouterr().out


def test_text_is_aligned_and_says_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    call(compute="5.76e23", price=1.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "asked     5.76e+23 FLOP of training",
        "hardware  2048xA100-80GB, 47% of 312 TFLOP/s each, counted as 6ND",
    ]
    start = next(number for number, line in enumerate(lines) if line.startswith("model "))
    table = lines[start : start + 4]
    assert len({len(line) for line in table}) == 1
    heads = ["model", "params", "tokens", "per param", "FLOP", "Chinchilla", "replicated", "GPU-hours", "time", "GPUs"]
    assert re.split("  +", table[0]) == [*heads, "price"]
    assert "1,091,107" in table[1] and "1,516" in table[1] and "1,636,661" in table[1]
    call(params="2M")
    assert "none" in capsys.readouterr().out  # the embedding is larger


def test_counts_round_up_to_the_next_unit() -> None:
    assert [count(n) for n in (999.9e9, 999.4e9, 1e15, 1e12, 1234, 6.98e9)] == [
        "1T", "999B", "1e+15", "1T", "1,234", "6.98B",
    ]  # fmt: skip


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_chart_is_drawn(ending: str, magic: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / f"chart.{ending}"
    call(compute="1e22", served="2T", chart=target)
    assert target.read_bytes().startswith(magic)
    assert capsys.readouterr().out.splitlines()[-1] == f"chart     {target}"


def test_a_chart_shows_what_was_asked(tmp_path: Path) -> None:
    """Its words, read from an SVG that keeps them as text."""
    import matplotlib as mpl

    target = tmp_path / "chart.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        call(params="7B", tokens="1T", served="2T", chart=target)
    text = target.read_text(encoding="utf-8")
    for words in (
        "training compute, FLOP (6ND)",
        "predicted loss, nats per token",
        "compute-optimal, any size",
        "as asked: 7B on 1T tokens",
        "LLaMA, trained on 1T and 1.4T tokens",
        "Llama 2, trained on 2T tokens",
        "65B",
        "and 2T tokens served: 7.78B, 105 tokens per parameter",
    ):
        assert words in text, words


def test_where_no_chart_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    assert "is a file, not a folder" in str(refused(compute="1e21", chart=tmp_path / "file" / "x.png"))
    assert "a folder stands there" in str(refused(compute="1e21", chart=tmp_path / "folder.png"))
    if Path("/proc").is_dir():
        assert "cannot be written" in str(refused(compute="1e21", chart=Path("/proc/none/x.png")))


def test_the_command_line_imports_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys; from llama_ft.cli import app\n"
        "try: app(['plan', '--compute', '1e21'])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "replicated" in done.stdout
    bad = subprocess.run(
        [sys.executable, "-m", "llama_ft.cli", "plan", "--compute", "-1e21"], capture_output=True, text=True
    )
    assert bad.returncode == 2 and bad.stdout == "" and "--compute: -1e21 is negative" in bad.stderr
