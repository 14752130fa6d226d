"""Records that repeat one another: hashes of conversations, and what they have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

import numpy as np

from vicuna.data.conversation import Conversation

SIGNATURE = 24  # hashes in a MinHash signature
SHINGLE = 4  # characters in a shingle
LONGEST = 2000  # normalised characters looked at; of longer texts the first and last halves of it
SIMILAR = 0.85  # estimated Jaccard similarity from which two records are near duplicates


def fingerprints(conversations: Sequence[Conversation]) -> tuple[np.ndarray, np.ndarray]:
    """What duplicates are found by, the same in every process and on every machine.

    Many at once, because the calls into numpy would cost more than the work of one.

    Returns: uint64 (n,), a hash of each whole conversation; uint32 (n, SIGNATURE), the MinHash
        signatures of the 4-character shingles of the texts without case, white space and
        punctuation.
    """
    exact = np.array([_exact(c) for c in conversations], np.uint64)
    return exact, _signatures([_all_text(c) for c in conversations], exact)


def _exact(conversation: Conversation) -> int:
    parts = [f"{t.role}\x1f{t.text}\x1f{t.input}" for t in conversation.turns]
    return _hash64("\x1e".join(parts))


def _all_text(conversation: Conversation) -> str:
    text = "".join([t.text + t.input for t in conversation.turns])
    # So that a book costs no more than a page.
    return text if len(text) <= 4 * LONGEST else text[: 2 * LONGEST] + text[-2 * LONGEST :]


def question_hash(conversation: Conversation) -> int:
    """A 64-bit hash of the first question, white space aside. Decides the validation split."""
    turns = conversation.turns
    first = next((t for t in turns if t.role == "user"), turns[0])
    return _hash64(" ".join(f"{first.text}\n{first.input}".split()))


def prompt_hash(conversation: Conversation) -> int:
    """A 64-bit hash of all that comes before the last answer: what siblings have in common."""
    parts = [f"{t.role}\x1f{t.text}\x1f{t.input}" for t in conversation.turns[:-1]]
    return _hash64("\x1e".join(parts))


def outranked(prompts: np.ndarray, merits: np.ndarray) -> np.ndarray:
    """Which answers have a better one to the same question.

    Args:
        prompts: uint64 (n,), `prompt_hash`. merits: float64 (n,), more is better.

    Returns: bool (n,).
    """
    _, group = np.unique(prompts, return_inverse=True)
    best = np.full(group.max(initial=-1) + 1, -np.inf)
    np.maximum.at(best, group, merits)
    return np.asarray(merits < best[group])


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


@cache
def _letters() -> np.ndarray:
    """What a UTF-16 unit counts as: lower case, 0 for white space and punctuation: (65536,)."""
    letters = np.zeros(1 << 16, np.uint16)
    for code in range(1 << 16):
        char = chr(code)
        if char.isalnum():
            lower = char.lower()
            letters[code] = ord(lower) if len(lower) == 1 else code
    letters[0xD800:0xE000] = np.arange(0xD800, 0xE000)  # halves of emoji and rare characters
    return letters


# The numbers from 0 to 2^32 are a circle; the signature is the first hash met from each of these
# points on. Each is a MinHash: of the hashes turned back by that angle, the smallest.
_POINTS = (np.arange(SIGNATURE, dtype=np.uint64) << np.uint64(32)) // np.uint64(SIGNATURE)
_POINTS = _POINTS.astype(np.uint32)
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(0xD6E8FEB86659FD93))


def _signatures(texts: list[str], exact: np.ndarray) -> np.ndarray:
    """MinHash signatures, uint32 (n, SIGNATURE); exact: uint64 (n,), hashes of the whole texts."""
    encoded = [text.encode("utf-16-le", "surrogatepass") for text in texts]
    stops = np.cumsum([0, *map(len, encoded)]) // 2
    units = _letters()[np.frombuffer(b"".join(encoded), "<u2")]
    kept = np.flatnonzero(units)
    units = units[kept]
    stops = np.searchsorted(kept, stops)
    # Four 16-bit units are the 64 bits of a number; windows overlap, a unit apart. Those that
    # reach into the next text are not looked at.
    windows = max(0, len(units) - SHINGLE + 1)
    circle = [_turned(np.ndarray((windows,), "<u8", units, strides=(2,)))]
    own = _turned(exact)
    first, last = stops[:-1].copy(), stops[1:] - SHINGLE + 1
    size = windows
    for i in np.flatnonzero((last <= first) | (np.diff(stops) > LONGEST)).tolist():
        if last[i] <= first[i]:  # too short to compare: like nothing but itself
            circle.append(own[i : i + 1])
        else:
            circle.append(_turned(_ends(units[stops[i] : stops[i + 1]], LONGEST // 2)))
        first[i], last[i] = size, size + len(circle[-1])
        size = int(last[i])
    return _nearest(np.concatenate(circle), first, last)


def _nearest(circle: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The first hash met from each point on, among those from `first` up to `last`: (n, POINTS)."""
    signatures = np.empty((len(first), SIGNATURE), np.uint32)
    if not len(first):
        return signatures
    # `reduceat` gives every second one what lies between two texts; it needs a value at the end.
    circle = np.append(circle, np.uint32(0))
    borders = np.stack([first, last], axis=1).ravel()
    for k, point in enumerate(_POINTS):
        signatures[:, k] = np.minimum.reduceat(circle - point, borders)[::2] + point
    return signatures


