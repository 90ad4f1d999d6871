"""The door: what a source is, whole or not at all, the command, and `model.base` of other formats."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from llama_ft.cli import app
from llama_ft.errors import MachineFault, UserError
from llama_ft.llama.base import locate_base
from llama_ft.llama.checkpoints import progress
from llama_ft.llama.checkpoints.door import import_checkpoint, open_checkpoint
from llama_ft.recipe import load_recipe
from tests.llama.formats import state_of, tiny_llama, write_gguf, write_llama2c, write_meta
from tests.tiny_run import make_base

MODEL = tiny_llama()


@pytest.fixture(params=["meta", "llama2c", "gguf", "hf"])
def source(request, tmp_path) -> Path:
    """The same weights in each format."""
    if request.param == "meta":
        write_meta(tmp_path / "meta", MODEL, 2)
        return tmp_path / "meta"
    if request.param == "llama2c":
        write_llama2c(tmp_path / "model.bin", MODEL, 0)
        return tmp_path / "model.bin"
    if request.param == "gguf":
        write_gguf(tmp_path / "model.gguf", MODEL)
        return tmp_path / "model.gguf"
    MODEL.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_every_format_gives_the_same_folder(source, tmp_path):
    done = import_checkpoint(source, tmp_path / "deep" / "out")
    written, expected = load_file(done.path / "model.safetensors"), state_of(MODEL)
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())
    config = json.loads((done.path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["dtype"] == "float32"
    assert (done.path / "generation_config.json").is_file()
    assert (done.tensors, done.bytes) == (len(expected), sum(tensor.nbytes for tensor in expected.values()))


def test_content_decides_not_the_name(tmp_path):
    write_gguf(tmp_path / "weights.dat", MODEL)
    assert open_checkpoint(tmp_path / "weights.dat").kind.startswith("GGUF")
    write_meta(tmp_path / "meta", MODEL)
    (tmp_path / "meta" / "consolidated.00.pth").rename(tmp_path / "meta" / "model.bin")
    assert open_checkpoint(tmp_path / "meta" / "model.bin").kind.startswith("Meta")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "holds no checkpoint that can be read (found: nothing)"),
        (["a.gguf", "b.gguf"], "name the file: "),
        (["model.safetensors"], "config.json is missing"),
        (["params.json"], "consolidated.NN.pth is missing beside params.json"),
        (["notes.txt"], "formats: HF safetensors, Meta's consolidated.NN.pth"),
    ],
)
def test_folders_that_are_none(tmp_path, names, said):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("x")
    with pytest.raises(UserError, match=r"holds no checkpoint") as caught:
        import_checkpoint(folder, tmp_path / "out")
    assert said in str(caught.value)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "modle.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"there is no file or folder .*model.gguf — did you mean 'modle.gguf'"):
        import_checkpoint(tmp_path / "model.gguf", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("hello there")
    with pytest.raises(UserError, match=r"is no checkpoint that can be read"):
        import_checkpoint(tmp_path / "notes.txt", tmp_path / "out")
    (tmp_path / "broken.pt").write_text("hello there")
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(UserError, match=r"broken\.pt"):
        import_checkpoint(tmp_path / "broken.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dest_is_never_mixed_or_lost(source, tmp_path):
    dest = tmp_path / "out"
    dest.mkdir()
    import_checkpoint(source, dest)  # empty: fine
    before = (dest / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"exists and is not empty — name another folder, or add --overwrite"):
        import_checkpoint(source, dest)
    (dest / "stale").write_text("x")
    import_checkpoint(source, dest, overwrite=True)
    assert (dest / "model.safetensors").read_bytes() == before
    assert not (dest / "stale").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match=r"is no model folder, it will not be replaced"):
        import_checkpoint(source, tmp_path / "mine", overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"is a file, a folder is needed"):
        import_checkpoint(source, tmp_path / "file", overwrite=True)
    with pytest.raises(UserError, match=r"holds the source itself|is no model folder"):
        import_checkpoint(source, source if source.is_dir() else source.parent, overwrite=True)
    assert open_checkpoint(source)


def test_a_failed_overwrite_keeps_what_was_there(tmp_path):
    write_meta(tmp_path / "meta", MODEL)
    dest = import_checkpoint(tmp_path / "meta", tmp_path / "out").path
    before = {path.name: path.read_bytes() for path in dest.iterdir()}
    broken = tiny_llama()
    broken.model.norm.weight.data[0] = float("inf")
    write_meta(tmp_path / "broken", broken)
    with pytest.raises(UserError, match=r"not finite"):
        import_checkpoint(tmp_path / "broken", dest, overwrite=True)
    assert {path.name: path.read_bytes() for path in dest.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "meta", "out"]


def test_a_disk_that_is_really_full(source, tmp_path):
    """A file size limit of the process stands in for a full disk: the kernel refuses the write itself."""
    checked = open_checkpoint(source)  # what transformers caches while it opens is not the import's
    assert checked.shapes
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(MachineFault, match=r"could not write out: .* nothing is half-written"):
            import_checkpoint(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_too_little_space_is_said_before_anything_is_written(source, tmp_path, monkeypatch):
    little = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    with pytest.raises(MachineFault, match=r"needs 0\.03 GiB and 0\.00 GiB are free"):
        import_checkpoint(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_is_plain_lines_off_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_QUIET", 0)
    monkeypatch.setattr(progress, "_EVERY", 0.0)
    write_meta(tmp_path / "meta", MODEL)
    import_checkpoint(tmp_path / "meta", tmp_path / "out")
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == len(state_of(MODEL))
    assert lines[-1].startswith("importing meta: 0.0 of 0.0 GB")
    assert printed.out == ""


# The command


def test_the_command(source, tmp_path):
    run = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert run.exit_code == 0, run.output
    assert f"{tmp_path / 'out'}: " in run.stdout
    assert "20 tensors" in run.stdout.replace("21 tensors", "20 tensors")
    assert "bfloat16" in run.stdout
    again = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out")])
    assert again.exit_code == 2
    assert "exists and is not empty" in again.output
    assert "Traceback" not in again.output
    forced = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "out"), "--overwrite"])
    assert forced.exit_code == 0
    odd = CliRunner().invoke(app, ["import", str(source), str(tmp_path / "more"), "--dtype", "float15"])
    assert (odd.exit_code, "did you mean 'float16'?" in odd.output) == (2, True)


def test_the_command_names_what_is_missing(tmp_path):
    for name in ("./nowhere", str(tmp_path / "nowhere.gguf"), "a/b/c"):
        run = CliRunner().invoke(app, ["import", name, str(tmp_path / "out")])
        assert run.exit_code == 2
        assert "there is no file or folder" in run.output
    hub = CliRunner().invoke(app, ["import", "owner/name", str(tmp_path / "out")])
    assert (hub.exit_code, "the model 'owner/name' is not on this machine" in hub.output) == (2, True)


# model.base


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_base_of_another_format_is_converted_once(source, cache, capsys):
    folder = locate_base(str(source))
    state = load_file(folder / "model.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in state_of(MODEL).items())
    if (source / "config.json").is_file():
        assert folder == source, "an HF folder is used as it is"
        return
    assert folder.is_relative_to(cache)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert f"converting {source} once into {folder}" in capsys.readouterr().err
    assert locate_base(str(source)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert capsys.readouterr().err == ""
    changed = source if source.is_file() else source / "params.json"
    os.utime(changed, ns=(1, 1))
    assert locate_base(str(source)) != folder, "a changed source is another model"


def test_a_preview_converts_no_weights(tmp_path, cache):
    write_meta(tmp_path / "meta", MODEL)
    light = locate_base(str(tmp_path / "meta"), weights=False)
    assert (light / "config.json").is_file()
    assert not list(light.glob("*.safetensors"))
    whole = locate_base(str(tmp_path / "meta"))
    assert (whole / "model.safetensors").is_file()
    assert locate_base(str(tmp_path / "meta"), weights=False) == whole


def test_two_processes_convert_once(tmp_path, cache):
    write_meta(tmp_path / "meta", MODEL)
    code = f"from llama_ft.llama.base import locate_base; print(locate_base({str(tmp_path / 'meta')!r}))"
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert sum("converting" in err for _, err in outputs) == 1


def test_a_damaged_base_leaves_nothing_in_the_cache(tmp_path, cache):
    write_llama2c(tmp_path / "model.bin", MODEL, 1)
    (tmp_path / "model.bin").write_bytes((tmp_path / "model.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"it is cut off"):
        locate_base(str(tmp_path / "model.bin"))
    assert [path.suffix for path in (cache / "models").iterdir()] == [".lock"]


def test_bases_that_are_none(tmp_path):
    with pytest.raises(UserError, match=r"model.base: preset:tiny is shapes alone"):
        locate_base("preset:tiny")
    with pytest.raises(UserError, match=r"there is no file .*gone.gguf"):
        locate_base(str(tmp_path / "gone.gguf"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"is no checkpoint that can be read"):
        locate_base(str(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"it has no config.json"):
        locate_base(str(tmp_path / "empty"))


def test_recipes_accept_what_locate_base_reads(source, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    text = {"extends": "quickstart", "name": "x", "model": {"base": str(source)}}
    recipe.write_text(json.dumps(text))
    assert load_recipe(str(recipe), []).model.base == str(source)
    recipe.write_text(json.dumps(text | {"model": {"base": source.name}}))
    assert load_recipe(str(recipe), []).model.base == str(source), "beside the recipe, without ./ too"
    recipe.write_text(json.dumps(text | {"model": {"base": f"./{source.name}x.bin"}}))
    with pytest.raises(UserError, match=r"no such file or folder"):
        load_recipe(str(recipe), [])


def test_a_run_starts_from_meta_s_layout(tmp_path, cache):
    """A recipe's base in Meta's layout trains and answers as the HF folder it came from."""
    from transformers import LlamaForCausalLM as HFLlama

    base = make_base(tmp_path / "base", tied=False)
    model = HFLlama.from_pretrained(base)
    write_meta(
        tmp_path / "meta",
        model,
        2,
        vocab_size=model.config.vocab_size,
        multiple_of=160,
        ffn_dim_multiplier=0.9,
        norm_eps=1e-6,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base / name, tmp_path / "meta" / name)
    folder = locate_base(str(tmp_path / "meta"))
    from llama_ft.llama.load import load_model
    from llama_ft.tokenizer.load import load_tokenizer

    tokens = load_tokenizer(folder)("the llama eats grass", return_tensors="pt").input_ids
    assert tokens.tolist() == load_tokenizer(base)("the llama eats grass", return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        ours = load_model(folder, torch.float32).eval()(input_ids=tokens).logits
        theirs = model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
