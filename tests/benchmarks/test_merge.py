"""The merge benchmark at the size of a toy: its contenders give the same weights, and it notices where they do not."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.merge import ROUNDED, changed, copy, largest_difference, make_adapter, make_base, merge_ours, merge_peft


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    base = make_base(folder, "tiny")
    adapter = make_adapter(base, folder)
    copy(base, folder / "copied")
    merge_ours(base, adapter, folder / "ours")
    merge_peft(base, adapter, folder / "peft")
    return folder


def test_what_is_timed_is_the_same_work(folder):
    assert largest_difference(folder / "ours", folder / "peft", every=1) <= ROUNDED
    assert changed(folder / "base", folder / "ours")
    assert not changed(folder / "base", folder / "copied"), "a copy is no merge"
    assert largest_difference(folder / "copied", folder / "base", every=1) == 0


def test_one_wrong_row_is_found(folder, tmp_path):
    (source,) = (folder / "ours").glob("*.safetensors")
    tensors = load_file(source)
    tensors["model.layers.1.mlp.up_proj.weight"][-1] += 0.01
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert largest_difference(tmp_path, folder / "peft", every=1) > ROUNDED
    tensors["model.embed_tokens.weight"] += torch.ones(()).to(torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert not changed(folder / "base", tmp_path), "an embedding that no adapter sits on has moved"
