"""A template as text for other programs: Jinja for GGUF's metadata, Go's syntax for Ollama.

Both come from the template's own strings, so that they say what training and answering render.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace

from vicuna.data.templates.base import Template
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.literal import LiteralTemplate
from vicuna.data.templates.registry import builtin_templates
from vicuna.data.templates.renderer import Renderer
from vicuna.data.templates.skeleton import FIELD, Shape

# What a turn is told apart by: is it the first question, has it an answer already.
_Case = tuple[bool, bool]
_CASES: tuple[_Case, ...] = ((True, False), (False, False), (True, True), (False, True))


def jinja(renderer: Renderer) -> str:
    """A template in Jinja, as `tokenizer.chat_template` has it."""
    template = renderer.template
    if isinstance(template, ChatTemplate):
        return _default_thinking(template) + template.source
    assert isinstance(template, LiteralTemplate)
    return _to_jinja(template, _end(renderer))


def _default_thinking(template: ChatTemplate) -> str:
    """What makes the template ask for answers with or without a thought if nobody says which."""
    if template.thinking == "auto":
        return ""
    chosen = "true" if template.thinking == "on" else "false"
    return "".join(
        f"{{%- if {name} is not defined -%}}{{%- set {name} = {chosen} -%}}{{%- endif -%}}"
        for name in ("enable_thinking", "thinking")
        if re.search(rf"\b{name} is|\bif (?:not )?{name}\b", template.source)
    )


def go(renderer: Renderer) -> str | None:
    """A template in Go's syntax, for Ollama; None where it is a tokenizer's own of no known kind.

    The token that a sequence begins with is left to llama.cpp, which adds it by itself.
    """
    known = recognised(renderer.template)
    bos = renderer.tokenizer.data.bos_token
    if known is None:
        return None
    end = block(renderer.template)
    return _to_go(known, bos, _end(renderer)) + (f"{{{{ {_quoted(end)} }}}}" if end else "")


def _end(renderer: Renderer) -> str:
    """The token that ends an answer, as it is spelled."""
    return renderer.tokenizer.token(renderer.end_id)


def recognised(template: Template) -> LiteralTemplate | None:
    """The literal template that renders as this one does, itself if it is literal.

    A tokenizer's own template is compared on one and two questions behind a system prompt; it may
    begin the answer's thought, or close it (`block`).
    """
    if isinstance(template, LiteralTemplate):
        return template
    return _recognised(template)[0]


def block(template: Template) -> str:
    """What a recognised template writes at a prompt's end for thoughts: `<think>`, or an empty
    block of one; "" if it writes nothing."""
    return "" if isinstance(template, LiteralTemplate) else _recognised(template)[1]


def _recognised(template: Template) -> tuple[LiteralTemplate | None, str]:
    shapes = [Shape(True, (False,)), Shape(True, (False, False))]
    for name, spec in builtin_templates().items():
        found = LiteralTemplate(name, spec)
        for bos in (getattr(template, "bos_token", ""), ""):
            pairs = [(_flat(template, s), _flat(found, s, bos)) for s in shapes]
            if not all(own.startswith(known) for own, known in pairs):
                continue
            ends = {own[len(known) :] for own, known in pairs}
            end = ends.pop()
            if not ends and (not end or "think" in end):
                return found, end
    return None, ""


def default_system(template: Template) -> str:
    """The system prompt that a template brings where none is given."""
    known = recognised(template)
    if known is None or known is template:
        return known.default_system if known else ""
    own = _flat(template, Shape(False, (False,))).removesuffix(block(template))
    for bos in (getattr(template, "bos_token", ""), ""):
        before, _, after = _flat(known, Shape(True, (False,)), bos).partition("\x00system-1\x00")
        if own.startswith(before) and own.endswith(after) and len(own) > len(before + after):
            return own[len(before) : len(own) - len(after)]
    return ""


def _flat(template: Template, shape: Shape, bos: str = "") -> str:
    """What surrounds the turns, the token a sequence begins with spelled `bos`."""
    slots = template._skeleton(shape)
    return template._flat(
        [replace(s, kind="mark", text=bos) if s.kind == "bos" else s for s in slots]
    )


# -- the strings of a template ----


def _question(template: LiteralTemplate, case: _Case) -> str:
    first, past = case
    return template._question(0 if first else 1, past, has_input=False)


def _questions(template: LiteralTemplate) -> tuple[list[tuple[_Case, str]], str]:
    """(cases whose question looks different, with it; the question of all others)."""
    usual = _question(template, (False, False))
    texts = [(case, _question(template, case)) for case in _CASES]
    return [(case, text) for case, text in texts if text != usual], usual


def _answer(template: LiteralTemplate) -> str:
    """An answer that stands in a prompt: it lies in the past."""
    return template.spec.past_assistant or template.spec.assistant


def _parts(text: str) -> list[tuple[str, str]]:
    """(field or "", literal or "") of a template's string."""
    parts = [("", p) if i % 2 == 0 else (p, "") for i, p in enumerate(FIELD.split(text))]
    return [p for p in parts if any(p)]


