"""What the tests of the page share: folders of runs as processes that are gone left them,
and what is English in a Chinese sentence."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vicuna.runs import process

# Names, which stand in Chinese sentences as they are.
NAMES = (
    "Top k", "Top p", "Min p", "Typical p", "hub id", "Git LFS", "git lfs pull", "Label Studio",
    "CSV UTF-8", "Apple Numbers", "PyTorch", "OpenDocument", "vicuna web", "vicuna data check",
    "vicuna plan", "vicuna train", "vicuna convert", "Hugging Face", "vicuna doctor", "pip install", "mlx-lm", "hf auth login", "PEFT", "adamw", "beta", "Excel", "Python", "logit bias", "chat template",
    "git lfs", "vicuna merge", "state dict", "vicuna COMMAND", "vicuna run", "CUDA GPU",
)  # fmt: skip
# Parts that are quoted, options, settings, paths, code and fields.
_NO_WORDS = re.compile(r"「[^」]*」|`[^`]*`|\{[^}]*\}|\S*[_/=()<>\[\]@.\\-]\S*|\S*\d\S*")
_HALF = re.compile(r"(?<![A-Za-z])[A-Za-z']{2,}(?: [A-Za-z']+)* [A-Za-z']{2,}")


def english_half(text: str) -> str:
    """Words of English in a Chinese sentence that are no names; "" for none."""
    for name in sorted(NAMES, key=len, reverse=True):
        text = text.replace(name, "名")
    found = _HALF.search(_NO_WORDS.sub("。", text))
    return found[0] if found else ""


def write_run(path: Path, *events: dict[str, Any], output: str | None = None) -> None:
    """A run's folder as a process that is gone has left it."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text("model: tiny\n")
    first = {"event": "start", "step": 0, "total_steps": 9, "time": 1.0}
    (path / "log.jsonl").write_text("".join(json.dumps(e) + "\n" for e in (first, *events)))
    if output is not None:
        (path / "output.txt").write_text(output)
        gone = process.Process(2**22 + 1, 0.5, 0)
        (path / ".process.json").write_text(json.dumps(gone.__dict__))
