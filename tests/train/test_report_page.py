"""report.html: it says what lies in the run folder, whatever is missing or damaged, and what it quotes stays text."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llama_ft.cli import app
from llama_ft.recipe.run import Run
from llama_ft.train.page.curves import Curve, axis, curve_html, smoothed, step_ticks, thinned
from llama_ft.train.page.gather import gather
from llama_ft.train.page.html import duration, number
from llama_ft.train.page.write import write_page
from tests.train.report_runs import HOSTILE, LONG, PROOF, RTL, make_run, metrics

VOID = {"meta", "br", "img", "input", "link"}


class Reader(HTMLParser):
    """Elements, attributes and text of a page; fails where tags do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def read(run: Run) -> Reader:
    return Reader(write_page(run).read_text(encoding="utf-8"))


def test_a_finished_run_is_told(tmp_path):
    page = read(make_run(tmp_path / "run"))
    for said in (
        "finished 21 November 2026, 20:39 UTC",
        "smollm2-135m, tuned with LoRA on 62 documents. The held-out loss fell from 4.100 to 3.100 in 24 steps.",
        "steps 24 of 24",
        "memory, highest 1.8 GiB",
        "of the machine, median 64%",
        "The merged model equals what was trained.",
        "equal greedy answers 1 of 1 all",
        "two lines",
        "an answer.jsonl, dropped: an answer 2",
        "195 GFLOP/s",
        "template: chatml",
    ):
        assert said in page.words, said
    assert "no answer" in page.words, "an empty answer is said to be one"
    assert [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs] == [
        "curves", "answers", "data", "proof", "environment", "recipe",
    ]  # fmt: skip
    assert sum(tag == "figure" for tag, _ in page.tags) == 6


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(tmp_path):
    html = write_page(make_run(tmp_path / "run", said=HOSTILE)).read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1]
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    page = Reader(html)
    for tag, attrs in page.tags:
        assert not {"src", "style", "onclick", "onerror"} & attrs.keys(), (tag, attrs)
        assert not attrs.get("href", "#").removeprefix("#").startswith(("http", "//", "/"))
    assert "http" not in re.sub(r"<(?:style|script)>.*?</", "", html, flags=re.DOTALL).replace("http-equiv", "")


@pytest.mark.parametrize("said", [HOSTILE, RTL, LONG, "<!--", "]]>", "$name ${x} %s {0}"], ids=range(6))
def test_what_models_and_data_say_stays_text(tmp_path, said):
    plain = read(make_run(tmp_path / "plain", said="x"))
    quoted = read(make_run(tmp_path / "run", said=said))
    assert [tag for tag, _ in quoted.tags] == [tag for tag, _ in plain.tags]
    html = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    for hidden in ("\u202e", "\u2066", "\x00", "\x1b", "\u200b"):
        assert hidden not in html
    if said == HOSTILE:
        assert quoted.words.count("</script><script>window.hacked = 1") >= 6
    if said == RTL:
        assert "\\u202e dlrow" in quoted.words and "👨‍👩‍👧" in quoted.words


def test_a_report_of_what_is_left(tmp_path):
    """A folder with nothing but a recipe, then with files that are cut, empty or of another kind."""
    run = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "run.lock.json", "export.json", "status.json", "eval/samples.json"):
        (run.path / name).unlink()
    page = read(run)
    assert "Nothing has been measured yet." in page.words
    assert [attrs["id"] for tag, attrs in page.tags if tag == "h2" and "id" in attrs] == ["recipe"]
    for name in ("run.lock.json", "export.json", "status.json", "warnings.json", "measured.json"):
        (run.path / name).write_text('{"half": ')
    (run.path / "eval" / "samples.json").write_text('{"not": "a list"}')
    run.recipe_file.write_text("name: [")
    run.metrics_file.write_text('{"step": 1, "loss": 2.0}\n[1]\n{"step": 2, "lo')
    page = read(Run(run.path))
    assert "These could not be read:" in page.words
    for name in ("run.lock.json", "export.json", "samples.json", "recipe.yaml", "warnings.json"):
        assert name in page.words
    assert gather(Run(run.path)).step == 1


