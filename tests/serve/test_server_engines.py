"""Which engine is taken, and how each is started; vLLM by its command line alone: it is run in test_server_vllm.py."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from llama_ft.errors import MachineFault, UserError
from llama_ft.recipe.run import Run
from llama_ft.serve.child import Child
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
from llama_ft.serve.gateway import Gateway, Model
from llama_ft.serve.limits import Limits
from llama_ft.serve.reader import Reader
from llama_ft.serve.refusal import Refusal
from llama_ft.serve.served import Served, find_served, staged
from llama_ft.serve.vllm import VLLM, VllmReader, find_command, launch_vllm
from tests.serve.serving import listening

ENGINES = {one.name: one for one in (VLLM, TRANSFORMERS, LLAMA_CPP)}
MODEL = Served("m", Path("m"))


NEEDS = {"transformers": ("fastapi", "uvicorn", "openai"), "llama-cpp": LLAMA_CPP.absent.args[2:]}


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch) -> None:
    """Whatever this machine has: no vLLM, where a test does not make one."""
    monkeypatch.delenv("LLAMA_FT_VLLM", raising=False)
    monkeypatch.setenv("PATH", os.pathsep.join(part for part in os.get_exec_path() if not Path(part, "vllm").exists()))


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A command of that name in an environment of its own."""
    command = tmp_path / "vllm-environment" / "bin" / "vllm"
    command.parent.mkdir(parents=True)
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("LLAMA_FT_VLLM", str(command))
    return command


def have(monkeypatch: pytest.MonkeyPatch, *engines: str, gpu: bool = False) -> None:
    """Makes these engines, and no others of our own environment, look installed."""
    found = {module for name in engines for module in NEEDS[name]}
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object() if module in found else None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)


def test_the_first_that_fits_is_taken(monkeypatch) -> None:
    only_gguf = Served("g", None, gguf=Path("g.gguf"))
    have(monkeypatch, "transformers", "llama-cpp", gpu=True)
    assert choose("auto", ENGINES, [MODEL]) is TRANSFORMERS
    assert choose("auto", ENGINES, [only_gguf]) is LLAMA_CPP
    have(monkeypatch, "llama-cpp")
    assert choose("auto", ENGINES, [MODEL]) is LLAMA_CPP
    have(monkeypatch)
    with pytest.raises(UserError) as caught:
        choose("auto", ENGINES, [MODEL])
    assert [problem.hint for problem in caught.value.problems] == [
        "pip install 'llama-ft[serve]'",
        "pip install 'llama-ft[gguf]'",
    ]


def test_vllm_is_taken_on_a_gpu_or_by_its_name(monkeypatch, vllm) -> None:
    have(monkeypatch, "transformers", "llama-cpp", gpu=True)
    assert choose("auto", ENGINES, [MODEL]) is VLLM
    assert choose("auto", ENGINES, [Served("g", None, gguf=Path("g.gguf"))]) is LLAMA_CPP
    have(monkeypatch, "transformers", "llama-cpp")
    assert choose("auto", ENGINES, [MODEL]) is TRANSFORMERS
    assert choose("vllm", ENGINES, [MODEL]) is VLLM


# vLLM's command


def test_vllm_is_found_by_its_variable_or_on_path(monkeypatch, vllm, tmp_path) -> None:
    assert find_command() == vllm
    link = tmp_path / "tools" / "vllm"
    link.parent.mkdir()
    link.symlink_to(vllm)
    monkeypatch.setenv("PATH", f"{link.parent}{os.pathsep}{os.environ['PATH']}")
    assert find_command() == vllm, "the variable goes before PATH"
    monkeypatch.setenv("LLAMA_FT_VLLM", "")
    assert find_command() == link
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_FT_VLLM", "~/vllm-environment/bin/vllm")
    assert find_command() == vllm
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLAMA_FT_VLLM", "tools/vllm")
    assert find_command() == link, "an engine is started in another folder"


def test_vllm_that_is_missing(monkeypatch) -> None:
    assert find_command() is None
    with pytest.raises(UserError) as caught:
        choose("vllm", ENGINES, [MODEL])
    said = str(caught.value)
    assert said.startswith("vLLM is not installed: $LLAMA_FT_VLLM is not set and there is no `vllm` on PATH — ")
    assert "in an environment of its own, since it wants other versions of torch and transformers" in said
    line = "python3 -m venv ~/vllm && ~/vllm/bin/pip install vllm==0.32.0 && export LLAMA_FT_VLLM=~/vllm/bin/vllm"
    assert line in said


