"""Numbers as people read them."""

from __future__ import annotations


def gib(size: float) -> str:
    """`5.31 GiB`, `412 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `5.2 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 3 * 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{seconds / 86400:.1f} days"


def count(number: float) -> str:
    """`6.98B`, `41.9M`, `1,234`; `1.8e+20` beyond 999T."""
    if number >= 999.5e12:
        return f"{number:.3g}"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= 0.9995 * size:  # 999.9B is 1T and not 1e+03B
            return f"{number / size:.3g}{unit}"
    return f"{number:,.0f}"
