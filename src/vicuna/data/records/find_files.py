"""From what a user writes as `dataset` to files: a path, a folder, a glob or a hub id."""

from __future__ import annotations

import glob
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.files import file_hash
from vicuna.hub import must_be_hub_id, snapshot
from vicuna.messages import Message
from vicuna.paths import given_path

_PACKED = tuple(
    f"{ending}{packed}"
    for ending in (".json", ".jsonl", ".csv", ".tsv")
    for packed in (".gz", ".bz2", ".xz", ".zst")
)
ENDINGS = (
    *(".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt"),
    *_PACKED,
)
# Data that cannot be read as they are: in a folder they are named (`file_types.py`).
NAMED = (
    *(".xlsx", ".xls", ".ods", ".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".7z", ".rar"),
    *(".sqlite", ".sqlite3", ".db", ".pkl", ".pickle", ".npy", ".npz", ".h5", ".orc", ".avro"),
)
# They stand beside data and describe them.
NOT_DATA = (
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"),
    "requirements.txt",
)
_SPLITS = ("train", "training")

digest = file_hash


def expand(source: str) -> list[Path]:
    """The files that a data source names, sorted.

    Args:
        source: a file; a folder (searched whole for known endings, hidden files left out); a glob,
            `**` included; or, where no such path exists, the hub id of a data set.

    Returns: at least one file.

    Raises: UserError where nothing is there, with the way out.
    """
    return expand_noting(source, [])


def expand_noting(source: str, notes: list[str]) -> list[Path]:
    """`expand`; what of the source is left out, and why, is appended to `notes`."""
    path = given_path(source)
    if path.is_dir():
        return _in_folder(path, source, notes)
    if path.exists():
        if path.name.lower() in NOT_DATA and any(path.parent.glob("*.arrow")):
            raise UserError(
                "this file describes an Arrow data set and is not the data",
                parent=path.parent,
                where=source,
                fix="Give its folder: {parent}.",
            )
        return [path]
    if re.search(r"[*?\[]", source):
        return _matching(path, source)
    if is_hub_id(source):
        return _in_folder(_download(source), source, notes)
    raise _missing(path, source)


def known(path: Path) -> bool:
    """Whether a file is taken for data by its name, where a folder is searched."""
    return path.name.lower().endswith(ENDINGS) and path.name.lower() not in NOT_DATA


def _in_folder(folder: Path, source: str, notes: list[str]) -> list[Path]:
    """All files with known endings below a folder; of a saved data set its own files."""
    every = [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    left_out = _left_out(every, notes)
    files = [
        path
        for path in every
        if (known(path) or path.name.lower().endswith(NAMED))
        and not any(path.is_relative_to(other) for other in left_out)
    ]
    if not files:
        raise UserError(
            "no data files in it",
            reason=" ".join(ENDINGS),
            where=source,
            fix="Files are recognised by their endings here: {reason}. A file named alone may "
            "have any.",
        )
    return files


def _left_out(every: list[Path], notes: list[str]) -> list[Path]:
    """What `datasets.save_to_disk` left beside the data: other splits, and its cache."""
    found: list[Path] = []
    for path in every:
        if path.name == "dataset_dict.json":
            splits = _described(path).get("splits")
            splits = [s for s in splits or [] if (path.parent / str(s)).is_dir()]
            chosen = next((s for s in splits if s in _SPLITS), splits[0] if splits else "")
            others = [s for s in splits if s != chosen]
            found += [path.parent / s for s in others]
            if others:
                notes.append(
                    Message(
                        "of the splits {chosen} is read, not {others}",
                        chosen=chosen,
                        others=", ".join(others),
                    )
                )
        elif path.name == "state.json":
            entries = _described(path).get("_data_files")
            own = {e.get("filename") for e in entries or [] if isinstance(e, dict)}
            arrows = list(path.parent.glob("*.arrow")) if own else []
            found += [p for p in arrows if p.name not in own]
    return found


def _described(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _matching(pattern: Path, source: str) -> list[Path]:
    """The files that a glob matches: those with known endings, all of them if none has one."""
    found = sorted(glob.glob(_literal_as_far(pattern), recursive=True))
    files = [p for p in map(Path, found) if p.is_file()]
    if not files:
        raise UserError(
            "no file matches this pattern",
            where=source,
            fix="Check it with ls; folders below are searched only by **, and hidden files never.",
        )
    return [path for path in files if known(path)] or files


def _literal_as_far(pattern: Path) -> str:
    """A glob in which the folders that exist as they are written stand for themselves."""
    path = Path(pattern.anchor)
    parts = pattern.parts[1:] if pattern.anchor else pattern.parts
    for number, part in enumerate(parts):
        if not (path / part).exists():
            return str(Path(glob.escape(str(path)), *parts[number:]))
        path /= part
    return glob.escape(str(path))


def is_hub_id(source: str) -> bool:
    """Whether this is `owner/name` and cannot be meant as a path: no file name, no folder here."""
    return must_be_hub_id(source) and not source.lower().endswith(ENDINGS)


def _missing(path: Path, source: str) -> UserError:
    """What to say of a path that does not exist: the nearest name where it goes wrong."""
    parent = path
    while not parent.exists() and parent != parent.parent:
        wrong, parent = parent, parent.parent
    if not parent.is_dir():
        return UserError(
            "no such file", parent=parent, where=source, fix="{parent} is a file, not a folder."
        )
    try:
        names = sorted(p.name for p in parent.iterdir() if not p.name.startswith("."))
    except OSError:
        names = []
    if near := get_close_matches(wrong.name, names, n=1):
        whole = parent / near[0] / path.relative_to(wrong)
        fix = Message("Did you mean {path}?", path=whole if whole.exists() else parent / near[0])
    else:
        listed = ", ".join(names[:5]) + (" ..." if names[5:] else "")
        fix = Message(
            "In {parent} there is: {names}.",
            parent=parent.resolve(),
            names=listed or Message("nothing"),
        )
    return UserError("no such file or folder", where=source, fix=fix)


def _download(repository: str) -> Path:
    """The hub's data set in the local cache, its readable files alone."""
    try:
        return snapshot(repository, [f"*{ending}" for ending in ENDINGS], kind="dataset")
    except UserError as e:
        raise UserError(
            "{details}; no such path here either", details=e.what, where=repository, fix=e.fix
        ) from e
