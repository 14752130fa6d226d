"""The folder that a command writes: nothing of value is replaced, and there is room for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from vicuna.errors import SettingsError, UserError

# Files beside the weights that belong to a model, by their endings.
_SIDE = {".json", ".model", ".jinja", ".txt", ".tiktoken", ".md"}
_NOT_SIDE = ("index.json", "report.json", "manifest.json", "params.json")


def result_folder(output_dir: str, force: bool, sources: Iterable[Path]) -> Path:
    """The folder to write, checked before anything is read.

    Raises: UserError where it holds something and --force is missing, or where it holds what was
        read, or what no command here has written.
    """
    if not output_dir:
        raise SettingsError(["output_dir is missing: the folder to write (--output_dir D)"])
    folder = Path(output_dir).expanduser()
    whole = folder.resolve()
    for source in (s.resolve() for s in sources):
        if source == whole or whole in source.parents:
            raise UserError(
                "this folder holds the source of the result",
                where=str(folder),
                fix="Choose another one.",
            )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return folder
    if not force:
        raise UserError(
            "this folder exists already",
            where=str(folder),
            fix="Choose another --output_dir, or add --force to replace it.",
        )
    if not (folder / "report.json").is_file():
        raise UserError(
            "--force replaces only what a command here has written (it has a report.json)",
            where=str(folder),
            fix="Remove it yourself, or choose another --output_dir.",
        )
    return folder


def check_space(target: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises: UserError saying how much is needed.
    """
    place = target.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            "the disk has {free:.1f} GiB free, but the result takes {needed:.1f} GiB",
            free=free / 2**30,
            needed=needed / 2**30,
            where=str(target),
            fix="Free some space, or choose a folder on another disk.",
        )


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: config, tokenizer, template, licence."""
    for path in sorted(source.iterdir()):
        named = path.name.endswith(_NOT_SIDE)
        plain = path.suffix in _SIDE or path.name.upper().startswith(("LICENSE", "NOTICE"))
        if path.is_file() and plain and not named:
            shutil.copyfile(path, target / path.name)
