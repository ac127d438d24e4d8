"""Draws against Philox written out, and against what chance allows."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from influence_kit.core.draws import Draws, check_seed, key_of
from influence_kit.errors import InvalidArgumentError
from influence_kit.projections.random_maps import random_map, random_mask

WORD, LOW = 2**64, 2**64 - 1


def philox(key: int, part: int, count: int) -> list[int]:
    """Philox-4x64 of ten rounds (Salmon et al., SC 2011, section 3.3); the first count is 1."""
    numbers: list[int] = []
    for step in itertools.count(1):
        if len(numbers) >= count:
            return numbers[:count]
        words, keys = [step, 0, 0, part], [key % WORD, key // WORD]
        for _ in range(10):
            one, two = words[0] * 0xD2E7470EE14C6C93, words[2] * 0xCA5A826395121157
            words = [
                (two >> 64) ^ words[1] ^ keys[0],
                two & LOW,
                (one >> 64) ^ words[3] ^ keys[1],
                one & LOW,
            ]
            keys = [(keys[0] + 0x9E3779B97F4A7C15) & LOW, (keys[1] + 0xBB67AE8584CAA73B) & LOW]
        numbers += words
    raise AssertionError


KEYS = [0, 1, 2**63 + 5, 2**128 - 1, key_of("gaussian", 0, "body.0.weight")]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("part", [0, 1, 2**40, 2**64 - 1])
def test_numbers_are_those_of_philox(key: int, part: int) -> None:
    """By hand, so that no version of a library changes what a store was projected with."""
    raw = philox(key, part, 24)
    middle = torch.tensor([((number >> 12) + 0.5) / 2**52 for number in raw], dtype=torch.float64)
    found = Draws(key, part).normal(4, 6)
    assert torch.allclose(torch.special.ndtr(found), middle.view(4, 6), rtol=1e-12, atol=1e-14)
    digits = [number >> place & 1 for number in raw for place in range(64)]
    assert Draws(key, part).bits(5, 67).flatten().tolist() == digits[:335]
    assert Draws(key, part).signs(67).tolist() == [2 * digit - 1 for digit in digits[:67]]
    assert Draws(key, part).below(7, 24).tolist() == [number % 7 for number in raw]
    order = sorted(range(24), key=lambda place: raw[place] >> 5)
    assert Draws(key, part).order(24).tolist() == order


def test_numbers_go_on_where_the_last_ones_ended() -> None:
    draws, whole = Draws(3), Draws(3).normal(20)
    assert torch.equal(torch.cat([draws.normal(12), draws.normal(8)]), whole)


# Keys and parts.


def test_keys_tell_their_parts_apart() -> None:
    parts: list[tuple[object, ...]] = [(0, "a"), (1, "a"), (0, "b"), ("a", 0), (0, "a", 0), (0,)]
    keys = [key_of(*some) for some in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**128 for key in keys)
    assert max(keys) > 2**120, "all 128 bits are used"


@pytest.mark.parametrize("shift", [1, 31, 32, 33, 63, 64, 100, 127])
def test_every_bit_of_a_key_counts(shift: int) -> None:
    """A generator of torch takes the last 32."""
    one, other = (Draws(key).normal(1000) for key in (5, 5 ^ 1 << shift))
    assert not bool((one == other).any())
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 / math.sqrt(1000)


def test_parts_of_a_stream_have_no_number_in_common() -> None:
    """Of 200 parts with 1,000 numbers each, which has a chance of 1e-5 by itself."""
    numbers = torch.cat([Draws(7, part).normal(1000) for part in range(200)])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal", "sjlt", "mask"])
def test_maps_of_many_layers_differ(kind: str) -> None:
    like = torch.zeros((), dtype=torch.float64)
    maps = [random_map(kind, 40, 8, 0, f"layer {i}").matrix(like) for i in range(500)]
    assert len({one.numpy().tobytes() for one in maps}) == 500


# What chance allows.


def test_normal_numbers() -> None:
    numbers = Draws(11).normal(100_000)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        # five standard errors: a chance of 6e-7 each
        assert abs(numbers.pow(power).mean() - moment) < 5 * math.sqrt(spread / 100_000), power
    assert numbers.dtype == torch.float64


@pytest.mark.parametrize("raw", [0, 1, 2**12, 2**63, 2**64 - 1])
def test_normal_numbers_are_finite(raw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draws, "_raw", lambda self, count: np.full(count, raw, np.uint64))
    (number,) = Draws(0).normal(1)
    assert abs(number) < 8.3


@pytest.mark.parametrize("count", [1, 2, 3, 64, 65, 1000])
def test_an_order_has_every_place_once(count: int) -> None:
    found = Draws(0).order(count)
    assert found.dtype == torch.int64
    assert found.sort().values.tolist() == list(range(count))


def test_orders_are_fair() -> None:
    found = [tuple(Draws(2, part).order(3).tolist()) for part in range(6000)]
    for order in itertools.permutations(range(3)):
        assert abs(found.count(order) / 6000 - 1 / 6) < 5 * math.sqrt(5 / 36 / 6000)


def test_bits_are_fair() -> None:
    bits: Tensor = Draws(4).bits(300, 70)
    assert bits.dtype == torch.uint8
    assert bits.shape == (300, 70)
    assert abs(bits.double().mean() - 0.5) < 5 * math.sqrt(0.25 / 21_000)


def test_a_mask_is_the_first_places_of_an_order() -> None:
    mask = random_mask(50, 7, key=9)
    assert mask.chosen.tolist() == sorted(Draws(9).order(50)[:7].tolist())


@pytest.mark.parametrize("seed", [-1, 2**63, True, 1.0, "0", None])
def test_what_is_no_seed(seed: object) -> None:
    match = f"`seed` must be an int that is not negative; got {seed!r}"
    with pytest.raises(InvalidArgumentError, match=match):
        check_seed(seed)  # type: ignore[arg-type]
    assert [check_seed(number) for number in (0, 2**63 - 1)] == [0, 2**63 - 1]