def _ends(units: np.ndarray, half: int) -> np.ndarray:
    """The shingles, as numbers, of the first and last `half` units laid end to end."""
    joined = np.concatenate([units[:half], units[-half:]])
    return np.ndarray((len(joined) - SHINGLE + 1,), "<u8", joined, strides=(2,))


def _turned(shingles: np.ndarray) -> np.ndarray:
    """Hashes of numbers: places on the circle, uint32."""
    hashes = shingles * _MIX[0]
    hashes ^= hashes >> _MIX[1]
    hashes *= _MIX[2]
    return (hashes >> _MIX[1]).astype(np.uint32)


def find_duplicates(exact: np.ndarray, near: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Duplicates among the fingerprints of n records.

    Args:
        exact: uint64 (n,).
        near: uint32 (n, SIGNATURE).

    Returns: for each record the index of the first one before it with the same hash, or -1; and of
        one before it that is similar without being the same, or -1. A record that repeats another
        exactly is not compared further. Both int64 (n,).
    """
    n = len(exact)
    first = np.full(n, -1, np.int64)
    similar = np.full(n, -1, np.int64)
    if n < 2:
        return first, similar
    order = np.argsort(exact, kind="stable")
    leader = _leaders(np.asarray(exact)[order], order)
    first[order] = np.where(leader == order, -1, leader)
    rows = np.flatnonzero(first < 0)
    # Records that agree in at least 21 of 24 hashes differ in 3 at most, so of 4 bands at least
    # one is the same in both: no such pair shares no bucket.
    misses = SIGNATURE - int(np.ceil(SIMILAR * SIGNATURE))
    for band in np.array_split(np.arange(SIGNATURE), misses + 1):
        _compare_band(near, rows, band, similar)
    return first, similar


def _leaders(keys: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For each of the sorted keys the record that comes first with this key."""
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return np.repeat(order[begins], np.diff(np.concatenate([begins, [len(keys)]])))


def _compare_band(
    near: np.ndarray, rows: np.ndarray, band: np.ndarray, similar: np.ndarray
) -> None:
    """Compare records of one bucket: each with the bucket's first and the three before it.

    All pairs would be quadratic where thousands share a bucket; these four find every member of a
    cluster unless several clusters alternate in one bucket.
    """
    keys = np.zeros(len(rows), np.uint64)
    for k, column in enumerate(band):
        weight = np.uint64(0x9E3779B97F4A7C15 * (2 * k + 1) & 0xFFFFFFFFFFFFFFFF)
        keys = (keys ^ near[rows, column]) * weight
        keys ^= keys >> np.uint64(29)
    order = np.argsort(keys, kind="stable")
    keys, members = keys[order], rows[order]
    leader = _leaders(keys, members)
    _mark_similar(near, members, leader, similar)
    for back in (1, 2, 3):
        same = np.flatnonzero(keys[back:] == keys[:-back])
        _mark_similar(near, members[same + back], members[same], similar)


def _mark_similar(
    near: np.ndarray, later: np.ndarray, earlier: np.ndarray, similar: np.ndarray
) -> None:
    """Write `earlier` into `similar` where the signatures of a pair agree well enough."""
    open_ = np.flatnonzero((later != earlier) & (similar[later] < 0))
    for chunk in np.array_split(open_, len(open_) // 65536 + 1):  # bounds the memory
        agree = (near[later[chunk]] == near[earlier[chunk]]).mean(axis=1)
        hits = chunk[agree >= SIMILAR]
        similar[later[hits]] = earlier[hits]
