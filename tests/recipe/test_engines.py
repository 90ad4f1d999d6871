"""What an engine cannot train is refused by name, with the reason, when the recipe is validated."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from llama_ft.recipe.engines import unfit
from llama_ft.recipe.launchers import read_launcher

CUT = ("FSDP2", "ZeRO-3")
WHOLE = ("", "DDP", "ZeRO-1", "ZeRO-2")


@pytest.mark.parametrize("engine", [*CUT, *WHOLE])
def test_quantised_weights_are_never_cut(engine):
    found = unfit(engine, method="qlora", optimizer="adamw")
    assert [one.key for one in found] == (["adapter.method"] if engine in CUT else [])


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "muon"])
@pytest.mark.parametrize("engine", [*CUT, *WHOLE])
def test_an_optimizer_that_looks_at_whole_matrices_gets_them(engine, optimizer):
    found = unfit(engine, method="full", optimizer=optimizer)
    assert [one.key for one in found] == (["training.optimizer"] if engine not in ("", "DDP") else [])


def test_what_an_engine_trains_is_not_refused():
    for engine in (*CUT, *WHOLE):
        for method in ("full", "lora"):
            assert unfit(engine, method=method, optimizer="adamw") == []
    assert [one.key for one in unfit("ZeRO-3", method="lora", optimizer="adamw", whole_modules=True)] == [
        "adapter.modules_to_save"
    ]
    assert [one.key for one in unfit("ZeRO-3", method="lora", optimizer="adamw", dora=True)] == ["adapter.dora"]
    assert [one.key for one in unfit("FSDP", method="full", optimizer="adamw")] == ["launch"]


@pytest.mark.parametrize("objective", ["reward", "grpo", "rloo", "rejection_sampling"])
def test_what_needs_whole_weights_is_refused_by_name_where_they_are_cut(objective):
    for engine in (*CUT, *WHOLE):
        found = unfit(engine, method="lora", optimizer="adamw", objective=objective)
        assert [one.key for one in found] == (["training.objective"] if engine in CUT else [])
        assert all(engine in one.what for one in found)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_second_model_is_not_held_beside_shards(objective):
    def found(engine: str, **keys: str) -> list[str]:
        return [one.key for one in unfit(engine, optimizer="adamw", objective=objective, **keys)]

    for engine in CUT:
        assert found(engine, method="full", reference="copy") == ["preference.reference"]
        assert found(engine, method="full", reference="precomputed") == found(engine, method="full") == []
    assert found("ZeRO-2", method="full", reference="copy") == []


def test_a_recipe_is_refused_where_the_method_is_written():
    with pytest.raises(UserError) as error:
        load_recipe("guanaco/smollm2-135m-qlora", ["launch=accelerate_configs/fsdp2.yaml"])
    (problem,) = [one for one in error.value.problems if "cannot cut up" in one.what]
    assert problem.key == "adapter.method" and "llama-7b-qlora.yaml:" in str(problem.where)
    assert "method: lora" in str(problem.hint)


@pytest.mark.parametrize("name", ["tp", "cp", "sp", "dp_replicate"])
def test_a_launch_config_of_other_parallelism_is_refused(tmp_path: Path, name):
    file = tmp_path / "launch.yaml"
    file.write_text(
        f"distributed_type: FSDP\nnum_processes: 4\nparallelism_config: {{parallelism_config_{name}_size: 2}}\n"
    )
    (problem,) = read_launcher(file)  # type: ignore[misc]
    assert f"parallelism_config_{name}_size is 2" in problem.what
    file.write_text(
        "distributed_type: FSDP\nnum_processes: 4\nparallelism_config: {parallelism_config_dp_shard_size: 4}\n"
    )
    assert not isinstance(read_launcher(file), list)
