"""A page on a tiny random model, for the tests of the page: over HTTP, and in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from generate_kit import tiny_llama

from kit import save_tokenizer, with_adapter
from vicuna.config import WebSettings
from vicuna.web.state import App

CONTEXT = 512


def make_place(folder: Path) -> Path:
    """A tiny base, two adapters of it, one of another base, and an empty data folder."""
    from vicuna.model.adapter import identify, save

    torch.set_num_threads(1)
    tokenizer = save_tokenizer(folder / "base", eos_token="<|im_end|>")
    shape = {"eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": CONTEXT}
    tiny_llama(len(tokenizer), **shape).save_pretrained(folder / "base")
    base = {"base": {"name": "tiny", **identify(folder / "base")}}
    for seed, name in enumerate(("law", "poems"), 1):
        (folder / "runs" / name).mkdir(parents=True)
        peft = with_adapter(tiny_llama(len(tokenizer), **shape), seed, alpha=64)
        save(peft, folder / "runs" / name, base)
    (folder / "runs" / "stranger").mkdir()
    wide = with_adapter(tiny_llama(len(tokenizer), hidden_size=64, **shape), 3)
    other = {"base": {**base["base"], "name": "another base", "hidden_size": 64}}
    save(wide, folder / "runs" / "stranger", other)
    (folder / "data").mkdir()
    return folder


@contextmanager
def open_page(place: Path, **options: Any) -> Iterator[tuple[App, str]]:
    """(state, address) of a page that is open."""
    from vicuna.web.server import serve

    given: dict[str, Any] = {
        "model": str(place / "base"), "template": "chatml", "precision": "fp32", "open": False,
        "adapters": [str(place / "runs")], "data": [str(place / "data")], **options,
    }  # fmt: skip
    app = App(WebSettings(**{name: v for name, v in given.items() if v is not None}))
    page = serve(app, wait=False)
    try:
        yield app, page.local_url
    finally:
        page.close(verbose=False)
        app.close()
