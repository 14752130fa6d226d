"""The adapters that the page knows: what lies in its folders, and what was added by name.

An adapter is identified by the path it is loaded from (or its hub id). `AdapterInfo` is read from
small files; the weights are read only when the adapter is used.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vicuna import untrusted
from vicuna.errors import UserError
from vicuna.json_yaml import read_json, read_yaml
from vicuna.messages import Message
from vicuna.model.adapter_location import META, WEIGHTS

DEPTH = 3  # folders below the page's
MOST = 300
RECENT = 2.0  # seconds


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter.

    name: as it is shown. base, template, data, size, changed: "" or 0 where nothing says it.
    log: of the run that it came from; None where there is none.
    mixed: the adapters that it was merged from, with their strengths.
    problem: why it cannot be read; such a one cannot answer, either.
    """

    path: str
    name: str
    base: str = ""
    rank: int = 0
    alpha: float = 0.0
    template: str = ""
    data: tuple[str, ...] = ()
    size: int = 0
    changed: float = 0.0
    log: Path | None = None
    mixed: tuple[tuple[str, float], ...] = field(default=())
    problem: str = ""


class AdapterRegistry:
    """All adapters of some folders, and those that were added.

    Args:
        folders: where they are looked for, new ones each time.
    """

    def __init__(self, folders: list[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]
        self._added: list[str] = []
        self._lock = threading.Lock()
        self._recent: tuple[float, list[str]] = (-RECENT, [])

    def adapters(self) -> list[AdapterInfo]:
        """All adapters: those added by name, then those of the folders, newest first."""
        with self._lock:
            added = list(self._added)
        places = [self._place(p) for folder in self.folders for p in _adapters(folder)]
        found = {str(p): self._try_info(p, True) for p in places}
        named = {path: self._try_info(Path(path)) for path in added if Path(path).is_dir()}
        others = {path: AdapterInfo(path, path) for path in added if path not in named}
        newest = sorted(found.values(), key=lambda c: -c.changed)[:MOST]
        first = [c for path, c in {**named, **others}.items() if path not in found]
        return [*first, *newest]

    def paths(self) -> set[str]:
        """What may be loaded."""
        return {info.path for info in self.adapters() if not info.problem}

    def choices(self) -> list[tuple[str, str]]:
        """(name, path) of each."""
        return [(info.name, info.path) for info in self.adapters() if not info.problem]

    def recent_paths(self) -> list[str]:
        """The paths of what may be loaded, a moment old at most: one look for all who ask then."""
        then, found = self._recent
        if time.monotonic() - then >= RECENT:
            found = sorted(self.paths())
            self._recent = (time.monotonic(), found)
        return found

    def get(self, path: str) -> AdapterInfo:
        """One adapter. Raises: UserError if it is not (or no longer) registered."""
        for info in self.adapters():
            if info.path == path:
                return info
        raise UserError("this adapter is not here any more", where=path)

    def describe(self, mix: Mapping[str, float]) -> str:
        """A mix by the names of its adapters: `law 0.7 + poems 0.3`; "" for none."""
        names = {info.path: info.name for info in self.adapters()}
        if len(mix) == 1:
            path, weight = next(iter(mix.items()))
            return names.get(path, path) + ("" if weight == 1 else f" {weight:g}")
        return " + ".join(f"{names.get(path, path)} {weight:g}" for path, weight in mix.items())

    def add(self, adapter: str) -> str:
        """Register an adapter by path or hub id; returns the path that identifies it.

        Raises: UserError where there is none.
        """
        from vicuna.model.adapter import locate_adapter, read_adapter

        path = str(locate_adapter(adapter).resolve())
        read_adapter(path)
        if problem := self._try_info(Path(path)).problem:
            raise UserError(problem, where=path)
        with self._lock:
            if path not in self._added:
                self._added.append(path)
        return path

    def delete(self, path: str) -> None:
        """Delete an adapter of the page's folders from the disk.

        Raises: UserError where it lies elsewhere, or its run is at work.
        """
        info = self.get(path)
        folder = Path(info.path).resolve()
        if not any(folder.is_relative_to(f.resolve()) for f in self.folders):
            raise UserError(
                "this adapter lies outside of the page's folders", where=path,
                fix="Delete it by hand.",
            )  # fmt: skip
        run = folder.parent
        if info.log is not None and _at_work(run):
            raise UserError("its run is at work", where=str(run), fix="Stop the run first.")
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        with self._lock:
            self._added = [p for p in self._added if p != path]

    def _try_info(self, path: Path, kept: bool = False) -> AdapterInfo:
        """Information on an adapter; if it cannot be read, `problem` says why.

        Args:
            kept: whether links out of the folders are a reason.
        """
        try:
            if kept:
                untrusted.check_links(path, self.folders)
            return self._info(path)
        except UserError as e:
            problem = str(e)
        except Exception as e:  # its files may hold anything
            problem = Message(
                "it cannot be read: {error}", error=untrusted.text(e, 200) or type(e).__name__
            )
        return AdapterInfo(
            untrusted.text(path), untrusted.text(self._name(path), 200), problem=problem
        )

    def _info(self, path: Path) -> AdapterInfo:
        """Raises: errors of many types if a file has unexpected content."""
        str(path).encode()  # a name that no browser can be sent
        config, meta = _json(path / "adapter_config.json"), _json(path / META)
        run = path.parent if path.name == "adapter" else None
        log = run / "log.jsonl" if run is not None and (run / "log.jsonl").is_file() else None
        weights = next((path / w for w in WEIGHTS if (path / w).is_file()), path)
        try:
            about = weights.stat()
            size, changed = (about.st_size if weights.is_file() else 0), about.st_mtime
        except OSError:
            size, changed = 0, 0.0
        template = meta.get("template") or {}
        mixed = [(m["adapter"], untrusted.number(m["strength"])) for m in meta.get("mixed", [])]
        base = (meta.get("base") or {}).get("name") or _base(config)
        return AdapterInfo(
            path=str(path),
            name=self._name(run if run is not None else path),
            base=untrusted.text(base, 200),
            rank=untrusted.count(config.get("r") or 0),
            alpha=untrusted.number(config.get("lora_alpha") or 0),
            template=untrusted.text(template.get("name", ""), 100),
            data=tuple(_data(run)) if run is not None else (),
            size=size,
            changed=changed,
            log=log,
            mixed=tuple(
                (self._name(Path(untrusted.text(name, 200))), weight) for name, weight in mixed
            ),
        )

    def _place(self, path: Path) -> Path:
        """Where an adapter lies; a link that leads out of the folders is left as it is."""
        return path.resolve() if untrusted.within(path, self.folders) else path

    def _name(self, path: Path) -> str:
        for folder in self.folders:
            if path.is_relative_to(folder) and path != folder:
                inner = path.relative_to(folder)
                return str(inner.parent if inner.name == "adapter" else inner)
        return path.parent.name if path.name == "adapter" else path.name


def _adapters(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Folders that hold an adapter; checkpoints of runs are left out."""
    try:
        inside = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return
    for place in inside:
        if _holds_adapter(place):
            yield place
        elif depth > 1 and place.name != "checkpoints":
            yield from _adapters(place, depth - 1)


def _holds_adapter(place: Path) -> bool:
    try:
        return any((place / name).is_file() for name in WEIGHTS)
    except OSError:  # a folder that may not be read
        return False


def _json(path: Path) -> dict[str, Any]:
    """A small file's table; {} where there is none. Raises: UserError where it holds no table."""
    return read_json(path) if path.is_file() else {}


def _base(config: dict[str, Any]) -> str:
    name = str(config.get("base_model_name_or_path") or "")
    return Path(name).name if Path(name).is_absolute() else name


def _data(run: Path) -> list[str]:
    """Names of the files that a run was trained on; none where nothing says it."""
    try:
        entries = read_yaml(run / "config.yaml").get("dataset") or []
        paths = [e.get("path", "") if isinstance(e, dict) else str(e) for e in entries]
        return [untrusted.text(Path(path).name, 200) for path in paths[:20] if path]
    except (UserError, ValueError, TypeError, AttributeError):
        return []


def _at_work(run: Path) -> bool:
    from vicuna.runs import process as run_process

    process = run_process.find(run)
    return process is not None and process.alive()
