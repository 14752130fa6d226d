"""Model files of 2023 that nothing here reads any more, told by their first bytes."""

from __future__ import annotations

from pathlib import Path

from vicuna.errors import UserError

# The first four bytes, and what such a file is. They are a number: its letters stand reversed.
_OLD = {
    b"lmgg": "a ggml model of early 2023 (llama.cpp, alpaca.cpp)",
    b"fmgg": "a ggmf model of 2023 (llama.cpp)",
    b"tjgg": "a ggjt model of 2023 (llama.cpp)",
    b"algg": "a ggml LoRA adapter of 2023 (llama.cpp)",
    b"nsgg": "a saved session of llama.cpp",
}


def refuse_old(path: Path) -> None:
    """Nothing where the file is none of these.

    Raises: UserError that says what it is, and the way out.
    """
    with path.open("rb") as f:
        found = _OLD.get(f.read(4))
    if found is None:
        return
    fix = (
        "It was made from an adapter in PEFT's format: give that folder."
        if "LoRA" in found
        else "Today's llama.cpp reads it neither. Take the original weights (Hugging Face's or "
        "Meta's layout, see vicuna convert) and write a GGUF file of them: vicuna export gguf."
    )
    raise UserError(f"this is {found}, a format that was given up", where=str(path), fix=fix)
