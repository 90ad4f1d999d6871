"""Quality steps: each rule at its threshold, on both sides of it, and the real texts through all."""

from __future__ import annotations

import json
import pickle
from itertools import islice
from pathlib import Path

import pytest

from llama_ft.data.examples import Example
from llama_ft.data.quality.c4 import c4
from llama_ft.data.quality.code import code
from llama_ft.data.quality.gopher import gopher_quality
from llama_ft.data.quality.repetition import gopher_repetition, repeats
from llama_ft.data.quality.steps import Quality
from llama_ft.data.quality.verdict import Judge
from llama_ft.errors import UserError

PROSE = "The llama of the valley ate grass and drank water, and that was all there was to be seen with the eye. "
GERMAN = "Das Lama im Tal fraß Gras und trank Wasser, und mehr war dort den ganzen Tag über nicht zu sehen. "


def words(count: int, word: str = "llama") -> str:
    """So many words, of which two are stop words and none is twice in a row alike."""
    return " ".join(["the", "of", *(f"{word}{'abcdefghij'[i % 10]}" for i in range(count - 2))])


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        (words(50), words(49), "fewer than 50 words"),
        (words(100_000), words(100_001), "more than 100,000 words"),
        (
            words(60, "abcdefghi"),
            words(60, "abcdefghijk"),
            "words of fewer than 3 or more than 10 characters on average",
        ),
        (
            " ".join(["the", "of", *["ab"] * 20, *["abcd"] * 40]),
            " ".join(["the", "of", *["ab"] * 60]),
            "words of fewer than 3 or more than 10 characters on average",
        ),
        (words(98) + " #" * 10, words(89) + " #" * 10, "more than one # or ellipsis in ten words"),
        ("… ... " * 5 + words(98), "… ... " * 5 + words(89), "more than one # or ellipsis in ten words"),
        (
            "\n".join(["- " + words(9)] * 9 + [words(9)]),
            "\n".join(["• " + words(9)] * 10 + ["", ""]),
            "more than 90% of lines begin with a bullet",
        ),
        (
            "\n".join([words(20) + "…"] * 3 + [words(20)] * 7),
            "\n".join([words(20) + " ..."] * 4 + [words(20)] * 6),
            "more than 30% of lines end with an ellipsis",
        ),
        (words(80) + " 1234" * 20, words(79) + " 1234" * 21, "fewer than 80% of words have a letter"),
        (
            "The " + words(59).replace("the", "not"),
            words(60).replace("of", "at"),
            "fewer than 2 of the English stop words",
        ),
    ],
    ids=["short", "long", "long-words", "short-words", "hashes", "ellipses", "bullets", "cut", "letters", "stop-words"],
)
def test_gopher_quality_at_its_thresholds(good: str, bad: str, rule: str) -> None:
    assert gopher_quality(good).rule is None
    assert gopher_quality(bad).rule == rule
    assert gopher_quality(bad).text == bad


def test_stop_words_are_asked_of_english_alone() -> None:
    text = GERMAN * 6
    assert gopher_quality(text, ("de",)).rule is None
    assert gopher_quality(text, ("de", "en")).rule == "fewer than 2 of the English stop words"
    assert gopher_quality("").rule == "fewer than 50 words"


def test_repeats_are_all_but_the_first() -> None:
    assert repeats(["ab", "cd", "ab", "ab"]) == (0.5, 0.5)
    assert repeats(["a", "bbb", "bbb"]) == (1 / 3, 3 / 7)
    assert repeats([]) == repeats([""]) == (0.0, 0.0)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def different(count: int) -> list[str]:
    """So many different words of three letters, at most 10,000."""
    made = (a + b + c for a in LETTERS for b in LETTERS for c in LETTERS)
    return list(islice(made, 500, 500 + count))


def lines(count: int, length: int) -> list[str]:
    """Lines of so many words each, in which no word is twice."""
    words = different(count * length)
    return [" ".join(words[i * length : (i + 1) * length]) for i in range(count)]


def grams(n: int, times: int) -> str:
    """1,000 words of three letters: one n-gram so many times, the others all different."""
    gram, others = different(n), iter(different(2000)[n:])
    text = [word for _ in range(times) for word in (*gram, next(others))]
    return " ".join([*text, *islice(others, 1000 - len(text))])