@pytest.mark.parametrize(
    ("lock", "export"),
    [
        ({"data": {"sources": [{"other": 1}]}}, {"ok": True}),
        ({"data": 3, "versions": [], "hashes": "x"}, {"ok": False}),
    ],
)
def test_files_of_another_version_are_said_to_be(tmp_path, lock, export):
    run = make_run(tmp_path / "run")
    run.lock_file.write_text(json.dumps(lock))
    run.proof_file.write_text(json.dumps(export))
    assert "of another version" in read(run).words


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (
            {"state": "failed", "message": "the disk failed: <b>"},
            "The run failed the disk failed: <b> There is no checkpoint",
        ),
        ({"state": "stopped"}, "Stopped after step 24 There is no checkpoint: start again with --overwrite."),
        ({"state": "running"}, "Under way, or killed Nothing says that this run has ended. Its last line was written"),
    ],
    ids=["failed", "stopped", "running"],
)
def test_how_a_run_stands(tmp_path, status, said):
    run = make_run(tmp_path / "run", **status)
    assert said in read(run).words
    (run.checkpoints / "step-16").mkdir(parents=True)
    assert "Checkpoint step-16 is whole: go on with --resume." in read(run).words


def test_a_refused_export_warnings_and_the_plan(tmp_path):
    run = make_run(tmp_path / "run")
    assert 'id="plan"' not in write_page(run).read_text()
    run.proof_file.write_text(json.dumps({**PROOF, "ok": False, "faults": ["max |Δ logit| is 0.3"]}))
    warning = {"step": 7, "name": "flat", "message": "no <better> \ud800"}  # half a character, as JSON may hold it
    (run.path / "warnings.json").write_text(json.dumps([warning]))
    planned = {"peak_bytes": 2 * 2**30, "seconds": 100.0, "steps": 24, "tokens": 5000}
    run.lock_file.write_text(json.dumps({**run.lock, "plan": planned}))
    (run.path / "measured.json").write_text(json.dumps({**planned, "peak_bytes": 2.2 * 2**30, "seconds": 90}))
    words = read(Run(run.path)).words
    assert "The export was refused" in words and "max |Δ logit| is 0.3" in words
    assert "1 warning flat , step 7: no <better> \\ud800" in words
    assert "memory 2.00 GiB 2.20 GiB +10.0% time 1 min 40 s 1 min 30 s -10.0% steps 24 24 none" in words
    (run.path / "measured.json").unlink()
    assert "memory 2.00 GiB – –" in read(Run(run.path)).words


def test_values_that_are_not_finite_are_counted_and_not_drawn(tmp_path):
    lines = metrics()
    lines[3]["loss"], lines[4]["loss"], lines[5]["grad_norm"] = math.nan, math.inf, math.inf
    html = write_page(make_run(tmp_path / "run", lines=lines)).read_text()
    assert "2 values not finite." in html and "1 value not finite." in html
    assert not re.search(r'[ML "](nan|inf)', html, re.IGNORECASE)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-9, 1e12])
def test_one_point_and_flat_curves_are_drawn(value):
    for line in ([(5, value)], [(step, value) for step in range(1, 4)]):
        html = curve_html(Curve("Loss", line))
        assert "<figure" in html and "nan" not in html


def test_axes_are_round_and_enclose():
    for low, high in ((0.1, 0.93), (2.31, 2.34), (-3, 8), (1e-7, 3e-3), (1, 123456), (5, 5), (0, 0), (-1, -1)):
        ticks = axis(low, high)
        assert 2 <= len(ticks) <= 8
        assert ticks[0] <= low + 1e-9 * abs(low) and ticks[-1] >= high - 1e-9 * abs(high)
        gaps = {round((b - a) / (ticks[1] - ticks[0]), 6) for a, b in pairwise(ticks)}
        assert gaps == {1.0}
    assert axis(0.3, 0.9, from_zero=True)[0] == 0
    assert step_ticks(1, 24) == [5, 10, 15, 20]
    assert step_ticks(7, 7) == [7]


