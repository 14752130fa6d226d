"""`vicuna doctor MODEL`: is the tokenizer sane, does the template fit, what has this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence

from vicuna import config
from vicuna.data.encode import Encoder
from vicuna.data.template import find
from vicuna.errors import EXIT_MISTAKE


def run(words: Sequence[str]) -> int:
    """Print the findings; exit code 2 where one is an error."""
    free: list[str] = []
    settings, _ = config.parse(config.DoctorSettings, words, free=free)
    model = free[0] if free else settings.model
    from vicuna.model import load
    from vicuna.model.base import locate_vocabulary
    from vicuna.model.vocabulary import Finding, check_up, load_vocabulary

    folder = locate_vocabulary(model)
    vocabulary = load_vocabulary(folder)
    encoder = Encoder(vocabulary)
    template = find(settings.template, vocabulary)
    model_config = load.read_config(folder)
    text_config = model_config.get("text_config", model_config)
    findings = check_up(encoder, template, text_config.get("vocab_size"), text_config)
    device = load.pick_device()
    precision, reason = load.fastest(device)
    findings.append(Finding("ok", f"device {device}, weights best in {precision}: {reason}"))
    bad = any(f.level == "error" for f in findings)
    if settings.json_output:
        found = [{"level": f.level, "text": f.text} for f in findings]
        print(json.dumps({"model": model, "template": template.name, "findings": found}))
        return EXIT_MISTAKE if bad else 0
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(f"[bold]{escape(model)}[/] with template {template.name}")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for f in findings:
        console.print(f"  [{colours[f.level]}]{f.level:8}[/]{escape(f.text)}")
    return EXIT_MISTAKE if bad else 0
