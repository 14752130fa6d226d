"""`vicuna download`: a repository of a hub into the cache or a folder, every file checked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from vicuna import config
from vicuna.config import DownloadSettings
from vicuna.errors import SettingsError, UserError
from vicuna.files import file_hash
from vicuna.hub import HUBS, Hub, Listed, Wanted, chosen
from vicuna.interrupts import keeps
from vicuna.terminal import say
from vicuna.weights.output_folder import check_space

# The same weights once more, in layouts that are not read here; and what only a trainer reads.
_ELSEWHERE = ["*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "original/*"]
_TRAINER = ["optimizer.*", "scheduler.*", "rng_state*", "*.zip", "events.out.*"]


def run(words: Sequence[str]) -> int:
    """Fetch what is missing, check all of it, print the folder."""
    named: list[str] = []
    settings, _ = config.parse(DownloadSettings, words, free=named)
    if len(named) != 1:
        raise SettingsError(["which one? vicuna download OWNER/NAME"])
    folder = Path(settings.output_dir).expanduser() if settings.output_dir else None
    wanted = Wanted(
        repository=named[0],
        kind="dataset" if settings.kind == "dataset" else "model",
        revision=settings.revision or None,
        folder=folder,
        workers=settings.workers,
    )
    hub = HUBS[settings.source]
    if hub.offline():
        say("offline: what was fetched before is used", error=True)
        say(hub.fetch(wanted, None))
        return 0
    files = _files(hub, wanted, settings)
    say(fetch(hub, wanted, files))
    return 0


def fetch(hub: Hub, wanted: Wanted, files: Sequence[Listed]) -> Path:
    """Fetch files, and check each.

    Raises: UserError where there is no room, the hub cannot be reached, or a file is not what the
        hub says it is.
    """
    total = sum(f.size for f in files)
    there = sum(f.size for f in files if wanted.folder and _whole(wanted.folder / f.path, f))
    check_space(wanted.folder or hub.cache(), total - there)
    say(f"{len(files)} files, {total / 2**20:,.1f} MiB", error=True)
    keeps("what was fetched is kept; the same command goes on where it stopped")
    folder = hub.fetch(wanted, [f.path for f in files])
    bad = [f.path for f in files if not _intact(folder / f.path, f)]
    for name in bad:
        path = folder / name
        # In a cache the name is a link to the content.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if bad:
        raise UserError(
            f"damaged on its way: {', '.join(bad)}; removed",
            where=str(folder),
            fix="Run it again: only what is missing is fetched.",
        )
    return folder


def _files(hub: Hub, wanted: Wanted, settings: DownloadSettings) -> list[Listed]:
    """The files to fetch: those the patterns choose; without patterns, no weights twice."""
    listed = hub.listed(wanted)
    exclude = list(settings.exclude)
    if settings.kind != "dataset" and not settings.include:
        exclude += [*_ELSEWHERE, *_TRAINER]
        if any(f.path.endswith(".safetensors") for f in listed):
            exclude.append("*.bin")
    files = chosen(listed, settings.include, exclude)
    if not files:
        names = ", ".join(f.path for f in listed[:8]) or "nothing"
        raise UserError(
            "no file matches", where=wanted.repository, fix=f"There is: {names}. See --include."
        )
    left = len(listed) - len(files)
    if left:
        say(f"{left} files left out (--include takes what you name)", error=True)
    return files


def _whole(path: Path, file: Listed) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _intact(path: Path, file: Listed) -> bool:
    """Whether a file is what the hub lists."""
    if not _whole(path, file):
        return False
    if file.sha256:
        return file_hash(path) == file.sha256
    if file.git_hash:
        content = path.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
        return digest.hexdigest() == file.git_hash
    return True
