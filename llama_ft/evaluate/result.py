"""What a suite found out about one model: scores with intervals, one row per item, and the files they are kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_ft.errors import UserError
from llama_ft.files import write_json

DRAWS = 2000
"""Resamples of a bootstrap: the ends of a 95 % interval then rest on 50 draws each."""
TELLING = 6
"""Pairs that must differ before a difference can be sure. Five all point one way by chance once in 16 (the sign test:
2 · 2⁻⁵), which resamples of so few do not show: they are as alike as the rows."""
_AT_ONCE = 2**22
"""Indices drawn at once, so that many rows do not fill the memory."""


@dataclass(frozen=True)
class Score:
    """One number of a suite. `low`, `high`: its 95 % bootstrap interval over rows; `rows`: items that it is made of.

    name: what was measured, in a few words, unique within its suite; `DATA: MEASURE` where a suite has several data
    sets. unit: `nats`, `bits`, `share` (0 to 1) or "" for a plain number. better: which way is better.
    """

    name: str
    value: float
    low: float
    high: float
    rows: int
    unit: str
    better: Literal["higher", "lower"]


@dataclass(frozen=True)
class SuiteResult:
    """A suite's scores of one subject (`base`, `tuned`, `merged` or a model's name).

    rows: one dict per item: `id`; `asked` and `answer`, texts for people; `values`: by the name of a score the item's
    own value, or [value, weight] where the score is a weighted mean (nats per token, by tokens). Results of the same
    items are paired by `id`, see :func:`compared`. settings: seed, limit, files and what else another result must share
    to be compared with this one. leaks: what of the suite's prompts the training documents hold
    (llama_ft/evaluate/leaks.py); empty if unknown. remarks: what else to know of the scores, in sentences.
    """

    suite: str
    subject: str
    scores: list[Score]
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    seconds: float
    leaks: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def score(self, name: str) -> Score | None:
        """The score of that name."""
        return next((score for score in self.scores if score.name == name), None)

    def values(self, name: str) -> dict[str, tuple[float, float]]:
        """(value, weight) of a score's items, by id; empty for a score that is not a mean over items."""
        return {str(row["id"]): pair_of(row["values"][name]) for row in self.rows if name in row.get("values", {})}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; a value that is not finite becomes null."""
        return _finite(asdict(self))

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> SuiteResult:
        """What :meth:`as_dict` gave; keys of a later version are passed over. KeyError or TypeError for others."""
        known = {one.name for one in fields(cls)}
        names = {one.name for one in fields(Score)}
        scores = [Score(**_infinite({k: v for k, v in score.items() if k in names})) for score in value["scores"]]
        return cls(**{**{k: v for k, v in value.items() if k in known}, "scores": scores})

    def write(self, folder: Path) -> Path:
        """Writes SUITE-SUBJECT.json into a folder, which is made; returns the file."""
        path = folder / file_name(self.suite, self.subject)
        write_json(path, self.as_dict())
        return path

    @classmethod
    def read(cls, path: Path) -> SuiteResult:
        """A file of :meth:`write`. Raises UserError where it is none."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "measure it again: llama-ft eval … --overwrite"
            raise UserError("this is no result of an evaluation", where=str(path), hint=hint) from error


def file_name(suite: str, subject: str) -> str:
    """`heldout-tuned.json`; what a file system would not take in a subject's name becomes a dash."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in subject).strip(".")
    return f"{suite}-{safe or 'model'}.json"


def read_results(folder: Path) -> list[SuiteResult]:
    """All results of a run's eval/ folder, by file name; other files there, and damaged ones, are passed over."""
    found = []
    for path in sorted(folder.glob("*-*.json")):
        try:
            found.append(SuiteResult.read(path))
        except UserError:
            continue
    return found


def pair_of(value: Any) -> tuple[float, float]:
    """(value, weight) of an entry of a row's `values`, whose weight is 1 where it says none."""
    if isinstance(value, list | tuple):
        return (math.nan if value[0] is None else float(value[0])), float(value[1])
    return (math.nan if value is None else float(value)), 1.0


