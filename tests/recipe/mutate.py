"""Seeded ways to spoil a recipe. Each takes the random generator and the file's text and returns bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import yaml

from llama_ft.recipe import Recipe
from llama_ft.recipe.fields import fields_of

Mutator = Callable[[random.Random, str], bytes]
_WORDS = ["x", "training", "r", "data", "no", "base", "zzz_unknown", "optim", "a b", "7", "learning-rate"]


def _parents(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a tree."""
    pairs: list[tuple[Any, Any]] = []
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        pairs.append((node, key))
        if isinstance(value, (dict, list)):
            pairs += _parents(value)
    return pairs


def _dump(rng: random.Random, tree: Any) -> bytes:
    style = rng.choice([None, False, True])
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=style, width=rng.choice([40, 1000])).encode()


def _keys(tree: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    # `extends` is left alone: without it most of a recipe is gone, and every mutant would look the same.
    return [(node, key) for node, key in _parents(tree) if isinstance(node, dict) and key != "extends"]


def _typo(rng: random.Random, word: str) -> str:
    at = rng.randrange(len(word))
    other = rng.choice("abcxyz_-")
    return rng.choice([word[:at] + word[at + 1 :], word[:at] + other + word[at:], word[:at] + other + word[at + 1 :]])


def rename(rng: random.Random, text: str) -> bytes:
    """A key gets a typo or another name."""
    tree = yaml.safe_load(text)
    node, key = rng.choice(_keys(tree))
    new = rng.choice([_typo(rng, key), _typo(rng, key), rng.choice(_WORDS)])
    items = [(new if name == key else name, value) for name, value in node.items()]
    node.clear()
    node.update(items)
    return _dump(rng, tree)


def delete(rng: random.Random, text: str) -> bytes:
    """A key without a default goes. A parent states none, so one of its keys is renamed."""
    tree = yaml.safe_load(text)
    required = [name for name, field in fields_of(Recipe).items() if field.required]
    if "name" not in tree:
        return rename(rng, text)
    del tree[rng.choice([key for key in required if key in tree])]
    return _dump(rng, tree)


def retype(rng: random.Random, text: str) -> bytes:
    """A value becomes one of another type, or out of range."""
    tree = yaml.safe_load(text)
    node, key = rng.choice([pair for pair in _parents(tree) if pair[1] != "extends"])
    old = node[key]
    other: list[Any] = [{"a": 1}, [[1]], {}, [None], -1, "a value", True, 1e99, float("inf"), "", float("nan")]
    node[key] = rng.choice([value for value in other if type(value) is not type(old)])
    return _dump(rng, tree)


def nest(rng: random.Random, text: str) -> bytes:
    """A value sinks a level, into a map or a list, or a section's keys rise one."""
    tree = yaml.safe_load(text)
    node, key = rng.choice([pair for pair in _parents(tree) if pair[1] != "extends"])
    if isinstance(node, dict) and isinstance(node[key], dict) and rng.random() < 0.4:
        node.update(node.pop(key))
    else:
        node[key] = rng.choice([{str(key): node[key]}, [node[key]], [[node[key]]]])
    return _dump(rng, tree)


def duplicate(rng: random.Random, text: str) -> bytes:
    """A line with a key stands twice."""
    lines = text.splitlines()
    numbers = [n for n, line in enumerate(lines) if ":" in line and not line.lstrip().startswith(("#", "-"))]
    at = rng.choice(numbers)
    lines.insert(rng.choice([at, at + 1]), lines[at])
    return "\n".join(lines).encode()


def _outside_comments(text: str) -> list[int]:
    """Positions where a change can do harm; the texts of `deviations` take anything."""
    starts = [text.rfind("\n", 0, at) + 1 for at in range(len(text))]
    lines = [text[start : text.find("\n", start)] for start in starts]
    return [
        at
        for at, (start, line) in enumerate(zip(starts, lines, strict=True))
        if not line.lstrip().startswith(("#", "- ")) and "#" not in text[start : at + 1]
    ]


def stray(rng: random.Random, text: str) -> bytes:
    """A sign of YAML's own lands where it does harm: outside of comments."""
    at = rng.choice(_outside_comments(text))
    sign = rng.choice(
        ["[", "]", "{", "}", '"', "'", ": ", "\t", "*x ", "&x ", "!!x ", "@", "%", "- ", ", ", "\n ", "\0", "| ", "? "]
    )
    return (text[:at] + sign + text[at:]).encode()


def flip(rng: random.Random, text: str) -> bytes:
    """Two to four bits flip."""
    raw = bytearray(text.encode())
    for at in rng.sample(_outside_comments(text), rng.randint(2, 4)):
        raw[at] ^= 1 << rng.randrange(8)
    return bytes(raw)


def truncate(rng: random.Random, text: str) -> bytes:
    """The file ends early."""
    raw = text.encode()
    return raw[: rng.randrange(len(raw))]


def indent(rng: random.Random, text: str) -> bytes:
    """A line moves to another depth."""
    lines = text.splitlines()
    at = rng.choice([n for n, line in enumerate(lines) if line and not line.startswith("#")])
    lines[at] = rng.choice([" ", "   ", "\t"]) + lines[at] if rng.random() < 0.7 else lines[at].lstrip()
    return "\n".join(lines).encode()


MUTATORS: tuple[Mutator, ...] = (rename, delete, retype, nest, duplicate, stray, flip, truncate, indent)
