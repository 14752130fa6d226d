"""Python environments of the peers' own: what they need must never meet what the product needs.

Made once under a cache folder: torch first, by itself, then the pinned peers. `.made` inside is
written last, so that an environment is either complete or made anew.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """packages: installed with their dependencies. bare: installed without. stubs: modules that a
    peer imports and never uses for text, and that have no build beside this torch."""

    name: str
    packages: tuple[str, ...]
    bare: tuple[str, ...] = ()
    stubs: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """What the environment was made from."""
        return "\n".join([TORCH, *self.packages, "--", *self.bare, "--", *self.stubs])


ENVIRONMENTS = {
    "trl": Environment(
        "trl", ("trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "datasets==5.2.0")
    ),
    # The newest versions that LLaMA-Factory 0.9.5 declares itself good for. Its page, its audio and
    # its video parts are left out: they are imported, or not even that, and never run for text.
    "llamafactory": Environment(
        "llamafactory",
        (
            "accelerate==1.11.0", "datasets==4.0.0", "peft==0.18.1", "transformers==5.6.0",
            "trl==0.24.0", "torchdata==0.11.0", "tyro<0.9.0", "einops", "fire", "omegaconf",
            "numpy", "packaging", "pandas", "protobuf", "pydantic", "pyyaml", "safetensors",
            "scipy", "sentencepiece", "tiktoken", "matplotlib", "hf-transfer",
        ),
        bare=("llamafactory==0.9.5",),
        stubs=("torchaudio",),
    ),
}  # fmt: skip


class NotMade(Exception):
    """An environment could not be made; the words say why."""


def python_of(name: str, root: Path, say: Callable[[str], None] = print) -> Path:
    """The interpreter of an environment under `root`, made where it is not there yet.

    Raises: NotMade.
    """
    environment = ENVIRONMENTS[name]
    folder = root / name
    python = folder / "bin" / "python"
    made = folder / ".made"
    if made.is_file() and made.read_text() == environment.digest and python.exists():
        return python
    say(f"making the environment of {name} in {folder} (once; about a minute and 2 GB) ...")
    shutil.rmtree(folder, ignore_errors=True)
    _call([sys.executable, "-m", "venv", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _call([*pip, TORCH])
    if environment.bare:
        _call([*pip, "--no-deps", *environment.bare])
    _call([*pip, TORCH, *environment.packages])
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for module in environment.stubs:
        _stub(site, module)
    made.write_text(environment.digest)
    return python


def _stub(site: Path, module: str) -> None:
    """An empty module in the place of one that does not exist for this torch."""
    if not (site / module).exists():
        (site / f"{module}.py").write_text('"""A stand-in: imported, never used for text."""\n')


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = [w for w in (done.stderr or done.stdout).splitlines() if "WARNING" not in w]
        raise NotMade(f"{' '.join(command[-3:])} failed: " + " ".join(words[-3:])[-400:])
