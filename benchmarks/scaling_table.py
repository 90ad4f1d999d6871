"""Model × cards → launch config, memory, micro-batch and exchange: the tables of docs/scaling.md, by calculation alone.

    python -m benchmarks.scaling_table

Each line is one recipe with another base and method, planned on named cards: `llama-ft plan` with the overrides of
`line_of` gives the same figures. Nothing here was run on those cards.
"""

from __future__ import annotations

from llama_ft.plan.choose import Choice, simplest
from llama_ft.plan.communication import exchange
from llama_ft.plan.data import data_facts
from llama_ft.plan.engine import Engine
from llama_ft.plan.hardware import parse_hardware
from llama_ft.plan.memory import Case
from llama_ft.plan.plan import ALTERNATIVES
from llama_ft.plan.shape import known_shape
from llama_ft.plan.weights import Weights
from llama_ft.recipe import load_recipe

RECIPE = "llama-3/llama-3.1-8b-lora"
SHARED = ("data=[{use: sharegpt-v3}]", "training.global_batch=128", "sequence.max_length=2048")
MODELS = {
    "Llama 3.2 1B": "meta-llama/Llama-3.2-1B-Instruct",
    "Llama 3.2 3B": "meta-llama/Llama-3.2-3B-Instruct",
    "Llama 3.1 8B": "meta-llama/Llama-3.1-8B-Instruct",
    "Llama 2 13B": "meta-llama/Llama-2-13b-hf",
    "Llama 3.1 70B": "meta-llama/Llama-3.1-70B-Instruct",
}
METHODS = ("lora", "qlora", "full")
CARDS = ("RTX-4090", "2xRTX-4090", "A100-80GB", "H100-80GB", "8xA100-80GB", "8xH100-80GB", "64xH100-80GB")
HEAD = (
    "| model | cards | launch config | checkpointing | micro-batch, largest | GiB a device | GiB sent a step | "
    "main memory: GiB held, moved a step |"
)


def overrides(base: str, method: str) -> list[str]:
    """The recipe's changes for one line but its launch config and checkpointing."""
    return [*SHARED, f"model.base={base}", f"adapter.method={method}"]


def line_of(model: str, method: str, cards: str, choice: Choice) -> list[str]:
    """The arguments of `llama-ft plan` that give a line's figures."""
    changed = overrides(MODELS[model], method)
    changed += [f"training.gradient_checkpointing={str(choice.checkpointing).lower()}"]
    return [RECIPE, *changed, f"launch=accelerate_configs/{choice.config}.yaml", "--hardware", cards]


def chosen(model: str, method: str, cards: str) -> Choice | None:
    """The simplest config that fits."""
    recipe = load_recipe(RECIPE, overrides(MODELS[model], method))
    return simplest(recipe, known_shape(recipe.model), data_facts(recipe), parse_hardware(cards))


def figures(choice: Choice | None) -> str:
    """What stands behind the model and the cards on a line."""
    if choice is None:
        return "nothing fits | | | | | |"
    plan, moved = choice.plan, choice.plan.exchange
    again = "on" if choice.checkpointing else "off"
    main = f"{choice.main_memory / 2**30:,.0f}, {moved.host / 2**30:,.0f}" if choice.main_memory else ""
    sent = f"{moved.sent / 2**30:,.2f}" if moved.sent else ""
    micro = f"{plan.cut.micro_batch}, {plan.fit.largest}"
    return f"{choice.config} | {again} | {micro} | {plan.peak / 2**30:.1f} | {sent} | {main} |"


def table(method: str) -> str:
    """The table of a method, in Markdown. Cards with the same figures share a line."""
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    for model in MODELS:
        shown: dict[str, list[str]] = {}
        for cards in CARDS:
            shown.setdefault(figures(chosen(model, method, cards)), []).append(cards)
        lines += [f"| {model} | {', '.join(cards)} | {line}" for line, cards in shown.items()]
    return "\n".join(lines)


def by_engine() -> str:
    """GiB that a device of Llama 3.1 8B sends in a step of 128 documents under each engine, two documents a pass."""
    lines = ["| engine | full, 8 H100 | full, 64 H100 | LoRA, 8 H100 | LoRA, 64 H100 |", "|---|---|---|---|---|"]
    for engine in ALTERNATIVES:
        cells = []
        for method in ("full", "lora"):
            changed = [*overrides(MODELS["Llama 3.1 8B"], method), "training.gradient_checkpointing=true"]
            recipe = load_recipe(RECIPE, changed)
            weights = Weights(known_shape(recipe.model).shape, recipe.adapter)
            for devices, passes in ((8, 8), (64, 1)):
                case = Case.of(weights, recipe.training, "bfloat16", Engine(engine, devices), on_gpu=True)
                cells.append(f"{exchange(case, passes).sent / 2**30:,.2f}")
        lines.append(f"| {engine} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints all tables."""
    for method in METHODS:
        print(f"### {method}\n\n{table(method)}\n")
    print(by_engine())


if __name__ == "__main__":
    main()
