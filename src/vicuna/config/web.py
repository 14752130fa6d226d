"""The settings of `vicuna web`."""

from __future__ import annotations

from vicuna.config.base import Texts, Words, setting
from vicuna.config.decoding import ModelSettings


class WebSettings(ModelSettings):
    """The settings of `vicuna web`."""

    adapters: Texts = setting(
        ["runs"], "Folders", "folders with adapters and runs; new ones go to the first"
    )
    data: Texts = setting(
        ["data"], "Folders", "folders with data sets; saved conversations go to the first"
    )
    read_only: bool = setting(
        False, "Folders", "write nothing: no training, no deleting, no saving on this machine"
    )

    host: str = setting(
        "127.0.0.1", "Server", "address to listen on; any but the local one requires a password"
    )
    port: int = setting(0, "Server", "0: the first free port from 7860 up", ge=0, le=65535)
    allowed_hosts: Words = setting(
        [], "Server", "host names that may be used for the page, such as a proxy's"
    )
    password: str = setting(
        "", "Server", "asked before the page opens; the user's name is vicuna. Others of this "
        "machine see what a command was given: $VICUNA_PASSWORD or --password_file keep it"
    )  # fmt: skip
    password_file: str = setting("", "Server", "a text file that holds the password")
    auth: bool = setting(
        True, "Server", "--no-auth: no password, even if others can reach the page"
    )
    share: bool = setting(
        False, "Server", "open a public tunnel through a service of the gradio project"
    )
    max_upload: float = setting(2.0, "Server", "largest upload in GiB", gt=0, le=1024)
    open: bool = setting(True, "Server", "open the page in the browser")
