"""Adapters combined with weights: what PEFT's ways give, exactly where they are exact, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from llama_ft.adapters.lora_file import read_lora
from llama_ft.errors import UserError
from llama_ft.export.combine import HOW, PRUNING, combine_runs, parse_parts
from llama_ft.export.run import export_run
from tests.export.conftest import copy_of


@pytest.fixture
def two(trained, tmp_path):
    """Two runs with other seeds of training rate, and so other adapters."""
    first = copy_of(trained()[0], tmp_path / "one")
    second = copy_of(trained()[0], tmp_path / "two")
    file = second.adapter / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    torch.manual_seed(5)
    save_file({name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in load_file(file).items()}, file)
    return first, second


def update(lora, name: str) -> torch.Tensor:
    down, up = lora.factors[name]
    return lora.scale * up @ down


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_the_exact_ways_add_the_updates(two, tmp_path, how):
    first, second = two
    run = combine_runs([(str(first.path), 0.75), (str(second.path), -0.5)], tmp_path / "both", how=how)
    found, one, other = (read_lora(each.adapter) for each in (run, first, second))
    assert found.factors.keys() == one.factors.keys()
    for name in found.factors:
        wanted = 0.75 * update(one, name) - 0.5 * update(other, name)
        if how == "svd":  # at the rank of one of them: the best that this rank can do
            left, values, right = torch.linalg.svd(wanted)
            wanted = left[:, :4] @ values[:4].diag() @ right[:4]
        torch.testing.assert_close(update(found, name), wanted, rtol=0, atol=1e-5)


def test_a_combined_run_is_proven_and_says_what_it_is(two, tmp_path):
    first, second = two
    out = tmp_path / "both"
    run = combine_runs([(str(first.path), 0.5), (str(second.path), 0.5)], out)
    assert export_run(run).ok and (run.merged / "config.json").exists()
    assert (run.recipe.name, run.recipe.adapter.r, float(run.recipe.adapter.alpha)) == ("both", 8, 8.0)
    said = run.lock["combined"]
    assert (said["how"], [one["weight"] for one in said["of"]]) == ("cat", [0.5, 0.5])
    assert "0.5 × tiny" in run.card_file.read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("how", HOW)
def test_every_way_gives_an_adapter_and_the_same_one_again(two, tmp_path, how):
    density = 0.5 if how in PRUNING else None
    items = [(str(run.path), 0.5) for run in two]
    runs = [combine_runs(items, tmp_path / name, how=how, density=density) for name in ("a", "b")]
    one, other = (read_lora(run.adapter).factors for run in runs)
    assert any(up.any() for _, up in one.values())
    assert all(torch.equal(a, b) for name in one for a, b in zip(one[name], other[name], strict=True))
    if how.startswith("dare"):
        third = read_lora(combine_runs(items, tmp_path / "c", how=how, density=density, seed=7).adapter).factors
        assert any(not torch.equal(one[name][1], third[name][1]) for name in one)


def test_all_mistakes_are_named_together(two, tmp_path):
    first, second = two
    lock = json.loads(second.lock_file.read_text())
    second.lock_file.write_text(json.dumps(lock | {"base_hash": "another"}))
    (tmp_path / "out").mkdir()
    items = [(str(first.path), 1.0), (str(second.path), 1.0)]
    with pytest.raises(UserError) as caught:
        combine_runs(items, tmp_path / "out", how="ties", density=1.5)
    assert [problem.what.partition(" ")[0] for problem in caught.value.problems] == [
        "--density",
        "its",
        str(tmp_path / "out"),
    ]
    with pytest.raises(UserError, match="there is no way 'tied'") as caught:
        combine_runs(items, tmp_path / "new", how="tied")
    assert "ties" in str(caught.value)
    with pytest.raises(UserError, match="nothing to combine"):
        combine_runs(items[:1], tmp_path / "new")
    with pytest.raises(UserError, match="say how many"):
        combine_runs([items[0]] * 2, tmp_path / "new", how="ties")


def test_weights_of_the_command_line(tmp_path):
    assert parse_parts(["runs/a=0.25", "runs/b=-1", "runs/c"]) == [("runs/a", 0.25), ("runs/b", -1.0), ("runs/c", 1.0)]
    odd = tmp_path / "lr=0.5"
    odd.mkdir()
    assert parse_parts([str(odd)]) == [(str(odd), 1.0)]
    with pytest.raises(UserError, match="weighs nothing"):
        parse_parts(["runs/a=0"])
