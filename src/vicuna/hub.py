"""The one door to the hubs: what a hub id is, what a repository holds, and fetching it.

Environment variables mean what they mean to the hub libraries: HF_ENDPOINT (a mirror),
HF_HUB_OFFLINE, HF_HOME, HF_TOKEN; MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN. Both libraries resume an
interrupted download and fetch files in parallel.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.system_errors import install_extra

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form OWNER/NAME of a hub id. A relative path may have it, too."""
    return _ID.fullmatch(text) is not None


def must_be_hub_id(text: str) -> bool:
    """Whether a text is a hub id and cannot be meant as a path: its first part is no folder here.

    `runs/typo` is not looked for on the hub if there is a folder `runs`.
    """
    return is_hub_id(text) and not Path(text).parent.exists()


# -- into the Hugging Face library's cache ----


def snapshot(
    repository: str,
    patterns: Sequence[str] | None = None,
    *,
    kind: str = "model",
    where: str = "",
    **options: Any,
) -> Path:
    """The folder of a Hugging Face repository in the library's cache, fetched if need be.

    Args:
        patterns: of the files to fetch; None for all.
        kind: `model` or `dataset`.
        where: the setting that names it, for the error.
        options: such as `revision`.

    Raises: UserError if there is no such repository, or no way to it.
    """
    from huggingface_hub import snapshot_download

    allow = None if patterns is None else list(patterns)
    with _hub_errors("huggingface", where or repository):
        return Path(snapshot_download(repository, repo_type=kind, allow_patterns=allow, **options))


