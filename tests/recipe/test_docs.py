"""docs/recipes.md says what the schema says, and its example of a report is a real one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llama_ft.errors import UserError
from llama_ft.recipe import load_recipe
from llama_ft.recipe.reference import key_tables

DOCS = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
pytestmark = pytest.mark.skipif(not DOCS.is_file(), reason="the documentation is not shipped with the package")


def test_key_tables_equal_the_schema() -> None:
    """If this fails: paste the output of `python -m llama_ft.recipe.reference` between the two marks."""
    text = DOCS.read_text(encoding="utf-8")
    found = text.split("<!-- keys: begin -->\n")[1].split("<!-- keys: end -->")[0]
    assert found.strip() == key_tables().strip()


def test_the_example_of_a_report_is_real(here: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    recipe = re.search(r"```yaml\n# mine\.yaml\n(.*?)```", text, re.S)
    report = re.search(r"```text\n(llama-ft: cannot go on.*?)```", text, re.S)
    assert recipe and report
    Path("mine.yaml").write_text("# mine.yaml\n" + recipe[1])
    with pytest.raises(UserError) as caught:
        load_recipe("mine.yaml")
    assert report[1].strip() == caught.value.block()
