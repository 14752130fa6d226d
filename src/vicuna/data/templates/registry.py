"""Finding a template: by name, in a file of the user's, in the tokenizer, or as it was saved."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from vicuna.data.templates.base import Template
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.literal import LiteralTemplate
from vicuna.data.tokenizer import TokenizerData
from vicuna.errors import UserError
from vicuna.json_yaml import read_yaml


@lru_cache(maxsize=1)
def builtin_templates() -> dict[str, dict[str, Any]]:
    """The templates that come with the project, by name."""
    import yaml

    text = resources.files("vicuna.data.templates").joinpath("templates.yaml").read_text("utf-8")
    specs: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return specs


def find_template(name: str, vocabulary: TokenizerData) -> Template:
    """The template of this name: `auto`, a built-in one, or a YAML file of the user's.

    `auto` is the one that a merged model brings, else the tokenizer's own chat template, or alpaca
    where it has none.

    Raises: UserError where there is no such template.
    """
    if name == "auto":
        if vocabulary.template:
            return template_from_dict(vocabulary.template)
        if not vocabulary.chat_template:
            return LiteralTemplate("alpaca", builtin_templates()["alpaca"])
        return ChatTemplate(
            vocabulary.chat_template,
            vocabulary.bos_token,
            vocabulary.eos_token,
            list(vocabulary.special_tokens),
            words=vocabulary.named_tokens,
        )
    if name in builtin_templates():
        return LiteralTemplate(name, builtin_templates()[name])
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return LiteralTemplate(path.stem, read_yaml(path))
    raise UserError(
        "no template {name!r}",
        name=name,
        builtin_templates=", ".join(builtin_templates()),
        where="template",
        fix="Known: auto, {builtin_templates}, or a YAML file of your own (docs/data.md).",
    )


def template_from_dict(saved: dict[str, Any]) -> Template:
    """The template that `to_dict` wrote, now or in an older version."""
    saved = dict(saved)
    kind, name = saved.pop("kind"), saved.pop("name")
    # Chat templates of older versions were asked for answers without a thought.
    thinking = saved.pop("thinking", "off" if kind == "jinja" else "auto")
    loss = saved.pop("thinking_loss", True)
    template: Template
    if kind == "jinja":
        template = ChatTemplate(
            saved["source"],
            saved["bos_token"],
            saved["eos_token"],
            saved["controls"],
            name,
            saved.get("words"),
            saved.get("date", ""),
        )
    else:
        template = LiteralTemplate(name, saved)
    return template.choose(thinking, loss)