def file_names(repository: str, folder: Path, where: str) -> list[str]:
    """The names of a model repository's files; offline, of those in its snapshot.

    Raises: UserError if the hub cannot be reached.
    """
    from huggingface_hub import constants, list_repo_files

    if constants.HF_HUB_OFFLINE:
        return [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    with _hub_errors("huggingface", where):
        return list(list_repo_files(repository))


# -- vicuna download ----


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and its SHA-256 or, of small files, git's hash of it."""

    path: str
    size: int
    sha256: str = ""
    git_hash: str = ""


@dataclass(frozen=True)
class Download:
    """What to download. kind: `model` or `dataset`. folder: None for the library's cache."""

    repository: str
    kind: str
    revision: str | None
    folder: Path | None
    workers: int = 4


class Hub(Protocol):
    """A hub with models and data sets."""

    name: str

    def offline(self) -> bool:
        """Whether only what was fetched before may be used."""
        ...

    def list_files(self, download: Download) -> list[RemoteFile]:
        """All files of the repository. Raises: UserError."""
        ...

    def fetch(self, download: Download, files: Sequence[str] | None) -> Path:
        """Fetch files (None: all that the cache has); their folder. Raises: UserError."""
        ...

    def cache(self) -> Path:
        """The folder of downloads that name no folder."""
        ...


class HuggingFace:
    """The Hugging Face Hub, or a mirror of it."""

    name = "huggingface"

    def offline(self) -> bool:
        from huggingface_hub import constants

        return bool(constants.HF_HUB_OFFLINE)

    def cache(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def list_files(self, download: Download) -> list[RemoteFile]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _download_errors(self.name, download):
            tree = HfApi(endpoint=_endpoint()).list_repo_tree(
                download.repository,
                recursive=True,
                revision=download.revision,
                repo_type=download.kind,
            )
            return [_of_hugging_face(f) for f in tree if isinstance(f, RepoFile)]

    def fetch(self, download: Download, files: Sequence[str] | None) -> Path:
        from huggingface_hub import snapshot_download

        with _download_errors(self.name, download):
            return Path(
                snapshot_download(
                    download.repository,
                    repo_type=download.kind,
                    revision=download.revision,
                    local_dir=download.folder,
                    allow_patterns=None if files is None else [_literal(f) for f in files],
                    max_workers=download.workers,
                    endpoint=_endpoint(),
                    local_files_only=files is None,
                )
            )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _of_hugging_face(file: Any) -> RemoteFile:
    sha256 = file.lfs.sha256 if file.lfs else ""
    return RemoteFile(file.path, int(file.size), sha256, "" if sha256 else str(file.blob_id or ""))


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


class ModelScope:
    """ModelScope, through its own client (the extra `modelscope`)."""

    name = "modelscope"

    def offline(self) -> bool:
        return os.environ.get("MODELSCOPE_OFFLINE", "").lower() in ("1", "true", "yes")

    def cache(self) -> Path:
        root = os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope"
        return Path(root).expanduser()

    def list_files(self, download: Download) -> list[RemoteFile]:
        with _download_errors(self.name, download):
            files = _modelscope().list_repo_files(
                download.repository, download.kind, revision=download.revision
            )
            return [
                RemoteFile(f.path, int(f.size or 0), getattr(f, "sha256", None) or "")
                for f in files
                if getattr(f, "type", "blob") != "tree"
            ]

    def fetch(self, download: Download, files: Sequence[str] | None) -> Path:
        with _download_errors(self.name, download):
            return Path(
                _modelscope().download_repo(
                    download.repository,
                    download.kind,
                    revision=download.revision,
                    local_dir=download.folder,
                    allow_patterns=None if files is None else [_literal(f) for f in files],
                    max_workers=download.workers,
                    local_files_only=files is None,
                )
            )


def _modelscope() -> Any:
    try:
        from modelscope_hub import HubApi
    except ImportError as e:
        raise UserError(
            "ModelScope's client is not installed",
            where="source modelscope",
            fix=install_extra("modelscope"),
        ) from e
    return HubApi()


HUBS: dict[str, Hub] = {"huggingface": HuggingFace(), "modelscope": ModelScope()}


def matching(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str]
) -> list[RemoteFile]:
    """The files that match a pattern to include (all, if there is none) and none to exclude."""
    from huggingface_hub.utils import filter_repo_objects

    return list(
        filter_repo_objects(
            files,
            allow_patterns=list(include) or None,
            ignore_patterns=list(exclude) or None,
            key=lambda file: file.path,
        )
    )


# -- the libraries' errors in words ----

_GATED = ("GatedRepoError", "PermissionDeniedError")
_MISSING = ("RepositoryNotFoundError", "NotExistError", "HFValidationError")
_NO_REVISION = ("RevisionNotFoundError", "RevisionResolutionError")
# The login of each hub; `--kind` and `--source` are settings of vicuna download.
_LOGIN = {"huggingface": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


@contextmanager
def _hub_errors(hub: str, where: str, more: str = "") -> Iterator[None]:
    """Turn a hub library's error into words. They have a dozen kinds, other ones in each version.

    Args:
        more: a way out of a wrong name, besides the usual ones.

    Raises: UserError.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as e:
        name, login = type(e).__name__, _LOGIN[hub]
        lines = str(e).strip().splitlines()
        why = lines[0][:200] if lines else name
        if name in _GATED:
            raise UserError(
                "this is a gated repository",
                login=login,
                where=where,
                fix="Accept its terms on its page on the hub, then set {login}.",
            ) from e
        if name in _MISSING:
            raise UserError(
                "the hub has no such repository, or it needs a login ({why})",
                why=why,
                login=login,
                more=more,
                where=where,
                fix="Check the name; a private repository needs {login}.{more}",
            ) from e
        if name in _NO_REVISION:
            raise UserError(
                "no such revision ({why})",
                why=why,
                where=where,
                fix="A revision is a branch, a tag or a commit.",
            ) from e
        if name == "OSError":
            raise UserError(
                "the download cannot be written ({why})",
                why=why,
                where=where,
                fix="Free some space, or choose another folder.",
            ) from e
        raise UserError(
            "the hub cannot be reached, and this repository is not in its cache ({why})",
            why=why,
            where=where,
            fix=Message("Run it again: what was downloaded is kept.")
            if hub == "modelscope"
            else Message(
                "Run it again (what was downloaded is kept), set HF_ENDPOINT to a "
                "mirror, or give a local folder; HF_HUB_OFFLINE=1 uses only what "
                "was downloaded before."
            ),
        ) from e


@contextmanager
def _download_errors(hub: str, download: Download) -> Iterator[None]:
    more = " Check --kind, too; another hub may have it under another name: --source."
    with _hub_errors(hub, f"{hub} {download.repository}", more):
        yield
