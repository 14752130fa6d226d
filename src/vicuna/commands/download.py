"""`vicuna download`: download a repository from a hub and check every file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vicuna import config
from vicuna.config import DownloadSettings
from vicuna.errors import SettingsError, UserError
from vicuna.files import file_hash
from vicuna.hub import HUBS, Download, Hub, RemoteFile, matching
from vicuna.interrupts import keeps
from vicuna.terminal import say
from vicuna.weights.output_folder import check_space

# The same weights in formats that are not read here, and files that only a trainer reads.
_OTHER_FORMATS = ["*.pth", "*.pt", "*.h5", "*.msgpack", "*.onnx*", "*.ot", "original/*"]
_TRAINER = ["optimizer.*", "scheduler.*", "rng_state*", "*.zip", "events.out.*"]


def run(argv: Sequence[str]) -> int:
    """Download what is missing, check all files, print the folder."""
    names: list[str] = []
    settings, _ = config.parse(DownloadSettings, argv, free=names)
    if len(names) != 1:
        raise SettingsError(["which repository? vicuna download OWNER/NAME"])
    folder = Path(settings.output_dir).expanduser() if settings.output_dir else None
    download = Download(
        repository=names[0],
        kind="dataset" if settings.kind == "dataset" else "model",
        revision=settings.revision or None,
        folder=folder,
        workers=settings.workers,
    )
    hub = HUBS[settings.source]
    if hub.offline():
        say("offline: using what was downloaded before", error=True)
        say(hub.fetch(download, None))
        return 0
    files = _files(hub, download, settings)
    say(fetch(hub, download, files))
    return 0


def fetch(hub: Hub, download: Download, files: Sequence[RemoteFile]) -> Path:
    """Download files, and check each.

    Raises: UserError if there is no room, the hub cannot be reached, or a file is not what the hub
        lists.
    """
    total = sum(f.size for f in files)
    there = sum(f.size for f in files if download.folder and _whole(download.folder / f.path, f))
    check_space(download.folder or hub.cache(), total - there)
    say(f"{len(files)} files, {total / 2**20:,.1f} MiB", error=True)
    keeps("what was downloaded is kept; the same command resumes")
    folder = hub.fetch(download, [f.path for f in files])
    bad = [f.path for f in files if not _intact(folder / f.path, f)]
    for name in bad:
        path = folder / name
        # In a cache the name is a link to the content.
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    if bad:
        raise UserError(
            "checksum mismatch: {bad}; removed",
            bad=", ".join(bad),
            where=str(folder),
            fix="Run it again: only what is missing is downloaded.",
        )
    return folder


def _files(hub: Hub, download: Download, settings: DownloadSettings) -> list[RemoteFile]:
    """The files to download: those the patterns select; without patterns, no weights twice."""
    listed = hub.list_files(download)
    exclude = list(settings.exclude)
    if settings.kind != "dataset" and not settings.include:
        exclude += [*_OTHER_FORMATS, *_TRAINER]
        if any(f.path.endswith(".safetensors") for f in listed):
            exclude.append("*.bin")
    files = matching(listed, settings.include, exclude)
    if not files:
        has = ", ".join(f.path for f in listed[:8]) or "nothing"
        raise UserError(
            "no file matches --include and --exclude",
            has=has,
            where=download.repository,
            fix="The repository has: {has}.",
        )
    left = len(listed) - len(files)
    if left:
        say(f"{left} files left out (--include takes what you name)", error=True)
    return files


def _whole(path: Path, file: RemoteFile) -> bool:
    return path.is_file() and path.stat().st_size == file.size


def _intact(path: Path, file: RemoteFile) -> bool:
    """Whether a file is what the hub lists."""
    if not _whole(path, file):
        return False
    if file.sha256:
        return file_hash(path) == file.sha256
    if file.git_hash:
        from huggingface_hub.utils.sha import git_hash

        return git_hash(path.read_bytes()) == file.git_hash
    return True