def test_repeated_lines() -> None:
    """Of short ones the share of lines counts, of long ones that of their characters."""
    assert gopher_repetition("\n".join([*lines(7, 30), "a", "", "a", "a", " a "])).rule is None  # 3 of 11
    rule = "more than 30% of lines repeat earlier ones"
    assert gopher_repetition("\n".join([*lines(7, 30), *["a"] * 5])).rule == rule  # 4 of 12
    assert gopher_repetition("\n".join([*lines(41, 5), *lines(1, 10) * 2])).rule is None  # a twentieth
    rule = "more than 20% of characters are in lines that repeat earlier ones"
    assert gopher_repetition("\n".join([*lines(40, 5), *lines(1, 80) * 2])).rule == rule  # 80 of 360


def test_repeated_paragraphs() -> None:
    """A paragraph of many lines is one paragraph: 4 of 12 are repeats, where 4 of 28 lines are."""
    parts = ["\n".join(lines(24, 10)[i : i + 3]) for i in range(0, 24, 3)]
    assert gopher_repetition("\n\n".join([*parts, *["a b c d"] * 4])).rule is None
    rule = "more than 30% of paragraphs repeat earlier ones"
    assert gopher_repetition("\n \n".join([*parts, *["a b c d"] * 5])).rule == rule
    long = "\n".join(lines(36, 10)[24:])  # a quarter of all lines
    rule = "more than 20% of characters are in lines that repeat earlier ones"
    assert gopher_repetition("\n\n".join([*parts, long, long])).rule == rule


@pytest.mark.parametrize(("n", "most"), [(5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)])
def test_repeated_n_grams_at_their_thresholds(n: int, most: float) -> None:
    repeats = int(1000 * most / n)  # the first one is none
    assert gopher_repetition(grams(n, 1 + repeats)).rule is None
    rule = f"more than {most:.0%} of characters are in {n}-grams that repeat earlier ones"
    assert gopher_repetition(grams(n, 2 + repeats)).rule == rule


@pytest.mark.parametrize(("n", "most"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_the_most_frequent_n_gram_at_its_threshold(n: int, most: float) -> None:
    times = round(1000 * most / n)
    assert gopher_repetition(grams(n, times)).rule is None
    assert gopher_repetition(grams(n, times + 1)).rule == f"more than {most:.0%} of characters are in one {n}-gram"


def test_a_word_over_and_over_counts_each_character_once() -> None:
    assert gopher_repetition("ha " * 100).rule == "more than 20% of characters are in one 2-gram"
    assert gopher_repetition("llama").rule is None and gopher_repetition("--- ---").rule is None
    assert gopher_repetition("羊駝吃草。" * 30).rule is not None  # Chinese, a character a word


PAGE = "\n".join([PROSE.strip()] * 2 + [PROSE.strip().replace("llama", "alpaca")])


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Home | About | Contact us now", "lines without an end mark"),
        ("This sentence is not at its end...", "lines without an end mark"),
        ("Only four words here.", "lines of fewer than 5 words"),
        ("Please enable Javascript in your browser to go on.", "lines about JavaScript"),
        ("By going on you agree to our Privacy Policy today.", "lines about cookies and terms"),
        (f"A word {'x' * 1001} is no word at all.", "lines with a word of more than 1,000 characters"),
    ],
    ids=["menu", "ellipsis", "short", "javascript", "policy", "long-word"],
)
def test_c4_takes_lines_out(line: str, rule: str) -> None:
    verdict = c4(f"{PAGE}\n{line}\n{PROSE}")
    assert (verdict.rule, verdict.changed) == (None, (rule,))
    assert verdict.text == f"{PAGE}\n{PROSE.strip()}"


