"""Pieces: all at their places, few in memory, and nothing goes on behind an error."""

from __future__ import annotations

import _thread
import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vicuna.weights import chunks
from vicuna.weights.chunks import PIECE, Pieces, all_finite, rows_of
from vicuna.weights.read import ALL

SIZE = 4096


def byte(n: int) -> Tensor:
    return torch.full((SIZE,), n % 256, dtype=torch.uint8)


def write(path: Path, makers: list[Callable[[], Tensor]]) -> None:
    with path.open("wb") as f:
        f.write(b"header")
        with Pieces(f) as out:
            for make in makers:
                out.put(SIZE, make)


def test_pieces_lie_in_the_order_in_which_they_were_put(tmp_path: Path) -> None:
    def slowly(n: int) -> Tensor:
        time.sleep(0.02 if n % 3 == 0 else 0)  # so that later ones are ready first
        return byte(n)

    write(tmp_path / "x", [lambda n=n: slowly(n) for n in range(40)])  # type: ignore[misc]
    wanted = b"header" + b"".join(bytes([n]) * SIZE for n in range(40))
    assert (tmp_path / "x").read_bytes() == wanted


def test_gaps_are_filled_with_zeros_also_at_the_end(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as f, Pieces(f) as out:
        for _ in range(2):
            out.put(3, lambda: torch.ones(3, dtype=torch.uint8))
            out.align(8)
    assert (tmp_path / "x").read_bytes() == b"\1\1\1\0\0\0\0\0" * 2


def test_few_are_under_way_and_each_has_one_thread_of_torchs(tmp_path: Path) -> None:
    lock, alive, most, threads = threading.Lock(), 0, 0, set()
    before = torch.get_num_threads()

    def make() -> Tensor:
        nonlocal alive, most
        with lock:
            alive += 1
            most = max(most, alive)
            threads.add(torch.get_num_threads())
        time.sleep(0.002)
        with lock:
            alive -= 1
        return byte(0)

    with (tmp_path / "x").open("wb") as f, Pieces(f) as out:
        for _ in range(60):
            out.put(SIZE, make)
            assert len(out._waiting) <= 2 * max(2, before)
    assert most == max(2, before)
    assert threads == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("place", ["reading", "writing", "size"])
def test_an_error_in_a_thread_is_raised_here_and_ends_the_rest(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(n: int) -> Tensor:
        made.append(n)
        if n == 5 and place == "reading":
            raise ValueError("damaged")
        return byte(n)[: SIZE - (n == 5 and place == "size")]

    full = OSError(errno.ENOSPC, "No space left on device")
    if place == "writing":

        def fails(self: Pieces, at: int, size: int, make: Callable[[], Tensor]) -> None:
            if at > 5 * SIZE:
                raise full
            right(self, at, size, make)

        right = Pieces._write
        monkeypatch.setattr(Pieces, "_write", fails)
    before, running = torch.get_num_threads(), threading.active_count()
    wanted = OSError if place == "writing" else ValueError
    with pytest.raises(wanted, match=r"No space|damaged|expected 4096 bytes"):
        write(tmp_path / "x", [lambda n=n: make(n) for n in range(1000)])  # type: ignore[misc]
    assert len(made) < 50
    assert torch.get_num_threads() == before
    assert threading.active_count() == running
    write(tmp_path / "y", [lambda: byte(1)])  # and the next one is not locked out


def test_the_last_pieces_error_is_not_lost(tmp_path: Path) -> None:
    def fails() -> Tensor:
        time.sleep(0.05)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "x", [lambda: byte(0), fails])


def test_an_interruption_ends_it(tmp_path: Path) -> None:
    made = []

    def make(n: int) -> Tensor:
        made.append(n)
        if n == 20:
            _thread.interrupt_main()
        time.sleep(0.005)
        return byte(n)

    running = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", [lambda n=n: make(n) for n in range(10_000)])  # type: ignore[misc]
    assert len(made) < 200
    assert threading.active_count() == running
    assert not chunks._ALONE.locked()


@pytest.mark.parametrize(
    ("shape", "unit"),
    [
        ((5000, 1000), 1),
        ((5000, 1000), 64),
        ((3, PIECE * 2), 1),
        ((4, 5, 6), 1),
        ((7, 900, 900), 1),
    ],
)
def test_slices_cover_all_rows_once_in_whole_units(shape: tuple[int, ...], unit: int) -> None:
    slices = list(rows_of(shape, unit))
    rows = [n for s in slices for n in range(shape[0])[s]]
    assert rows == list(range(shape[0]))
    assert all(s == ALL or s.start % unit == 0 for s in slices)
    width = torch.Size(shape[1:]).numel()
    assert all(s == ALL or (s.stop - s.start) * width <= max(PIECE, width * unit) for s in slices)


def test_what_cannot_be_cut_stays_whole() -> None:
    for shape, unit in (((), 1), ((PIECE * 3,), 1), ((9000, 9000), 0), ((10, 10), 1)):
        assert list(rows_of(shape, unit)) == [ALL]


def test_finite() -> None:
    assert all_finite(torch.tensor([1.0, -2.0]))
    assert all_finite(torch.empty(0))
    for bad in (float("nan"), float("inf"), -float("inf")):
        assert not all_finite(torch.tensor([[1.0, bad], [0.0, 2.0]], dtype=torch.float16))
