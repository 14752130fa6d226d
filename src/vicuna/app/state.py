"""What all tabs know: the settings, and the one model with its queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vicuna.config import WebSettings
from vicuna.errors import UserError


@dataclass
class App:
    """The state behind the page; one for the whole server.

    settings: of the command. Whether anything may be written: `settings.read_only`.
    """

    settings: WebSettings

    @property
    def adapter_folders(self) -> list[Path]:
        """Where adapters and runs are; a new run goes into the first."""
        return [Path(p).expanduser().resolve() for p in self.settings.adapters]

    @property
    def data_folders(self) -> list[Path]:
        """Where data sets are; what is saved on the page goes into the first."""
        return [Path(p).expanduser().resolve() for p in self.settings.data]

    def inside(self, path: str | Path) -> Path:
        """A path that a browser named, if it lies in one of the folders; links are followed first.

        Raises: UserError where it does not.
        """
        found = Path(path).expanduser().resolve()
        if any(found.is_relative_to(folder) for folder in self.adapter_folders + self.data_folders):
            return found
        raise UserError(
            "this is outside of the folders that the page may use",
            where=str(path),
            fix="Start vicuna web with --adapters or --data and the folder's name.",
        )

    def may_write(self) -> None:
        """Raises: UserError where the server was started with --read-only."""
        if self.settings.read_only:
            raise UserError(
                "this page writes nothing", fix="It was started with --read-only; start it without."
            )