def test_c4_keeps_paragraphs_and_takes_out_citation_marks() -> None:
    assert c4(f"{PROSE}\n\n{PAGE}\n") == c4(c4(f"{PROSE}\n\n{PAGE}\n").text)
    assert c4(f"  {PAGE}\n\n").text == f"  {PAGE}\n\n"  # nothing was taken out: as it was
    verdict = c4(f"{PROSE.strip()}[12]\n\n\nMenu\n\n{PAGE} [citation needed]")
    assert verdict.text == f"{PROSE.strip()}\n\n{PAGE}"
    assert verdict.changed == ("citation marks", "lines without an end mark")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (f"{PAGE}\nLorem Ipsum dolor", "holds “lorem ipsum”"),
        (f"{PAGE}\nif (a) {{ return; }}", "holds a curly bracket"),
        ("One sentence of five words. And this one has six words.", "fewer than 3 sentences in whole lines"),
        ("Menu\nHome", "fewer than 3 sentences in whole lines"),
    ],
    ids=["dummy", "code", "two", "none"],
)
def test_c4_drops_pages(text: str, rule: str) -> None:
    assert c4(text).rule == rule
    assert c4("One sentence of five words. And this one has six words. So three are here.").rule is None


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        ("x\n" * 20 + "a" * 1000, "x\n" * 20 + "a" * 1001, "a line of more than 1,000 characters"),
        ("a" * 100 + "\n", "a" * 101 + "\n", "lines of more than 100 characters on average"),
        ("a---\n" * 3 + "aa", "-----\n" * 9 + "aa", "fewer than 25% of characters are letters and digits"),
    ],
    ids=["longest", "mean", "alphanumeric"],
)
def test_code_at_its_thresholds(good: str, bad: str, rule: str) -> None:
    assert code(good).rule is None and code(bad).rule == rule


def test_steps_go_in_order_and_see_what_is_left() -> None:
    menu = f"{PAGE}\nHome | About | Contact us now"
    both = Quality(("c4", "gopher-quality"))
    step, verdict = both.judge(menu)
    assert (step, verdict.changed, verdict.text) == (None, ("c4: lines without an end mark",), PAGE)
    assert Quality(("gopher-quality", "c4")).judge("too short")[0] == "gopher-quality"
    assert Quality(("c4", "gopher-quality")).judge("too short")[0] == "c4"
    example = pickle.loads(pickle.dumps(both)).read(Example([], text="too short", notes=("before",)))
    assert example.dropped == "c4: fewer than 3 sentences in whole lines" and example.notes == ("before",)
    assert both.read(Example([], text=menu)).notes == ("c4: lines without an end mark",)
    dropped = Example([], text="", dropped="empty text")
    assert both.read(dropped) is dropped
    spoken = Example([{"role": "user", "content": "{"}])
    assert both.read(spoken) is spoken


def test_language() -> None:
    german = Quality(("language",), ("de",))
    assert german.judge(GERMAN)[0] is None and german.judge("Hm.")[0] is None  # too short to tell
    assert german.judge(PROSE)[1].rule == "in another language (en)"
    assert Quality(("language",), ("de", "en")).judge(PROSE)[0] is None
    german.check()
    with pytest.raises(UserError, match=r"data\.0\.languages: no such language 'english'"):
        Quality(("language",), ("english",)).check("data.0.languages")
    Quality(("c4",), ("english",)).check()  # nobody looks


def texts(folder: Path, name: str) -> list[str]:
    if name.endswith(".jsonl"):
        return [json.loads(line)["text"] for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in (folder / name).read_text(encoding="utf-8").splitlines() if line.strip()]


def dropped(judge: Judge, rows: list[str]) -> int:
    return sum(judge(row).rule is not None for row in rows)


def test_c4s_own_pages_pass_c4s_rules(real_data: Path) -> None:
    """They are what those rules left: not one goes, and not one loses a line."""
    pages = texts(real_data / "text", "c4_demo.jsonl")
    assert len(pages) == 300 and all(c4(page).text == page and c4(page).rule is None for page in pages)
    assert 10 <= dropped(gopher_repetition, pages) <= 25 and 20 <= dropped(gopher_quality, pages) <= 40


def test_rules_for_pages_are_not_for_papers_and_rules_for_code_not_for_prose(real_data: Path) -> None:
    papers, articles = texts(real_data / "text", "arxiv.jsonl"), texts(real_data / "text", "wiki_demo.txt")
    assert dropped(c4, papers) == len(papers) == 20  # LaTeX is made of curly brackets
    assert dropped(gopher_quality, papers) == dropped(gopher_quality, articles) == 0
    assert dropped(gopher_repetition, articles) == 0
    assert dropped(code, articles) == len(articles)
