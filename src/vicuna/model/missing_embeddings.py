"""Tokens for which the embedding has no row: found before weights are loaded.

Such a token ends a run in an index error at the first record that has it. A special token that no
text and no template can produce (a placeholder for images, say) does no harm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Encoder
from vicuna.errors import UserError

_SHOWN = 3
_GAP = 4096  # ids above the number of tokens that are looked at: numbering may have holes


def rows_of(config: dict[str, Any]) -> int | None:
    """Rows of the embedding by a base's config.json; None if it does not say."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    rows = inner.get("vocab_size", config.get("vocab_size"))
    return rows if isinstance(rows, int) else None


def without_row(renderer: Renderer, rows: int) -> dict[int, str]:
    """Tokens at or beyond `rows` that can occur: of text, or named by the tokenizer or template."""
    encoder = renderer.encoder
    v = encoder.vocabulary
    used = {v.eos_id, v.pad_id, renderer.end_id, *renderer.stop_ids, *v.end_ids}
    if v.bos_id is not None:
        used.add(v.bos_id)
    beyond = [i for i in range(rows, encoder.vocab_size + _GAP) if _exists(encoder, i)]
    beyond += [i for i in used if i >= rows and i not in beyond]
    return {i: encoder.token(i) for i in beyond if i in used or i not in encoder.control_ids}


def _exists(encoder: Encoder, token_id: int) -> bool:
    return encoder.token(token_id) != f"<{token_id}>"


def check_rows(renderer: Renderer, config: dict[str, Any], where: Path) -> None:
    """Raises: UserError where a token that can occur has no row in the embedding."""
    rows = rows_of(config)
    lacking = without_row(renderer, rows) if rows else {}
    if not lacking or rows is None:
        return
    some = [f"{token!r} ({i})" for i, token in sorted(lacking.items())[:_SHOWN]]
    more = f" and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
    raise UserError(
        f"the base's embedding has {rows:,} rows, and none for the tokenizer's "
        f"{', '.join(some)}{more}",
        where=str(where),
        fix="Use the tokenizer files that the base was published with, or a base whose embedding "
        "was enlarged for this tokenizer.",
    )
