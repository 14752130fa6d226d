"""The data sets that the page may use: files in its folders, samples of the package, dropped files.

Whatever path comes from a browser goes through `allowed`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib import resources
from itertools import islice
from pathlib import Path

from vicuna.data.records import find_files
from vicuna.data.templates.registry import builtin_templates
from vicuna.errors import UserError
from vicuna.files import file_hash, whole_file
from vicuna.hub import is_hub_id
from vicuna.model.base import EMBEDDED
from vicuna.system_errors import cannot_write
from vicuna.web.state import App

LISTED = 500  # files offered at once
SEARCHED = 20_000  # files looked at for that: a data folder may hold anything
_MAGIC = re.compile(r"[*?\[]")
DEEP = 2  # times that a pattern may search all folders below: each multiplies the search


def samples() -> list[Path]:
    """The data sets that come with the package."""
    folder = Path(str(resources.files("vicuna.samples")))
    return sorted(folder.glob("*.jsonl"))


def listed(app: App) -> list[tuple[str, str]]:
    """What can be chosen, as (what is shown, path): the page's folders, then the samples."""
    found = [
        (_shown(path, folder), str(path))
        for folder in app.data_folders
        for path in islice(_files(folder), LISTED)
    ]
    return found + [(f"vicuna · {path.name}", str(path)) for path in samples()]


def _files(folder: Path) -> Iterator[Path]:
    """Data files below a folder, hidden ones left out, sorted within each folder."""
    looked = 0
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            looked += 1
            if looked > SEARCHED:
                return
            if not name.startswith(".") and find_files.known(Path(name)):
                yield Path(place, name)


def _shown(path: Path, folder: Path) -> str:
    return str(Path(folder.name) / path.relative_to(folder))


def allowed(app: App, source: str) -> list[Path]:
    """The files that a path names, all of them inside of the page's folders or samples.

    Args:
        source: a file, a folder or a glob; never a hub id: nothing is fetched.

    Raises: UserError where nothing is there, or it lies outside.
    """
    source = source.strip()
    if not source:
        raise UserError("no file was chosen", fix="Choose one from the list, or drop one.")
    known = {str(path): path for path in samples()}
    if source in known:
        return [known[source]]
    # Asked before anything is looked for: what is not there must not be told from what is.
    found = app.inside(source if not _pattern(app, source) else _before_magic(source))
    if not _pattern(app, source) and not found.exists():
        # Never a hub id: nothing is fetched for a name that somebody typed.
        raise UserError("no such file or folder", where=source)
    return [_inside(app, path, source) for path in find_files.expand(source)]


def _pattern(app: App, source: str) -> bool:
    """Whether a source is a glob; a file may be named like one."""
    return bool(_MAGIC.search(source)) and not app.exists(source)


def _before_magic(pattern: str) -> Path:
    """The folder that a glob searches in.

    Raises: UserError where it goes up again behind that, or searches all folders too often.
    """
    parts = Path(pattern).parts
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    if ".." in parts[first:]:
        raise UserError("a pattern may not go up again with ..", where=pattern)
    if sum("**" in part for part in parts) > DEEP:
        raise UserError("a pattern may hold ** {deep} times at most", deep=DEEP, where=pattern)
    return Path(*parts[:first])


def _inside(app: App, path: Path, source: str) -> Path:
    """A file that a source names, if no link led out; what lies outside is not told by name."""
    try:
        return app.inside(path)
    except UserError as e:
        raise UserError(e.what, where=source, fix=e.fix) from None


def models(app: App) -> list[str]:
    """The bases that are offered: any other can be typed."""
    return list(dict.fromkeys([app.settings.model or EMBEDDED, EMBEDDED]))


def allowed_model(app: App, model: str) -> str:
    """A base that may be used here: the server's own, one inside of the folders, or a hub id.

    Raises: UserError where it is a path that leads outside.
    """
    model = model.strip()
    if not model or model in models(app):
        return model or EMBEDDED
    if app.exists(model) or not is_hub_id(model):
        app.inside(model)
        return model
    app.may_write()  # a hub id is fetched
    return model


def templates() -> list[str]:
    """The templates that are offered."""
    return ["auto", *builtin_templates()]


def allowed_template(app: App, template: str) -> str:
    """A template that may be used here: by name, or a YAML file inside of the folders.

    Raises: UserError where it is a path that leads outside.
    """
    template = template.strip() or "auto"
    if template.endswith((".yaml", ".yml")) or "/" in template or app.exists(template):
        app.inside(template)
    return template


def keep(app: App, file: Path) -> Path:
    """A dropped file's place, in the first data folder; where the server put it first it goes.

    The same file is kept once; another one of the same name gets a number.

    Raises: UserError where nothing may be written, or the disk is full or not writable.
    """
    app.may_write()
    try:
        return _keep(app, file)
    finally:
        file.unlink(missing_ok=True)


def _keep(app: App, file: Path) -> Path:
    folder = app.data_folders[0]
    digest = file_hash(file)
    name = re.sub(r"[^\w.\- ]+", "_", file.name).lstrip(".") or "data"
    stem, ending = name.partition(".")[::2]
    number = 1
    target = folder / name
    while target.exists():
        if file_hash(target) == digest:
            return target
        number += 1
        target = folder / f"{stem}-{number}.{ending}" if ending else folder / f"{stem}-{number}"
    try:
        with whole_file(target) as aside, file.open("rb") as given, aside.open("wb") as out:
            while block := given.read(1 << 20):
                out.write(block)
    except OSError as e:
        raise cannot_write(e, target) from e
    return target
