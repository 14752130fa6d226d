"""`vicuna doctor MODEL`: is the tokenizer sane, does the template fit, what has this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vicuna import config
from vicuna.data.templates.base import Template
from vicuna.data.templates.compare_with_original import differences
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import EXIT_MISTAKE, UserError
from vicuna.messages import Message
from vicuna.model.base import locate_vocabulary
from vicuna.model.config_files import read_config
from vicuna.model.vocabulary import Finding, check_embedding_rows, check_up, load_vocabulary
from vicuna.terminal import say_json


def examine(folder: Path, template: str) -> tuple[Template, list[Finding]]:
    """(the template, what is found of a base's tokenizer, template and weights' headers).

    Raises: UserError where one of them cannot be read at all.
    """
    from vicuna.weights.read import check_weights

    vocabulary = load_vocabulary(folder)
    tokenizer = Tokenizer(vocabulary)
    chosen = find_template(template, vocabulary)
    config = read_config(folder)
    inner = config.get("text_config")
    text_config = inner if isinstance(inner, dict) else config
    found = check_up(tokenizer, chosen, text_config.get("vocab_size"), text_config)
    try:
        check_embedding_rows(Renderer(chosen, tokenizer), config, folder)
    except UserError as e:
        found.append(Finding("error", e.what))
    try:
        check_weights(folder)
    except UserError as e:
        found.append(Finding("error", str(e).split("\n")[0]))
    return chosen, found + _fidelity(Renderer(chosen, tokenizer))


def _fidelity(renderer: Renderer) -> list[Finding]:
    """Whether training examples are what the template's makers render."""
    name = renderer.template.name
    lines = differences(renderer)
    found = [
        Finding("warning", Message("template {name}: {line}", name=name, line=line))
        for line in lines
    ]
    found += [Finding("ok", line) for line in differences(renderer, thoughts=True)]
    if not lines:
        same = "training examples are the template's own rendering, token for token"
        found.append(Finding("ok", same))
    return found


def run(words: Sequence[str]) -> int:
    """Print the findings; exit code 2 where one is an error."""
    free: list[str] = []
    settings, _ = config.parse(config.DoctorSettings, words, free=free)
    model = free[0] if free else settings.model
    from vicuna.model import load

    folder = locate_vocabulary(model)
    template, findings = examine(folder, settings.template)
    device = load.pick_device()
    precision, reason = load.fastest(device)
    findings.append(
        Finding(
            "ok",
            Message(
                "device {device}, weights best in {precision}: {reason}",
                device=device,
                precision=precision,
                reason=reason,
            ),
        )
    )
    bad = any(f.level == "error" for f in findings)
    if settings.json_output:
        found = [{"level": f.level, "text": f.text} for f in findings]
        say_json({"model": model, "template": template.name, "findings": found})
        return EXIT_MISTAKE if bad else 0
    from rich.markup import escape

    from vicuna.console import Console

    console = Console()
    console.print(f"[bold]{escape(model)}[/] with template {template.name}")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for f in findings:
        console.print(f"  [{colours[f.level]}]{f.level:8}[/]{escape(f.text)}")
    return EXIT_MISTAKE if bad else 0
