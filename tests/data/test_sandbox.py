"""A chat template is a stranger's program: whatever it does, it ends, and the next one renders."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from vicuna.data.conversation import Turn
from vicuna.data.templates import sandbox
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.sandbox import LimitError, RenderError, compile_template, render
from vicuna.errors import UserError

MESSAGES = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "在"}]
# Each exceeds a limit in its own way: loops, one operation, a filter, a method, recursion.
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "quiet loops": "{% set n = namespace(x=0) %}{% for a in range(99999) %}{% for b in "
    "range(99999) %}{% set n.x = n.x + 1 %}{% endfor %}{% endfor %}",
    "much text": "{% for a in range(99999) %}{{ 'abcdefgh' * 4096 }}{% endfor %}",
    "product": "{% set n = messages|length %}{{ 'a' * (n * 1500000000) }}",
    "constant": "{{ 'a' * 3000000000 }}",
    "format": "{{ '%3000000000d' % 1 }}",
    "format method": "{{ '{:3000000000}'.format(1) }}",
    "width": "{{ 'a'|center(3000000000) }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "tabs": "{{ '\t'.expandtabs(2000000000) }}",
    "indent": "{{ ('a\n' * 1000)|indent(3000000) }}",
    "replace": "{% set b = 'b' * 100000 %}{{ ('a' * 100000)|replace('a', b) }}",
    "join": "{{ ([''] * 1000000)|join('a' * 100000) }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(64) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "power": "{% set n = messages|length %}{{ (10 + n) ** (10 ** 8) % 7 }}",
    "folded power": "{{ 10 ** (10 ** 8) % 7 }}",
    "shared list": "{% set n = namespace(x=['a']) %}{% for i in range(64) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "shared json": "{% set n = namespace(x=['a']) %}{% for i in range(64) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "json": "{{ [1]|tojson(indent=3000000000) }}",
    "batch": "{{ [1]|batch(300000000, 'x')|list|length }}",
    "macro": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "recursive loop": "{% for m in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "lipsum": "{{ lipsum(10000000) }}",
    "bytes": "{{ (1).to_bytes(3000000000, 'big')|length }}",
    "sum": "{{ ([[1] * 10000] * 10000)|sum(start=[])|length }}",
    "date": "{{ strftime_now('%c' * 100000000) }}",
}


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "COMPUTING", 0.3)


def _render(source: str) -> str:
    return render(compile_template(source), messages=MESSAGES, add_generation_prompt=True)


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_ends_in_words(source: str) -> None:
    with pytest.raises((LimitError, RenderError, UserError)) as told:
        _render(source)
    assert str(told.value)
    assert _render("{{ messages[0].content }}") == "你好"


def test_parsing_is_bounded_too() -> None:
    for source in (
        "{{" + "(" * 100_000,
        "{{ " + "[" * 500 + "]" * 500 + " }}",
        "{% if x %}" * 9999,
    ):
        with pytest.raises(UserError):
            compile_template(source)
    with pytest.raises(UserError, match="characters"):
        compile_template("a" * (sandbox.SOURCE + 1))


def test_what_usual_templates_use_renders_as_in_transformers() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = """{{- bos_token }}{%- set ns = namespace(found=false) %}
{%- macro line(m) %}{{ m.role ~ ': ' ~ m['content'] | trim }}{%- endmacro %}
{% for m in messages %}
    {%- if loop.first %}{% set ns.found = true %}{% continue %}{% endif %}
    {%- if m.role == 'assistant' %}{% generation %}{{ line(m) }}{% endgeneration %}{% break %}{% endif %}
{% endfor %}
{%- for x in messages[::-1] %}{{ loop.index0 }}{{ x | tojson }}{{ x|tojson(indent=2) }}{% endfor %}
{{- messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- '</think>' in messages[1].content }}{{ messages[1].content.split('</think>')[-1].lstrip('\\n') }}
{{- 'a' * 3 }}{{ '%03d' % 7 }}{{ '{:>5}'.format('x') }}{{ 'ab'|replace('a', 'c')|indent(2) }}
{{- tools is defined and tools is not none }}{{ missing }}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
    values: dict[str, Any] = {"bos_token": "<s>", "tools": None, "add_generation_prompt": True}
    theirs = render_jinja_template([MESSAGES], chat_template=source, **values)[0]
    assert render(compile_template(source), messages=MESSAGES, **values) == theirs[0]


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(RenderError, match="roles must alternate"):
        _render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RenderError, match="undefined"):
        _render("{{ nothing.at.all }}")
    for inside in ("''.__class__.__mro__", "messages.__class__", "range.__globals__['os']"):
        with pytest.raises(RenderError):
            _render("{{ " + inside + ".x }}")


def test_the_day_is_the_callers() -> None:
    compiled = compile_template("{{ strftime_now('%d %b %Y') }}")
    assert render(compiled, now=datetime(2024, 7, 26)) == "26 Jul 2024"
    assert len(render(compiled)) == 11


def test_lone_surrogates_and_long_texts_pass() -> None:
    text = "\ud800" + "字" * 1_000_000
    assert render(compile_template("{{ x }}"), x=text) == text


def test_threads_and_forks_have_workers_of_their_own() -> None:
    compiled = compile_template("{{ x }}")
    said: dict[int, str] = {}

    def ask(n: int) -> None:
        for _ in range(20):
            said[n] = render(compiled, x=n)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {n: str(n) for n in range(8)}
    pid = os.fork()
    if not pid:
        os._exit(0 if render(compiled, x="child") == "child" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert render(compiled, x="parent") == "parent"


def test_a_worker_ends_with_its_process_and_ignores_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)")
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from vicuna.data.templates import sandbox as s\n"
        "print(s.render(s.compile_template('{{ x }}'), x=5), s._idle[0]._process.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    said, pid = done.stdout.split()
    assert said == "5"
    for _ in range(100):
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.1)
    pytest.fail("the worker outlived its process")


def test_a_conversation_that_sets_a_template_off_is_an_error_in_words() -> None:
    source = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        "{% if messages|length > 4 %}" + HOSTILE["loops"] + "{% endif %}"
    )
    template = ChatTemplate(source, "<s>", "</s>", ["<s>", "</s>"])
    talk = [Turn("user", "q"), Turn("assistant", "a")] * 3 + [Turn("user", "q")]
    with pytest.raises(UserError, match="computing"):
        template.prompt(talk)