def _quoted(text: str) -> str:
    """A string as Jinja and Go both read it."""
    return json.dumps(text, ensure_ascii=False)


# -- Jinja ----

# Text comes from expressions alone, so that no rule about white space matters.


def _to_jinja(template: LiteralTemplate, end: str) -> str:
    spec = template.spec
    words = {"bos": "bos_token", "end": _quoted(end), "system": "system", "text": "turn['content']"}

    def said(string: str, **other: str) -> str:
        pieces = [{**words, **other}[f] if f else _quoted(t) for f, t in _parts(string)]
        return f"{{{{- {' ~ '.join(pieces)} -}}}}" if pieces else ""

    asked = words["text"]
    if not spec.system:  # a system prompt has no place of its own: before the first question
        lead = '(system ~ "\\n\\n" if system and loop.first else "")'
        asked = f"{lead} ~ {asked}"
    others, usual = _questions(template)
    lines = [
        "{%- if messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        f"{{%- set system = {_quoted(spec.default_system)} -%}}{{%- set turns = messages -%}}",
        "{%- endif -%}",
        said(spec.start),
        f"{{%- if system -%}}{said(spec.system)}{{%- endif -%}}" if spec.system else "",
        "{%- for turn in turns -%}",
        "{%- if turn['role'] == 'user' -%}",
    ]
    for n, ((first, past), text) in enumerate(others):
        test = f"{'' if first else 'not '}loop.first and {'not ' if past else ''}loop.last"
        lines += [f"{{%- {'elif' if n else 'if'} {test} -%}}", said(text, text=asked)]
    lines += ["{%- else -%}", said(usual, text=asked), "{%- endif -%}"] if others else [
        said(usual, text=asked)
    ]  # fmt: skip
    lines += ["{%- else -%}", said(_answer(template)), "{%- endif -%}", "{%- endfor -%}"]
    return "\n".join(line for line in lines if line)


# -- Go ----

_GO_LOOP = """\
{{- range $i, $turn := .Messages -}}
{{- $led := eq (index $.Messages 0).Role "system" -}}
{{- $first := or (eq $i 0) (and (eq $i 1) $led) -}}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}"""


def _to_go(template: LiteralTemplate, bos: str, end: str) -> str:
    spec = template.spec
    content = "{{ $turn.Content }}"
    words = {"bos": bos, "end": end}

    def said(text: str, lead: str = "") -> str:
        pieces = []
        for field, literal in _parts(text):
            if field in ("text", "system"):
                pieces.append((lead if field == "text" else "") + content)
            elif literal or words[field]:
                pieces.append(f"{{{{ {_quoted(literal or words[field])} }}}}")
        return "".join(pieces)

    lead = ""
    if not spec.system:
        before = '{{ (index $.Messages 0).Content }}{{ "\\n\\n" }}'
        lead = f"{{{{ if and $first $led }}}}{before}{{{{ end }}}}"
    others, usual = _questions(template)
    lines = [
        said(spec.start.removeprefix("{bos}")),
        _GO_LOOP,
        '{{- if eq $turn.Role "system" -}}',
        said(spec.system),
        '{{- else if eq $turn.Role "user" -}}',
    ]
    for n, ((first, past), text) in enumerate(others):
        test = f"and {'$first' if first else '(not $first)'} {'(not $last)' if past else '$last'}"
        lines += [f"{{{{- {'else if' if n else 'if'} {test} -}}}}", said(text, lead)]
    lines += ["{{- else -}}", said(usual, lead), "{{- end -}}"] if others else [said(usual, lead)]
    lines += ["{{- else -}}", said(_answer(template)), "{{- end -}}", "{{- end -}}"]
    return "".join(lines)
