"""The mask of dropout, against Philox as its authors define it (Salmon et al., SC 2011), in Python's whole numbers."""

from __future__ import annotations

import pytest
import torch

from curvelora.kernels import dropout
from curvelora.kernels.dropout import SIZE, add_dropped_, bands, dropped

WORD = 0xFFFFFFFF


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32 of ten rounds: four words of 32 bits."""
    (a, b, c, d), (k, l) = counter, key  # noqa: E741
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (second >> 32) ^ b ^ k, second & WORD, (first >> 32) ^ d ^ l, first & WORD
        k, l = (k + 0x9E3779B9) & WORD, (l + 0xBB67AE85) & WORD  # noqa: E741
    return [a, b, c, d]


def kept(entries: int, seed: int, p: float) -> torch.Tensor:
    """Which entries stay: the halves of counter i's four words belong to entry i of each eighth of a program's block."""
    drawn = torch.empty(entries + 8 * SIZE)
    for start in range(0, entries, 8 * SIZE):
        for number in range(SIZE):
            counter = start // 8 + number
            words = philox([counter & WORD, counter >> 32, 0, 0], [seed & WORD, seed >> 32])
            halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
            drawn[start + number : start + 8 * SIZE : SIZE] = torch.tensor(halves)
    return drawn[:entries] >= round(p * 65536)


def test_the_reference_has_the_authors_answers() -> None:
    """Their known answers, for a counter and a key of zeros and of ones."""
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox([WORD] * 4, [WORD] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    ("entries", "seed", "p"), [(1, 0, 0.5), (8 * SIZE, 2**31 - 1, 0.05), (3 * 8 * SIZE + 17, 7, 0.7), (300, 7, 1.0)]
)
def test_entries_are_dropped_where_philox_says_so(device: torch.device, entries: int, seed: int, p: float) -> None:
    """And the others are multiplied by 1 / (1 - p), rounded once, also where they are added to something."""
    draw = torch.Generator().manual_seed(0)
    x, other = (torch.randn(entries, generator=draw).bfloat16() for _ in range(2))
    factor = 65536 / (65536 - round(p * 65536)) if p < 1 else 0.0
    wanted = torch.where(kept(entries, seed, p), x.float() * torch.tensor(factor), torch.zeros(()))
    there = torch.tensor([seed], device=device)
    # a GPU adds without rounding the product first, and the sum may be rounded to the next number of bf16
    bounds = {"rtol": 0, "atol": 0} if device.type == "cpu" else {"rtol": 2**-7, "atol": 1e-5}
    found = dropped(x.to(device), there, p).cpu()
    assert torch.equal(found == 0, wanted == 0)
    assert torch.equal(found, wanted.bfloat16())
    out = other.clone().to(device)
    assert add_dropped_(out, x.to(device), there, p) is out
    torch.testing.assert_close(out.cpu(), (wanted + other.float()).bfloat16(), **bounds)


@pytest.mark.parametrize(
    ("tokens", "width", "count"), [(200, 64, 4), (64, 64, 1), (2100, 10, 2), (5, 4096, 5), (4100, 3, 2)]
)
def test_bands_of_rows_drop_what_the_whole_drops(
    device: torch.device, tokens: int, width: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The smallest that there can be: from one row on, and as many as it takes where the width has other factors than 2."""
    x, seed = torch.randn(tokens, width, device=device).bfloat16(), torch.tensor([3], device=device)
    whole, parts = torch.zeros_like(x), torch.zeros_like(x)
    assert [*bands(tokens, width)] == [slice(0, tokens)]
    monkeypatch.setattr(dropout, "BAND", 1)
    found = [*bands(tokens, width)]
    assert len(found) == count and [row for band in found for row in range(tokens)[band]] == [*range(tokens)]
    for band in found:
        add_dropped_(parts[band], x[band], seed, 0.3, band.start)
    assert torch.equal(parts, add_dropped_(whole, x, seed, 0.3))
