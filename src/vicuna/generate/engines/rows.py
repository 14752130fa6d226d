"""What engines ask of the rows of a step."""

from __future__ import annotations

from collections.abc import Sequence


def check_rows(token_ids: Sequence[int], parents: Sequence[int], live: int, max_rows: int) -> None:
    """Refuse rows that `Engine.step` does not take.

    Args:
        live: rows there are to grow from.

    Raises: ValueError where there are too few or too many, or one grows from none.
    """
    if not 1 <= len(token_ids) <= max_rows or len(token_ids) != len(parents):
        raise ValueError(
            f"{len(token_ids)} tokens for {len(parents)} parents; 1 to {max_rows} rows"
        )
    if not all(0 <= p < live for p in parents):
        raise ValueError(f"parents {list(parents)} among {live} rows")