def test_a_long_curve_keeps_its_peaks_and_its_mean():
    line = [(step, 1.0) for step in range(50_000)]
    line[31_234] = (31_234, 9.0)
    line[41_234] = (41_234, -9.0)
    drawn = thinned(line)
    assert len(drawn) <= 800 and {9.0, -9.0} <= {value for _, value in drawn}
    assert drawn == sorted(drawn)
    soft = smoothed([(step, float(step)) for step in range(1000)])
    assert soft[0][1] == pytest.approx(12.5) and soft[-1] == (999, pytest.approx(986.5))
    assert all(abs(value - step) < 1e-9 for step, value in soft[20:-20])
    html = curve_html(Curve("Loss", line, smooth=True))
    assert len(html) < 100_000


def test_two_lines_and_bars_of_errors():
    line, other = [(step, 0.1 * step) for step in range(1, 31)], [(step, -0.1 * step) for step in range(1, 31)]
    html = curve_html(Curve("Two", line, "", other, "rejected", smooth=True, paired=True, line_name="chosen"))
    assert html.count('<path class="line"') == html.count('<path class="held"') == 2  # one each, and one in the legend
    assert "dots" not in html and 'class="raw"' not in html
    assert "chosen 0.1 at step 1, 3 at step 30; rejected -0.1 at step 1, -3 at step 30." in html
    assert "chosen 1 · rejected -1" in html
    long = curve_html(Curve("Two", line * 900, "", other * 900, "rejected", paired=True))
    assert len(long) < 100_000
    bars = curve_html(Curve("Best", [(1, 0.0), (2, 1.0)], by="k", errors=[(1, 0.5), (2, math.nan)]))
    assert bars.count('class="raw"') == 1 and 'data-by="k"' in bars and "0 ± 0.5 at k 1" not in bars
    assert "<span>-0.6</span>" in bars or "<span>-0.5</span>" in bars, "the axis encloses the bar"
    assert "[1,&quot;0 ± 0.5&quot;]" in bars


def test_numbers_for_people():
    assert [number(value) for value in (0, 3, 1234567, 3.14159, 0.0001234, 4567.8, -0.5)] == [
        "0", "3", "1,234,567", "3.142", "1.23e-4", "4,568", "-0.5",
    ]  # fmt: skip
    assert [duration(value) for value in (1.24, 48, 750, 11100)] == ["1.2 s", "48 s", "12 min 30 s", "3 h 05 min"]


def test_the_command_writes_it_without_torch_and_refuses_what_is_no_run(tmp_path):
    run = make_run(tmp_path / "run")
    code = "import sys; from llama_ft.cli import app\ntry: app()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, "report", str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == run.path / "report.html"
    assert (run.path / "report.html").stat().st_size > 20_000
    refused = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert refused.exit_code == 2 and "has no recipe.yaml" in refused.output


def test_a_mixture_is_shown_by_source(tmp_path):
    run = make_run(tmp_path / "run")
    lines = [
        {
            "step": step,
            "loss": 3.0 - step / 10,
            "loss_by_source": {"wiki": 4.0 - step / 10, HOSTILE: 2.0} if step > 1 else {"wiki": 3.9},
            "tokens_by_source": {"wiki": 60, HOSTILE: 40},
        }
        for step in range(1, 21)
    ]
    lines.append({"step": 20, "eval_loss": 2.5, "eval_loss_by_source": {"wiki": 2.2, "books": 2.7}})
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = write_page(run).read_text(encoding="utf-8")
    Reader(page)
    assert HOSTILE not in page and "books, held out" in page
    section = page.partition('<h2 id="mixture">')[2].partition("</section>")[0]
    for shown in (">1,200<", ">60.00%<", ">40.00%<", ">3.850<", ">2.050<"):  # means of the first two and the last two
        assert shown in section, shown


def test_one_source_has_no_mixture(tmp_path):
    assert 'id="mixture"' not in write_page(make_run(tmp_path / "run")).read_text(encoding="utf-8")
