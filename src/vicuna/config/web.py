"""The settings of `vicuna web`."""

from __future__ import annotations

from vicuna.config.base import Texts, Words, setting
from vicuna.config.decoding import ModelSettings


class WebSettings(ModelSettings):
    """The settings of `vicuna web`."""

    adapters: Texts = setting(
        ["runs"], "Folders", "where adapters and runs are looked for; new ones go to the first"
    )
    data: Texts = setting(
        ["data"], "Folders", "where data sets are looked for; saved conversations go to the first"
    )
    read_only: bool = setting(
        False, "Folders", "write nothing: no training, no deleting, no saving on this machine"
    )

    host: str = setting(
        "127.0.0.1", "Server", "address to listen on; any other than this machine asks a password"
    )
    port: int = setting(0, "Server", "0: the first free one from 7860 on", ge=0, le=65535)
    allowed_hosts: Words = setting(
        [], "Server", "names under which others know the page: of a proxy, of this machine"
    )
    password: str = setting(
        "", "Server", "asked before the page opens; the user's name is vicuna. Others of this "
        "machine see what a command was given: $VICUNA_PASSWORD or --password_file keep it"
    )  # fmt: skip
    password_file: str = setting("", "Server", "a text file that holds the password")
    auth: bool = setting(
        True, "Server", "--no-auth: no password, also where others can reach the page"
    )
    share: bool = setting(
        False, "Server", "open a public tunnel through a service of the gradio project"
    )
    max_upload: float = setting(2.0, "Server", "GiB that an uploaded file may have", gt=0, le=1024)
    open: bool = setting(True, "Server", "open the page in the browser")
