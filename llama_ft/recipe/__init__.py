"""YAML -> Recipe: schema, `extends`, overrides, and every mistake at once with its place."""

from llama_ft.recipe.emit import dump
from llama_ft.recipe.load import Resolved, load_recipe, resolve
from llama_ft.recipe.schema import Recipe

__all__ = ["Recipe", "Resolved", "dump", "load_recipe", "resolve"]
