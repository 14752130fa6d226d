"""An Ollama Modelfile beside a GGUF file: weights, template, what ends an answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from vicuna.data.templates.renderer import Renderer
from vicuna.export import template_text


@dataclass
class Modelfile:
    """Its text, and in words what it cannot say."""

    text: str
    notes: list[str] = field(default_factory=list)


def modelfile(renderer: Renderer, weights: Path, adapter_only: bool = False) -> Modelfile:
    """The Modelfile of a GGUF file that lies beside it.

    Args:
        renderer: the template and the vocabulary that the weights were trained with.
        adapter_only: whether the file is an adapter; its base must then be filled in.
    """
    lines, notes = [], []
    if adapter_only:
        lines += ["# The base this adapter belongs to, as a GGUF file:", "FROM ./base.gguf"]
        lines.append(f"ADAPTER ./{weights.name}")
        notes.append("Modelfile: put the base's own GGUF file in place of base.gguf")
    else:
        lines.append(f"FROM ./{weights.name}")
    text = template_text.go(renderer)
    if text is None:
        notes.append(
            "Modelfile: this chat template is none of the known ones and was not put into Go's "
            "syntax; Ollama takes the one in the GGUF file where it recognises it"
        )
    else:
        lines.append(f'TEMPLATE """{text}"""')
        notes += _limits(renderer)
    system = template_text.default_system(renderer.template)
    if system:
        lines.append(f'SYSTEM """{system}"""')
    tokenizer = renderer.tokenizer
    stops = dict.fromkeys([renderer.end_id, *sorted(renderer.stop_ids)])
    lines += [f'PARAMETER stop "{tokenizer.token(i)}"' for i in stops]
    return Modelfile("\n".join(lines) + "\n", notes)


def _limits(renderer: Renderer) -> list[str]:
    template = template_text.recognised(renderer.template)
    notes = []
    if template is not None and template.separate_input:
        notes.append(
            "Modelfile: Ollama knows no input beside the question; material follows the question"
        )
    if template is not None and template.default_system_input:
        notes.append("Modelfile: the system prompt for questions with an input is not used there")
    return notes
