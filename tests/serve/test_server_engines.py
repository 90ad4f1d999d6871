"""Which engine is taken, and how each is started; vLLM by its command line alone, since it needs a GPU."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe.run import Run
from llama_ft.serve.engines import (
    LLAMA_CPP,
    TRANSFORMERS,
    Launch,
    child_environment,
    choose,
    launch_llama_cpp,
    sampling,
)
from llama_ft.serve.fields import Ask
from llama_ft.serve.reader import Reader
from llama_ft.serve.served import Served, find_served, staged
from llama_ft.serve.vllm import VLLM, launch_vllm

ENGINES = {one.name: one for one in (VLLM, TRANSFORMERS, LLAMA_CPP)}
MODEL = Served("m", Path("m"))


def have(monkeypatch: pytest.MonkeyPatch, *engines: str, gpu: bool = False) -> None:
    """Makes these engines, and no others, look installed."""
    found = {module for name in engines for module in ENGINES[name].needs}
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if module in found else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)


def test_the_first_that_fits_is_taken(monkeypatch) -> None:
    only_gguf = Served("g", None, gguf=Path("g.gguf"))
    have(monkeypatch, "vllm", "transformers", "llama-cpp", gpu=True)
    assert choose("auto", ENGINES, [MODEL]) is VLLM
    assert choose("auto", ENGINES, [only_gguf]) is LLAMA_CPP
    have(monkeypatch, "vllm", "transformers", "llama-cpp")
    assert choose("auto", ENGINES, [MODEL]) is TRANSFORMERS
    have(monkeypatch, "llama-cpp")
    assert choose("auto", ENGINES, [MODEL]) is LLAMA_CPP
    have(monkeypatch)
    with pytest.raises(UserError) as caught:
        choose("auto", ENGINES, [MODEL])
    assert [problem.hint for problem in caught.value.problems] == [
        "pip install 'llama-ft[serve]'",
        "pip install 'llama-ft[gguf]'",
    ]
    with pytest.raises(
        UserError, match=r"vLLM is not installed \(vllm missing\) — pip install vllm, on a machine with a GPU"
    ):
        choose("vllm", ENGINES, [MODEL])


@pytest.fixture
def two(run, alpaca_run, tmp_path) -> list[str]:
    """Two runs of one base and template."""
    for name in ("one", "two"):
        shutil.copytree(run.path, tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def value(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_vllm_with_a_merged_model(run, tmp_path) -> None:
    (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
    assert launch.line[:3] == [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    assert value(launch.line, "--model") == str(run.merged)
    assert value(launch.line, "--served-model-name") == run.path.name
    assert (value(launch.line, "--host"), value(launch.line, "--port")) == ("127.0.0.1", "4321")
    assert "--enable-lora" not in launch.line
    assert launch.key
    assert launch.key not in " ".join(launch.line)
    assert child_environment(launch)["VLLM_API_KEY"] == launch.key


def test_vllm_with_adapters_on_one_base(two, tiny_base, tmp_path) -> None:
    (launch,) = launch_vllm(find_served(two, compare=False), tmp_path, lambda: 4321)
    assert value(launch.line, "--model") == str(tiny_base)
    at = launch.line.index("--lora-modules")
    assert launch.line[at + 1 :] == [f"one={two[0]}/adapter", f"two={two[1]}/adapter"]
    assert value(launch.line, "--max-lora-rank") == "8"
    assert (tmp_path / value(launch.line, "--chat-template")).read_text().startswith("{#- control: <|im_start|>")
    assert set(launch.ids) == {"one", "two"}


def test_vllm_beside_its_base(two, tmp_path) -> None:
    models = find_served(two[:1], compare=True)
    (launch,) = launch_vllm(models, tmp_path, lambda: 4321)
    assert launch.ids == {"one": "one", "one-base": "one-base"}
    assert value(launch.line, "--served-model-name") == "one-base"
    assert value(launch.line, "--lora-modules") == f"one={two[0]}/adapter"


def change(run: str, file: str, **changes: object) -> None:
    path = Path(run) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_vllm_cannot_serve_together(two, run, alpaca_run, tiny_base, tmp_path) -> None:
    def said(*sources: str, **more: bool) -> str:
        with pytest.raises(UserError) as caught:
            launch_vllm(find_served(sources, **more), tmp_path, lambda: 4321)
        return str(caught.value)

    model = tmp_path / "model"
    model.symlink_to(run.merged)
    assert "model is no run with an adapter: vLLM cannot serve it beside others" in said(two[0], str(model))
    assert "the runs have different templates" in said(two[0], str(alpaca_run.path))
    change(two[0], "adapter/adapter_config.json", use_dora=True)
    assert "one cannot be served as an adapter: it is DoRA" in said(*two)
    shutil.rmtree(Path(two[0]) / "adapter")
    assert "one cannot be served as an adapter: it has no adapter/" in said(*two)
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    change(two[1], "run.lock.json", base_folder=str(other))
    shutil.copytree(run.adapter, Path(two[0]) / "adapter")
    assert "the runs were tuned from different bases" in said(*two)


def test_llama_cpp(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "gguf").mkdir()
    (copy / "gguf" / "run-q8_0.gguf").write_bytes(b"GGUF" + b"0" * 100)
    (copy / "gguf" / "run-q4_k_m.gguf").write_bytes(b"GGUF")
    stage = tmp_path / "stage"
    stage.mkdir()
    (launch,) = launch_llama_cpp(find_served([str(copy)]), stage, lambda: 4321)
    assert launch.line[:3] == [sys.executable, "-m", "llama_cpp.server"]
    assert (stage / value(launch.line, "--model")).resolve() == copy / "gguf" / "run-q8_0.gguf", "the largest"
    assert value(launch.line, "--n_ctx") == "512"
    assert launch.key not in " ".join(launch.line)
    assert child_environment(launch)["API_KEY"] == launch.key
    with pytest.raises(UserError, match=r"has no GGUF file, which llama.cpp needs — llama-ft export .* --gguf q8_0"):
        launch_llama_cpp(find_served([str(run.path)]), stage, lambda: 4321)


def test_the_gateways_key_stays_here(monkeypatch) -> None:
    monkeypatch.setenv("LLAMA_FT_API_KEY", "a-secret-of-the-gateway")
    monkeypatch.setenv("PYTHONPATH", f"here{':'}/there")
    environment = child_environment(Launch([], 1, {}, {}, ""))
    assert "a-secret-of-the-gateway" not in environment.values()
    assert environment["PYTHONPATH"] == f"{Path.cwd() / 'here'}:/there", "it is started in another folder"
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_sampling_follows_the_request_then_the_model(run) -> None:
    reader = Reader(run.merged, run.merged)
    assert sampling(Ask("m"), reader) == (0.0, 1.0), "an export says greedy"
    assert sampling(Ask("m", temperature=0.7), reader) == (0.7, 1.0)
    assert sampling(Ask("m", top_p=0.9), reader) == (1.0, 0.9)
    assert sampling(Ask("m", temperature=0.0, top_p=0.9), reader) == (0.0, 0.9)
    reader.settings = {"do_sample": True, "temperature": 0.2, "top_p": 0.8}
    assert sampling(Ask("m"), reader) == (0.2, 0.8)
    assert sampling(Ask("m", temperature=0.0), reader)[0] == 0.0
    reader.settings = {"temperature": 0.2}
    assert sampling(Ask("m"), reader)[0] == 0.0


def test_a_base_without_a_template_gets_the_runs(run, tiny_base, tmp_path) -> None:
    tuned, base = find_served([str(run.path)], compare=True)
    assert (tuned.name, base.name) == (run.path.name, f"{run.path.name}-base")
    assert staged(tuned, tmp_path / "m0").resolve() == run.merged
    place = staged(base, tmp_path / "m1")
    assert (place / "model.safetensors").resolve() == tiny_base / "model.safetensors"
    assert (place / "config.json").resolve() == tiny_base / "config.json"
    assert (place / "chat_template.jinja").resolve() == run.merged / "chat_template.jinja"
    assert Reader(place, place).stop == Reader(run.merged, run.merged).stop


def test_a_base_that_lacks_the_runs_tokens(run, tmp_path) -> None:
    small = tmp_path / "base"
    copied = tmp_path / "run"
    shutil.copytree(run.path, copied)
    shutil.copytree(Path(Run(copied).lock["base_folder"]), small)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    change(str(copied), "run.lock.json", base_folder=str(small))
    base = find_served([str(copied)], compare=True)[1]
    with pytest.raises(UserError, match="the run's has tokens that the base does not know"):
        staged(base, tmp_path / "m0")


def test_a_merged_folder_bears_the_name_of_its_run(run) -> None:
    assert [served.name for served in find_served([str(run.merged)])] == [run.path.name]