def scored(
    rows: Sequence[dict[str, Any]], name: str, unit: str, better: Literal["higher", "lower"], seed: int = 0
) -> Score:
    """The mean over all rows whose `values` hold this name, with its interval. NaN where no row does.

    Of a share that all rows have, or none, resamples are all alike: its interval is the exact one of the binomial
    (Clopper and Pearson 1934), for 0 of n from 0 to 1 − 0.025^(1/n).
    """
    pairs = [pair_of(row["values"][name]) for row in rows if name in row.get("values", {})]
    values, weights = [value for value, _ in pairs], [weight for _, weight in pairs]
    low, high = bootstrap(values, seed, weights)
    if unit == "share" and set(weights) == {1.0} and set(values) in ({0.0}, {1.0}):
        reach = 1 - 0.025 ** (1 / len(values))
        low, high = (0.0, reach) if values[0] == 0 else (1 - reach, 1.0)
    return Score(name, mean(values, weights), low, high, len(values), unit, better)


def compared(left: SuiteResult, right: SuiteResult, seed: int = 0) -> dict[str, tuple[float, float, float, int]]:
    """Right less left of every score that both have, by name: (difference, low, high, rows), paired over the items of
    the same id and weight. A score without values of its own (perplexity), or without items in common, is left out."""
    found = {}
    for score in right.scores:
        one, other = left.values(score.name), right.values(score.name)
        shared = [item for item in one if item in other and math.isclose(one[item][1], other[item][1])]
        if left.score(score.name) is not None and shared:
            values = [[side[item][0] for item in shared] for side in (one, other)]
            weights = [one[item][1] for item in shared]
            found[score.name] = (*paired(values[0], values[1], seed, weights), len(shared))
    return found


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """Σ value·weight / Σ weight (weights 1 by default); NaN for no values."""
    if weights is None:
        return float(np.mean(values)) if len(values) else math.nan
    total = float(np.sum(weights))
    return float(np.dot(values, weights)) / total if total else math.nan


def bootstrap(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of one value per row, rows drawn with replacement.

    weights: what the mean is weighted by; a row is drawn with its weight (a ratio of sums, as nats per token is).
    (NaN, NaN) for no values, and where one is no number. Efron & Tibshirani, An Introduction to the Bootstrap (1993),
    section 13.3.
    """
    return _interval(_means(values, weights, seed))


def paired(
    left: Sequence[float], right: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None
) -> tuple[float, float, float]:
    """(right less left, low, high): the difference of means over the same rows, which are drawn in pairs.

    What makes a row hard is in both and cancels, so the interval is narrower than that of two separate samples. Where
    fewer than TELLING rows differ it is made to hold 0. Raises ValueError where the two are not of the same rows.
    """
    if len(left) != len(right):
        raise ValueError(f"{len(left)} values against {len(right)}: pairs are of the same rows")
    gaps = np.subtract(right, left).astype(float).tolist()
    low, high = bootstrap(gaps, seed, weights)
    if 0 < sum(gap != 0 for gap in gaps) < TELLING:
        low, high = min(low, 0.0), max(high, 0.0)
    return mean(gaps, weights), low, high


def _means(values: Sequence[float], weights: Sequence[float] | None, seed: int) -> np.ndarray:
    """The means of DRAWS resamples, float64."""
    count = len(values)
    if not np.isfinite(values).all() or not count:  # a mean that is no number has no interval either
        return np.empty(0)
    worth = np.ones(count) if weights is None else np.asarray(weights, float)
    products = np.asarray(values, float) * worth
    random = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    step = max(1, _AT_ONCE // count)
    for start in range(0, DRAWS, step):
        drawn = random.integers(0, count, (min(step, DRAWS - start), count))
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append(products[drawn].sum(1) / worth[drawn].sum(1))
    return np.concatenate(found)


def _interval(means: np.ndarray) -> tuple[float, float]:
    means = means[np.isfinite(means)]
    if not len(means):
        return math.nan, math.nan
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _finite(value: Any) -> Any:
    """JSON has no NaN: other readers than Python's refuse a file that holds one."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _infinite(score: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if score[key] is None else score[key] for key in score}
