"""Commands in children of this process, so that torch is imported once, and what can go wrong."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import selectors
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PATIENCE = 240  # seconds, after which a child counts as hanging

# Imported before the first fork: what nearly every command needs, and takes long.
HEAVY = ("torch", "transformers", "peft", "safetensors.torch", "gguf", "yaml", "rich.table",
         "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
         "transformers.models.llama.modeling_llama", "matplotlib.figure", "bitsandbytes",
         "vicuna.train.loop", "vicuna.train.setup", "vicuna.commands.plan", "vicuna.commands.merge",
         "vicuna.generate.load", "vicuna.generate.engines.torch", "vicuna.export.gguf_writer",
         "vicuna.commands.data", "vicuna.commands.quantize", "vicuna.verify.report")  # fmt: skip


def warm_up() -> None:
    """Import what is heavy into this process, for its children."""
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in HEAVY:
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)


@dataclass
class Done:
    """What a command did. left: files that were not there before, relative to its folder."""

    code: int
    out: str
    err: str
    left: list[str]

    @property
    def all(self) -> str:
        return self.out + self.err


def vicuna(
    folder: Path, *words: str, said: str = "", before: Callable[[], Any] | None = None, **env: str
) -> Done:
    """`vicuna WORDS` in a folder, in a child of this process.

    Args:
        before: called in the child first: takes rights away, or room.
    """
    there = _files(folder)
    pipes = [os.pipe() for _ in range(3)]
    child = _fork(lambda: _child(folder, words, pipes, before, env))
    (given, to), (out, his_out), (err, his_err) = pipes
    for fd in (given, his_out, his_err):
        os.close(fd)
    if said:
        os.write(to, said.encode())
    os.close(to)
    printed = _listen(child, out, err)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Done(code, *printed, sorted(_files(folder) - there))


def _fork(run: Callable[[], NoReturn]) -> int:
    """Fork, and `run` in the child. The id of the child.

    From a thread of its own, which is the child's main thread: OpenMP keeps its workers by the
    thread that called for them. This one has none yet; those of the test's thread do not live in
    the child, where it would wait for them for ever.
    """
    made: list[int] = []

    def fork() -> None:
        child = os.fork()
        if child == 0:
            run()
        made.append(child)

    thread = threading.Thread(target=fork)
    thread.start()
    thread.join()
    return made[0]


def _listen(child: int, *ends: int) -> list[str]:
    """What a child prints; one that takes too long is killed."""
    until = time.monotonic() + PATIENCE
    printed = dict.fromkeys(ends, b"")
    with selectors.DefaultSelector() as waiting:
        for fd in ends:
            waiting.register(fd, selectors.EVENT_READ)
        while waiting.get_map():
            if time.monotonic() > until:
                os.kill(child, signal.SIGKILL)
            for key, _ in waiting.select(1):
                block = os.read(key.fd, 1 << 16)
                printed[key.fd] += block
                if not block:
                    waiting.unregister(key.fd)
                    os.close(key.fd)
    return [text.decode("utf-8", "replace") for text in printed.values()]


def _child(
    folder: Path,
    words: tuple[str, ...],
    pipes: list[tuple[int, int]],
    before: Callable[[], Any] | None,
    env: dict[str, str],
) -> NoReturn:
    code = 99
    try:
        for fd, (read, write) in enumerate(pipes):
            os.dup2(write if fd else read, fd)
        os.closerange(3, 256)
        sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.update(env | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        os.environ.setdefault("VICUNA_CACHE", str(folder / "cache"))
        sys.argv = ["vicuna", *words]
        from vicuna.cli import main

        if before is not None:
            before()
        main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
        finally:
            os._exit(code)


def _files(folder: Path) -> set[str]:
    return {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder).parts[0] != "cache"
    }


# -- what takes rights and room away, in the child ----


def no_rights() -> None:
    """Permissions count, for the superuser, too: he gives up what lets him pass over them."""
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if libc.capset(header, none):
        raise OSError(ctypes.get_errno(), "capset")


def files_at_most(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes: a quota, as the system itself applies it."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def full_at(number: int) -> Callable[[], None]:
    """The disk is full when the number-th file is opened for writing, and from then on."""

    def watch() -> None:
        seen = 0

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal seen
            if event != "open" or not isinstance(args[0], (str, bytes)):
                return
            path, _, flags = args
            if os.fsdecode(path).startswith("/dev/") or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            seen += 1
            if seen >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(path))

        sys.addaudithook(hook)

    return watch


# -- what can be wrong with a file ----

PNG = bytes.fromhex("89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de")


def replaced(content: bytes) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        path.unlink()
        path.write_bytes(content)

    return put


def _truncated(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _unreadable(path: Path) -> None:
    path.chmod(0)


ANY_FILE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": replaced(b""),
    "truncated": _truncated,
    "a folder": _folder,
    "a picture": replaced(PNG),
    "a binary": replaced(bytes(range(256)) * 8),
    "no permission": _unreadable,
}
# What stands where a table is expected, in JSON and in YAML.
TABLES: dict[str, bytes] = {
    "a list": b"[]",
    "a list of lists": b"[[1], [2]]",
    "a number": b"7",
    "null": b"null",
    "a word": b'"word"',
    "nested lists": b"[" * 100_000,
    "nested tables": b'{"a":' * 100_000,
    "nested whole": b"[" * 100_000 + b"]" * 100_000,
    "half a character": b'{"a": "\\ud800", "\\udfff": 1}',
    "NUL": b'{"a": "\\u0000"}\x00',
    "latin": '{"a": "é"}'.encode("latin-1"),
    "a huge number": b'{"vocab_size": 1e999, "a": ' + b"9" * 5000 + b"}",
}


def copied(place: Path, folder: Path) -> Path:
    """A copy of the place, small files as links that are broken before they are written."""
    shutil.copytree(place, folder)
    return folder