def test_a_path_that_is_no_command(monkeypatch, vllm, tmp_path) -> None:
    def said(path: object) -> str:
        monkeypatch.setenv("LLAMA_FT_VLLM", str(path))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        for name in ("vllm", "auto"):  # on a GPU `auto` looks for it too, and does not pass over a mistake
            with pytest.raises(UserError) as caught:
                choose(name, ENGINES, [MODEL])
        assert "export LLAMA_FT_VLLM=~/vllm/bin/vllm" in str(caught.value)
        return str(caught.value)

    plain = tmp_path / "notes.txt"
    plain.write_text("not to be run")
    for path in (tmp_path / "nowhere", plain, vllm.parent):
        assert f"$LLAMA_FT_VLLM: '{path}' is no command that can be run" in said(path)
    assert "is a Python, and not its `vllm` command" in said(sys.executable)


def test_vllm_lives_in_its_own_environment(run, vllm, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", "/ours")
    monkeypatch.setenv("PYTHONPATH", "/ours/too")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0")
    (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
    environment = child_environment(launch)
    assert not {"PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME"} & environment.keys()
    assert environment["PATH"].split(os.pathsep)[0] == str(vllm.parent), "its ninja, not ours"
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0", "what the user sets for vLLM arrives there"


def test_vllm_without_a_gpu_leaves_memory_to_others(run, vllm, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def space() -> tuple[str | None, bool]:
        (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
        return child_environment(launch).get("VLLM_CPU_KVCACHE_SPACE"), "--enforce-eager" in launch.line

    gigabytes, eager = space()
    assert 1 <= int(gigabytes or 0) <= max(1, psutil.virtual_memory().total // 2**32)
    assert eager
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    assert space() == ("7", True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert space() == (None, False)


@pytest.fixture
def two(run, alpaca_run, tmp_path) -> list[str]:
    """Two runs of one base and template."""
    for name in ("one", "two"):
        shutil.copytree(run.path, tmp_path / name)
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def value(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_vllm_with_a_merged_model(run, vllm, tmp_path) -> None:
    (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
    assert launch.line[:3] == [str(vllm), "serve", str(run.merged)]
    assert launch.ids == {run.path.name: value(launch.line, "--served-model-name")}
    assert (value(launch.line, "--host"), value(launch.line, "--port")) == ("127.0.0.1", "4321")
    assert value(launch.line, "--dtype") == "float32", "by itself it would take 16 bits for them"
    assert value(launch.line, "--generation-config") == "vllm", "the gateway says what counts of it"
    assert value(launch.line, "--load-format") == "safetensors"
    assert "--enable-lora" not in launch.line
    assert launch.key
    assert launch.key not in " ".join(launch.line)
    assert child_environment(launch)["VLLM_API_KEY"] == launch.key


def adapters(launch: Launch) -> list[dict[str, str]]:
    return [json.loads(one) for one in launch.line[launch.line.index("--lora-modules") + 1 :]]


@pytest.mark.parametrize(("gpu", "places"), [(True, "2"), (False, "3")], ids=["on a GPU", "without one"])
def test_vllm_with_adapters_on_one_base(gpu, places, two, vllm, tiny_base, tmp_path, monkeypatch) -> None:
    """Without a GPU one place stays empty: vLLM lays its last one on the base's answers."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    (launch,) = launch_vllm(find_served(two, compare=False), tmp_path, lambda: 4321)
    assert launch.line[2] == str(tiny_base)
    assert launch.ids == {"one": "m0", "two": "m1"}
    assert adapters(launch) == [{"name": f"m{i}", "path": f"{run}/adapter"} for i, run in enumerate(two)]
    assert (value(launch.line, "--max-lora-rank"), value(launch.line, "--max-loras")) == ("8", places)
    words = Path(value(launch.line, "--tokenizer"))
    assert (words / "chat_template.jinja").read_text().startswith("{#- control: <|im_start|>")
    assert not list(words.glob("adapter*"))


def test_vllm_beside_its_base(two, vllm, tmp_path) -> None:
    (launch,) = launch_vllm(find_served(two, compare=True), tmp_path, lambda: 4321)
    assert launch.ids == {"one": "m0", "one-base": "base", "two": "m1", "two-base": "base"}
    assert value(launch.line, "--served-model-name") == "base"
    assert [one["name"] for one in adapters(launch)] == ["m0", "m1"]
    assert launch.readers["two-base"] is launch.readers["one"], "one base, one template"


def change(run: str, file: str, **changes: object) -> None:
    path = Path(run) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def unservable(*sources: str) -> str:
    with pytest.raises(UserError) as caught:
        launch_vllm(find_served(sources), Path("unused"), lambda: 4321)
    return str(caught.value)


def test_what_vllm_cannot_serve_together(two, run, alpaca_run, tiny_base, tmp_path) -> None:
    said = unservable
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


def test_what_vllm_cannot_lay_on_a_base(two, tmp_path) -> None:
    recipe = Path(two[0], "recipe.yaml")
    plain = recipe.read_text()
    for old, new, said in (
        ("method: lora", "method: qlora", "it was trained with qlora, so its weights are those of merged/ alone"),
        ("  r: 4", "  r: 513", "its rank is above 512"),
    ):
        assert plain.count(old) == 1
        recipe.write_text(plain.replace(old, new))
        assert f"one cannot be served as an adapter: {said}" in unservable(*two)
    recipe.write_text(plain)
    tokenizer = Path(two[1], "adapter", "tokenizer.json")
    tokenizer.write_text(tokenizer.read_text().replace("<|endoftext|>", "<|other_text|>"))
    assert "the runs have different tokenizers: vLLM has one for all" in unservable(*two)
    gguf = tmp_path / "a.gguf"
    gguf.write_bytes(b"GGUF")
    assert "a has no merged/, which vLLM needs — use --engine llama-cpp" in unservable(str(gguf))


# vLLM's words


def test_what_vllm_is_asked(run, vllm, tmp_path) -> None:
    (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
    (reader,) = launch.readers.values()
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
    ask = Ask("m", messages=[{"role": "user", "content": "Hi"}], tools=[tool], seed=3, stop=["."])
    body = VLLM.write(ask, reader, "m0", 7)
    wanted: dict[str, Any] = {"model": "m0", "stream": True, "stream_options": {"include_usage": True}}
    wanted |= {"max_tokens": 7, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 3, "stop": ["."]}
    wanted |= {"stop_token_ids": reader.stop, "messages": ask.messages, "tools": [tool], "tool_choice": "none"}
    assert body == wanted
    assert "messages" not in VLLM.write(Ask("m", prompt="Once"), reader, "m0", 7)


def test_what_vllm_would_show_otherwise_is_refused(run) -> None:
    """It describes tools in an order of its own, and drops a line that one client puts before system prompts."""
    reader = VllmReader(run.merged, run.merged)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    whole = {"name": "weather", "description": "Warm?", "parameters": parameters, "strict": True}
    hi = [{"role": "user", "content": "Hi"}]
    for function, taken in (
        (whole, True),
        (dict(reversed(whole.items())), False),
        ({"name": "weather", "parameters": parameters}, False),
        ({**whole, "examples": []}, False),
    ):
        tools = [{"type": "function", "function": function}]
        if taken:
            assert reader.chat(hi, tools)
            continue
        with pytest.raises(Refusal, match=r"other tokens than in training \(look at the tools\)"):
            reader.chat(hi, tools)
    assert reader.chat([{"role": "system", "content": "Be brief."}, *hi], None)
    with pytest.raises(Refusal, match="other tokens than in training"):
        reader.chat([{"role": "system", "content": "x-anthropic-billing-header: 1\nBe brief."}, *hi], None)


def test_vllm_says_how_much_it_has_memory_for(run, vllm, tmp_path) -> None:
    (launch,) = launch_vllm(find_served([str(run.path)]), tmp_path, lambda: 4321)
    (reader,) = launch.readers.values()
    VLLM.fit(launch, [{"id": "m0", "max_model_len": 100_000}, {"id": "an adapter", "max_model_len": None}])
    assert reader.context == 512
    VLLM.fit(launch, [{"id": "m0", "max_model_len": 96}])
    assert reader.context == 96


@pytest.mark.parametrize("streamed", [False, True], ids=["as its status", "in its stream"])
def test_a_passed_field_that_the_engine_refuses_is_the_users(run, streamed) -> None:
    """Without such a field it is the gateway's writing that the engine does not take: a fault."""
    error = json.dumps({"error": {"message": "bad grammar", "type": "BadRequestError", "code": 400}}).encode()

    async def engine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200 if streamed else 400, "headers": []})
        await send({"type": "http.response.body", "body": b"data: " + error + b"\n\n" if streamed else error})

    reader = Reader(run.merged, run.merged)
    with listening(engine) as url:
        make = partial(served_by, url, reader)
        with listening(make=make) as place, httpx2.Client(base_url=place, trust_env=False) as client:
            body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
            told = client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_object"}})
            assert told.status_code == 400
            wanted = {"message": "the engine does not take response_format: bad grammar", "param": "response_format"}
            assert told.json()["error"] == {**wanted, "type": "invalid_request_error", "code": "invalid_value"}
            told = client.post("/v1/chat/completions", json=body)
            assert (told.status_code, told.json()["error"]["code"]) == (502, "engine_error")


def served_by(url: str, reader: Reader) -> Gateway:
    return Gateway([Model("m", "m0", url, reader, VLLM, asyncio.Semaphore(4))], Limits())


# Processes

STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, lambda *_: None)
end = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(open(sys.argv[1], 'w').close())); "
subprocess.Popen([sys.executable, "-c", end + "print('up', flush=True); time.sleep(99)", sys.argv[1]])
while True:
    time.sleep(1)
"""
"""An engine that takes no notice of SIGTERM, as vLLM while it starts, with a worker that cleans up when it is asked."""


def gone(processes: list[psutil.Process], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
            return True
        time.sleep(0.05)
    return False


def test_a_stubborn_engine_is_ended_with_its_workers(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("llama_ft.serve.tether.GRACE", 1.0)
    cleaned = tmp_path / "cleaned"

    async def go() -> list[psutil.Process]:
        line = [sys.executable, "-c", STUBBORN, str(cleaned)]
        child = await Child.start("it", line, folder=tmp_path, environment=os.environ)
        while "up" not in child.said():
            await asyncio.sleep(0.05)
        processes = [psutil.Process(child.process.pid), *psutil.Process(child.process.pid).children(recursive=True)]
        await child.stop()
        assert not child.alive
        return processes

    processes = asyncio.run(go())
    assert len(processes) == 3, "engine, worker and watcher"
    assert gone(processes)
    assert cleaned.exists(), "the worker was asked before it was ended"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing ties them")
@pytest.mark.parametrize("which", ["the server", "the engine"])
def test_workers_do_not_outlive_a_killed(which, tmp_path) -> None:
    """As vLLM's do by themselves, with the model in their memory."""
    cleaned = tmp_path / "cleaned"
    code = (
        "import asyncio, os, sys\nfrom pathlib import Path\nfrom llama_ft.serve.child import Child\n"
        "async def go():\n"
        "    child = await Child.start('it', sys.argv[1:], folder=Path('.'), environment=os.environ)\n"
        "    while 'up' not in child.said(): await asyncio.sleep(0.05)\n"
        "    print(child.process.pid, flush=True)\n    await asyncio.sleep(99)\n"
        "asyncio.run(go())"
    )
    line = [sys.executable, "-c", code, sys.executable, "-c", STUBBORN, str(cleaned)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, start_new_session=True) as server:
        engine = psutil.Process(int(server.stdout.readline()))
        processes = [engine, *engine.children(recursive=True)]
        assert len(processes) == 3
        os.kill(server.pid if which == "the server" else engine.pid, signal.SIGKILL)
        assert gone(processes)
        server.kill()
    assert cleaned.exists()


def test_the_cause_of_a_death_is_shown(tmp_path) -> None:
    """vLLM's worker says it, then its engine and its front, each in a page of traceback; the last lines are noise."""
    log = (
        "(APIServer pid=1) WARNING 01-01 [a.py:1] this can cause `OSError: [Errno 24] Too many open files`\n"
        "(Worker pid=3) ERROR 01-01 [b.py:2]     raise ValueError(\n"
        "(Worker pid=3) ERROR 01-01 [b.py:2] ValueError: no room for 4000 GiB\n"
        "(Worker pid=3) ERROR 01-01 [b.py:9] ValueError: no room for 4000 GiB\n"
        "vllm.exceptions.EngineDeadError: see above\n"
    )

    async def go(noise: int) -> str:
        line = [
            sys.executable,
            "-c",
            f"import sys; sys.stdout.write({log!r}); [print('noise', i) for i in range({noise})]",
        ]
        child = await Child.start("it", line, folder=tmp_path, environment=os.environ)
        fault = await child.ended()
        await child.stop()
        return str(fault)

    said = asyncio.run(go(50)).splitlines()
    assert said[0] == "it ended with status 0; its last words:"
    wanted = ["ValueError: no room for 4000 GiB", "vllm.exceptions.EngineDeadError: see above"]
    assert said[1:] == [f"    {line}" for line in [*wanted, *(f"noise {i}" for i in range(35, 50))]]
    assert asyncio.run(go(3)).count("no room for") == 2, "what the last lines hold is not said twice"


def test_a_command_that_cannot_be_run(tmp_path) -> None:
    odd = tmp_path / "vllm"
    odd.write_bytes(b"\x00\x01")
    odd.chmod(0o755)

    async def go() -> str:
        child = await Child.start("vLLM (m)", [str(odd)], folder=tmp_path, environment=os.environ)
        fault = await child.ended()
        await child.stop()
        return str(fault)

    assert (
        asyncio.run(go())
        == f"vLLM (m) ended with status 1; its last words:\n    {odd} cannot be run: Exec format error"
    )


def test_an_engine_needs_nothing_of_our_environment(tmp_path) -> None:
    async def go() -> MachineFault:
        line = [sys.executable, "-c", "import os; print(sorted(os.environ))"]
        child = await Child.start("it", line, folder=tmp_path, environment={"ALONE": "1"})
        fault = await child.ended()
        await child.stop()
        return fault

    said = str(asyncio.run(go()))
    assert "'ALONE'" in said
    assert "PATH" not in said


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
