"""Small pieces of HTML: text that stays text, tables that become blocks on a phone, lists of facts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llama_ft.data.page.tokens import safe


def text(value: object) -> str:
    """Text of a model or a data set as HTML: lines and tabs stay, what would not show or would move others is named."""
    return "\n".join("\t".join(map(safe, line.split("\t"))) for line in str(value).splitlines())


def section(anchor: str, title: str, about: str, body: str) -> str:
    """A section of the page; nothing if it has no body."""
    if not body:
        return ""
    said = f'<p class="about">{about}</p>' if about else ""
    return f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{title}</h2><div>{said}{body}</div></section>\n'


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column names the row; cells are HTML.

    The roles restate what a table says of itself, for on a phone each row becomes a block.
    """
    columns = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in head)
    body = "".join(
        f'<tr role="row"><th scope="row" role="rowheader">{first}</th>'
        + "".join(f'<td role="cell" data-name="{name}">{cell}</td>' for name, cell in zip(head[1:], cells, strict=True))
        + "</tr>"
        for first, *cells in rows
    )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}"><table role="table">'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>'
    )


def facts(pairs: Iterable[tuple[str, str]], kind: str) -> str:
    """Names and values (HTML) as a list; pairs without a value are left out."""
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs if value)
    return f'<dl class="{kind}">{items}</dl>' if items else ""


def number(value: float, digits: int = 4) -> str:
    """A number for people: four significant digits, thousands grouped, small ones in powers of ten."""
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, power = f"{value:.{digits - 2}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:.{digits}g}"


def loss(value: float) -> str:
    """Nats as a report gives them: three decimals, and more of what is almost nothing."""
    return f"{value:.3f}" if abs(value) >= 0.1 or not value else number(value)


def duration(seconds: float) -> str:
    """`48 s`, `12 min 30 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
