"""Names of machines: forgiving where they are clear, an error with the nearest name where they are not."""

from __future__ import annotations

import os

import pytest

from llama_ft.errors import UserError
from llama_ft.plan.hardware import CARDS, GIB, parse_hardware, this_cpu, usable_cores


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("8xH100-80GB", "H100-80GB", 8),
        ("h100", "H100-80GB", 1),
        ("RTX 4090", "RTX-4090", 1),
        ("4090", "RTX-4090", 1),
        ("NVIDIA GeForce RTX 3090", "RTX-3090", 1),
        ("2 x rtx_5090", "RTX-5090", 2),
        ("A100-40", "A100-40GB", 1),
        ("4xA100 80GB", "A100-80GB", 4),
        ("a10g", "A10G-24GB", 1),
        ("L4", "L4-24GB", 1),
        ("l40s", "L40S-48GB", 1),
        ("H200", "H200-141GB", 1),
        ("B200", "B200-180GB", 1),
    ],
)
def test_cards_are_found(text, name, devices):
    found = parse_hardware(text)
    assert found.card is CARDS[name] and found.devices == devices and found.memory == CARDS[name].memory


@pytest.mark.parametrize(
    ("text", "devices", "memory"), [("24GiB", 1, 24 * GIB), ("2x24GiB", 2, 24 * GIB), ("80gb", 1, 80 * 10**9)]
)
def test_memory_alone_has_no_rate(text, devices, memory):
    found = parse_hardware(text)
    assert (found.devices, found.memory, found.card) == (devices, memory, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H10O-80GB", "H100-80GB"),
        ("RTX-4080", "RTX-4090"),
        ("quantum", "known: "),
        ("", "known: "),
        ("0xH100", "1x or"),
    ],
)
def test_unknown_hardware_names_the_nearest(text, said):
    with pytest.raises(UserError) as caught:
        parse_hardware(text)
    assert said in str(caught.value) and "--hardware" in str(caught.value)


def test_a_card_of_two_sizes_is_asked_about():
    with pytest.raises(UserError, match="A100-40GB or A100-80GB"):
        parse_hardware("8xA100")


def test_rates_are_dense():
    """Data sheets print twice as much, with sparsity."""
    assert {name: round(card.flops / 1e12) for name, card in CARDS.items()} == {
        "RTX-3090": 71, "RTX-4090": 165, "RTX-5090": 210, "A10G-24GB": 70, "L4-24GB": 121, "L40S-48GB": 362,
        "A100-40GB": 312, "A100-80GB": 312, "H100-80GB": 989, "H200-141GB": 989, "B200-180GB": 2250,
    }  # fmt: skip
    assert all(card.source for card in CARDS.values())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux keeps a process on some of the cores")
def test_cores_that_a_container_keeps_are_not_counted():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert usable_cores() == 1
        assert this_cpu().name.endswith(", 1 cores)")
    finally:
        os.sched_setaffinity(0, before)
