"""The hubs: what lies in a repository, and fetching it. Both libraries resume and work in parallel.

Environment variables mean what they mean to the libraries: HF_ENDPOINT (a mirror), HF_HUB_OFFLINE,
HF_HOME, HF_TOKEN; MODELSCOPE_CACHE, MODELSCOPE_API_TOKEN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from vicuna.errors import UserError


@dataclass(frozen=True)
class Listed:
    """A file of a repository: its size, and its SHA-256 or, of small files, git's hash of it."""

    path: str
    size: int
    sha256: str = ""
    git_hash: str = ""


@dataclass(frozen=True)
class Wanted:
    """What is asked for. kind: `model` or `dataset`. folder: None for the library's cache."""

    repository: str
    kind: str
    revision: str | None
    folder: Path | None
    workers: int = 4


class Hub(Protocol):
    """A place that models come from."""

    name: str

    def offline(self) -> bool:
        """Whether only what was fetched before may be used."""
        ...

    def listed(self, wanted: Wanted) -> list[Listed]:
        """All files of the repository. Raises: UserError."""
        ...

    def fetch(self, wanted: Wanted, files: Sequence[str] | None) -> Path:
        """Fetch files (None: all that the cache has); the folder they lie in. Raises: UserError."""
        ...

    def cache(self) -> Path:
        """Where files go that no folder is named for."""
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

    def listed(self, wanted: Wanted) -> list[Listed]:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with _told(self.name, wanted.repository):
            tree = HfApi(endpoint=_endpoint()).list_repo_tree(
                wanted.repository, recursive=True, revision=wanted.revision, repo_type=wanted.kind
            )
            return [_of_hugging_face(f) for f in tree if isinstance(f, RepoFile)]

    def fetch(self, wanted: Wanted, files: Sequence[str] | None) -> Path:
        from huggingface_hub import snapshot_download

        with _told(self.name, wanted.repository):
            return Path(
                snapshot_download(
                    wanted.repository,
                    repo_type=wanted.kind,
                    revision=wanted.revision,
                    local_dir=wanted.folder,
                    allow_patterns=None if files is None else [_literal(f) for f in files],
                    max_workers=wanted.workers,
                    endpoint=_endpoint(),
                    local_files_only=files is None,
                )
            )


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _of_hugging_face(file: Any) -> Listed:
    sha256 = file.lfs.sha256 if file.lfs else ""
    return Listed(file.path, int(file.size), sha256, "" if sha256 else str(file.blob_id or ""))


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

    def listed(self, wanted: Wanted) -> list[Listed]:
        with _told(self.name, wanted.repository):
            files = _modelscope().list_repo_files(
                wanted.repository, wanted.kind, revision=wanted.revision
            )
            return [
                Listed(f.path, int(f.size or 0), getattr(f, "sha256", None) or "")
                for f in files
                if getattr(f, "type", "blob") != "tree"
            ]

    def fetch(self, wanted: Wanted, files: Sequence[str] | None) -> Path:
        with _told(self.name, wanted.repository):
            return Path(
                _modelscope().download_repo(
                    wanted.repository,
                    wanted.kind,
                    revision=wanted.revision,
                    local_dir=wanted.folder,
                    allow_patterns=None if files is None else [_literal(f) for f in files],
                    max_workers=wanted.workers,
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
            fix="pip install 'chinese-vicuna[modelscope]'",
        ) from e
    return HubApi()


HUBS: dict[str, Hub] = {"huggingface": HuggingFace(), "modelscope": ModelScope()}


def chosen(files: Sequence[Listed], include: Sequence[str], exclude: Sequence[str]) -> list[Listed]:
    """The files that match a pattern to include (all, where there is none) and none to exclude."""

    def matches(path: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch(path, p) or (p.endswith("/") and path.startswith(p)) for p in patterns)

    return [
        f
        for f in files
        if (not include or matches(f.path, include)) and not matches(f.path, exclude)
    ]


@contextmanager
def _told(hub: str, repository: str) -> Iterator[None]:
    """A library's error in words. It has a dozen kinds, which differ from version to version."""
    try:
        yield
    except UserError:
        raise
    except KeyboardInterrupt:
        raise
    except Exception as e:
        what, fix = _words(type(e).__name__, hub)
        lines = str(e).strip().splitlines()
        detail = f" ({lines[0][:200]})" if lines else f" ({type(e).__name__})"
        raise UserError(what + detail, where=f"{hub} {repository}", fix=fix) from e


def _words(kind: str, hub: str) -> tuple[str, str]:
    """(what happened, the way out) for a kind of error."""
    mirror = "HF_ENDPOINT sets a mirror; " if hub == "huggingface" else ""
    login = "HF_TOKEN" if hub == "huggingface" else "MODELSCOPE_API_TOKEN"
    if kind in ("GatedRepoError", "PermissionDeniedError"):
        return "it asks for consent first", f"Accept its terms on its page, then set {login}."
    if kind in ("RepositoryNotFoundError", "NotExistError", "HFValidationError"):
        return "no such repository", (
            f"Check the name and --kind; a private one needs {login}. The other hub has names of "
            "its own: --source."
        )
    if kind in ("RevisionNotFoundError", "RevisionResolutionError"):
        return "no such revision", "Check --revision: a branch, a tag or a commit."
    if kind == "OSError":
        return "it cannot be written", "Free some space, or choose another --output_dir."
    return "the hub cannot be reached, or the connection broke", (
        f"Run it again: what was fetched is kept. {mirror}an offline copy is found with "
        "HF_HUB_OFFLINE=1."
        if hub == "huggingface"
        else "Run it again: what was fetched is kept."
    )
