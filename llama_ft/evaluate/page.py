"""eval.html: the results of a run or a model as one HTML file, in the frame and style of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import llama_ft.train.page.write as report
from llama_ft.data.page.shell import whole_page
from llama_ft.data.page.tokens import plural, safe
from llama_ft.errors import UserError
from llama_ft.evaluate.pictures import picture
from llama_ft.evaluate.result import SuiteResult, read_results
from llama_ft.evaluate.table import notes, suite_rows
from llama_ft.files import write_text
from llama_ft.train.page.html import section, table, text
from llama_ft.train.page.sections import answer_row

SHOWN = 40
"""Items of a suite whose answers stand on the page; the JSON has all."""
ORDER = ("unscaled", "base", "tuned", "merged")


def by_suite(results: Sequence[SuiteResult]) -> list[list[SuiteResult]]:
    """Results of the same suite together, base before tuned before merged."""
    groups: dict[str, list[SuiteResult]] = {}
    for result in results:
        groups.setdefault(result.suite, []).append(result)
    rank = {name: place for place, name in enumerate(ORDER)}
    return [sorted(group, key=lambda one: (rank.get(one.subject, len(rank)), one.subject)) for group in groups.values()]


def write_page(folder: Path, name: str, target: Path) -> Path:
    """Writes the page of all results in a folder. UserError if it cannot be written."""
    try:
        write_text(target, page(name, by_suite(read_results(folder))))
    except OSError as error:
        raise UserError(f"the page cannot be written: {error.strerror or error}", where=str(target)) from error
    return target


def page(name: str, suites: Sequence[Sequence[SuiteResult]]) -> str:
    """The whole page."""
    parts = [(f"suite-{place}", safe(group[0].suite), _suite(place, group)) for place, group in enumerate(suites)]
    subjects = list(dict.fromkeys(result.subject for group in suites for result in group))
    lede = f"{plural(len(suites), 'suite')}: {', '.join(safe(group[0].suite) for group in suites)}. "
    return whole_page(
        report.HERE,
        title=f"{safe(name)}: evaluation",
        header=f"""<a class="skip" href="#content">Skip to the content</a>
<header class="page"><p class="kind">llama-ft eval</p><h1>{safe(name)}</h1>
<p class="lede">{lede}Measured: {", ".join(map(safe, subjects))}.</p></header>""",
        notes="",
        sections=parts,
    )


def _suite(place: int, group: Sequence[SuiteResult]) -> str:
    head, *body = [[safe(cell) for cell in row] for row in suite_rows(group)]
    said = "".join(f"<li>{safe(note)}</li>" for note in notes(group))
    about = (
        "95 % bootstrap intervals over items. Differences are of the same items in pairs; * where the interval does "
        "not hold 0."
    )
    scores = table(safe(group[0].suite), head, body)
    scores += picture(group)
    answers = _answers(group)
    title = safe(group[0].suite)
    return section(f"suite-{place}", title, about, f'{scores}<ul class="notes">{said}</ul>{answers}')


def _answers(group: Sequence[SuiteResult]) -> str:
    """What was answered, item by item, all subjects under one question; nothing for items that nobody answered."""
    said: dict[str, dict[str, str]] = {}
    asked: dict[str, str] = {}
    wanted: dict[str, str] = {}
    for result in group:
        for row in result.rows:
            item = str(row["id"])
            said.setdefault(item, {})[result.subject] = str(row.get("answer") or "")
            asked[item] = str(row.get("asked", ""))
            wanted[item] = str(row.get("wanted", ""))
    said = {item: answers for item, answers in said.items() if any(answers.values())}
    articles = []
    for item in list(said)[:SHOWN]:
        rows = answer_row("wanted", wanted[item], "reference") if wanted[item] else ""
        for result in group:
            if result.subject in said[item]:
                kind = "before" if result.subject == "base" else "after"
                rows += answer_row(safe(result.subject), said[item][result.subject], kind)
        question = f'<p class="asked" dir="auto">{text(asked[item])}</p>'
        articles.append(f'<article class="sample"><h3>{safe(item)}</h3>{question}<dl>{rows}</dl></article>')
    if not articles:
        return ""
    more = len(said) - len(articles)
    rest = f'<p class="about">and {plural(more, "more item")} in the JSON file</p>' if more else ""
    return f"<details><summary>{plural(len(said), 'answer')}</summary>{''.join(articles)}{rest}</details>"
