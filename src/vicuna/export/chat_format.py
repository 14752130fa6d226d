"""How a model wants to be talked to, in the files of a folder in Hugging Face's layout."""

from __future__ import annotations

import json
from pathlib import Path

from vicuna.data.templates.renderer import Renderer
from vicuna.export.template_text import jinja
from vicuna.json_yaml import read_json
from vicuna.model.adapter import META


def write_chat_format(renderer: Renderer, folder: Path) -> None:
    """Write the template and the tokens that end an answer.

    `vicuna.json` keeps the template letter by letter for this project; in Jinja, among the
    tokenizer's files, it is for every other program.
    """
    _write(folder / META, {"template": renderer.template.to_dict()})
    (folder / "chat_template.json").unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(jinja(renderer), encoding="utf-8")
    generation = folder / "generation_config.json"
    content = read_json(generation) if generation.is_file() else {}
    content["eos_token_id"] = sorted(renderer.stop_ids)
    _write(generation, content)


def _write(path: Path, content: dict[str, object]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=2)
    path.write_text(text + "\n", encoding="utf-8")
