"""The password of the page: where it comes from, and how often one may guess."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from vicuna.config import WebSettings
from vicuna.errors import UserError
from vicuna.messages import Message

VARIABLE = "VICUNA_PASSWORD"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST = 8  # characters; a Chinese one counts as two
FREE = 4  # wrong passwords without a pause
PAUSE, LONGEST = 1.0, 15.0  # seconds: after the next one, doubled each time, and at most
ADDRESSES = 4096  # whose wrong passwords are remembered
FORGOTTEN = 3600.0  # seconds
_COMMON = (
    "password",
    "passw0rd",
    "qwertyui",
    "qwertyuiop",
    "vicuna",
    "letmein",
    "admin",
    "abcdefgh",
)
_ROW = "0123456789012345678909876543210987654321"


def password(settings: WebSettings) -> str:
    """What has to be typed before the page opens: what was given, by the option, a file or the
    environment; one that is made up where others can reach the page; "" for nothing.

    Raises: UserError where it is weak, its file cannot be read, or there shall be none.
    """
    given, where = _given(settings)
    if not settings.auth:
        if where in ("password", "password_file"):
            raise UserError(
                "a password and --no-auth were given", where=where, fix="Leave one of them out."
            )
        return ""
    if where:
        _check(given, where)
        return given
    reachable = settings.share or settings.host not in LOOPBACK
    return secrets.token_urlsafe(9) if reachable else ""


def made_up(settings: WebSettings) -> bool:
    """Whether nobody but this program knows the password: it must be told then."""
    return not _given(settings)[1]


def _given(settings: WebSettings) -> tuple[str, str]:
    """(password, where it was given); ("", "") for nowhere."""
    if "password" in settings.model_fields_set:
        return settings.password, "password"
    if settings.password_file:
        path = Path(settings.password_file).expanduser()
        try:
            # An editor ends the line; what else is there belongs to the password.
            text = path.read_text(encoding="utf-8-sig")
            return text.removesuffix("\n").removesuffix("\r"), "password_file"
        except (OSError, ValueError) as e:
            raise UserError(
                "the password's file cannot be read: {strerror}",
                strerror=getattr(e, "strerror", None) or e,
                where=f"password_file {settings.password_file}",
                fix="Give a text file that holds the password and nothing else.",
            ) from e
    found = os.environ.get(VARIABLE, "")
    return (found, VARIABLE) if found else ("", "")


def _check(word: str, where: str) -> None:
    """Raises: UserError where a password would be guessed at once."""
    plain = word.strip().lower()
    guessed = plain.strip("0123456789!.") in _COMMON or plain in _COMMON or plain in _ROW
    weak = ""
    if not plain:
        weak = "the password is blank"
    elif sum(1 if c.isascii() else 2 for c in plain) < LEAST:
        weak = Message("the password is too short: it needs {least} characters", least=LEAST)
    elif guessed or len(set(plain)) < 3:
        weak = "the password is among those that are guessed first"
    if weak:
        raise UserError(
            weak,
            least=LEAST,
            where=where,
            fix="Give at least {least} characters, a Chinese one counts as two; or leave it out "
            "and one is made up where it is needed.",
        )


class Turn:
    """One try at the password; `told` says how it ended."""

    def __init__(self) -> None:
        self.right: bool | None = None

    def told(self, right: bool) -> None:
        """Note whether the password was right."""
        self.right = right


@dataclass
class _Tries:
    wrong: int = 0
    last: float = 0.0
    waiting: bool = False


class Brake:
    """Makes wrong passwords slow, for each address: the more there were, the longer the next takes.

    Only one try of an address waits at a time; others meanwhile are refused. Addresses that nobody
    used for long are forgotten, and the oldest where there are too many.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all: OrderedDict[str, _Tries] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    def pause(self, address: str) -> float:
        """Seconds that the next try of an address waits."""
        tries = self._all.get(_net(address))
        if tries is None or tries.wrong < FREE:
            return 0.0
        wanted = min(LONGEST, PAUSE * 2.0 ** min(tries.wrong - FREE, 20))
        return max(0.0, tries.last + wanted - self._clock())

    @asynccontextmanager
    async def turn(self, address: str) -> AsyncIterator[Turn | None]:
        """A try, after its pause; None where another one of the address still waits."""
        tries = self._of(address)
        if tries.waiting:
            yield None
            return
        turn = Turn()
        tries.waiting = True
        try:
            await asyncio.sleep(self.pause(address))
            yield turn
        finally:
            tries.waiting = False
            if turn.right:
                tries.wrong = 0
            elif turn.right is False:
                tries.wrong += 1
                tries.last = self._clock()
            if not tries.wrong:
                self._all.pop(_net(address), None)

    def _of(self, address: str) -> _Tries:
        net, now = _net(address), self._clock()
        while self._all:
            oldest, tries = next(iter(self._all.items()))
            if tries.waiting or (len(self._all) < ADDRESSES and now - tries.last < FORGOTTEN):
                break
            self._all.pop(oldest)
        found = self._all.setdefault(net, _Tries(last=now))
        self._all.move_to_end(net)
        return found


def _net(address: str) -> str:
    """An address; of the new kind the network, of which one household has all addresses."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)
