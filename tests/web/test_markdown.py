"""Texts of people and models on the page: markdown, and nothing that does anything."""

from __future__ import annotations

import re
from functools import lru_cache, partial
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vicuna.data.templates.base import ThoughtMarks
from vicuna.generate.thoughts import Parts
from vicuna.serve.worker import BeamState, Snapshot
from vicuna.web import chat_html, code_html, markdown
from vicuna.web.i18n import translate
from vicuna.web.sessions import Session

ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "[link](javascript:alert(1))",
    "![image](http://example.com/x.png)",
    "![image][1]\n\n[1]: http://example.com/x.png",
    "</textarea><script>alert(1)</script>",
    "`<b>` and\n\n    <i>code</i>\n\n```html\n<script>x</script>\n```",
    "<!-- --><style>*{display:none}</style>",
    "```python\nprint('</span><script>alert(1)</script>')  # <img src=x onerror=alert(1)>",
    '```"><script>alert(1)</script>\n<b>',
]
# What the renderer makes by itself; no tag of a text may be among it.
TAGS = [
    "p",
    "br",
    "strong",
    "em",
    "s",
    "code",
    "pre",
    "span",
    "blockquote",
    "ul",
    "ol",
    "li",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "a",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
]
TAG = re.compile(r"<\s*/?\s*([a-zA-Z!][^\s>/]*)([^>]*)>")


def harmless(html: str) -> None:
    for name, attributes in TAG.findall(html):
        assert name in TAGS, html
        assert not re.search(r"\bon\w+\s*=", attributes), html
    assert not re.search(r"""href=["']?\s*(javascript|data|vbscript):""", html, re.I)


@pytest.mark.parametrize("text", ATTACKS)
def test_no_text_becomes_a_tag_a_script_or_an_image(text: str) -> None:
    harmless(markdown.html(text))
    grown = markdown.Growing()
    for end in range(len(text) + 1):
        harmless(grown(text[:end]))


@given(st.text(alphabet="<>\"'&!-/`*[]()#a: \nxsonclick=javscript", max_size=60))
def test_nor_does_any_other(text: str) -> None:
    harmless(markdown.html(text))


DOCUMENT = """# Ein\u2028Anfang

Text *so*,
weiter.

```python
def f(x):  # 注释
    return "a <b>" + str(x)

# more
```

| a | b |
|---|---|
| 1 | 2 |

- one
- two

> said

```
no language
"""


def test_what_grows_looks_as_what_is_whole() -> None:
    grown = markdown.Growing()
    for end in range(len(DOCUMENT) + 1):
        assert grown(DOCUMENT[:end]) == markdown.html(DOCUMENT[:end])
    assert grown("another") == markdown.html("another")
    assert grown("one\r\n\r\ntwo\rthree\n\nfour\n\nfive") == markdown.html(
        "one\n\ntwo\nthree\n\nfour\n\nfive"
    )


def test_code_is_coloured_also_before_its_end_and_stays_the_same_text() -> None:
    html = markdown.html("```python\nif x < 1:\n    return 'y'  # 注释")
    for part in ('<span class="h-k">if</span>', "&lt;", '<span class="h-c1"># 注释</span>'):
        assert part in html
    code = "\n\n  x = '<&>'\t\n"
    assert unescape(re.sub(r"<[^>]+>", "", code_html.coloured(code, "py"))) == code
    assert code_html.coloured("<b>", "no such language") == "&lt;b&gt;"


def test_long_code_that_grows_costs_a_few_times_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    whole = code_html.coloured.__wrapped__
    monkeypatch.setattr(
        code_html, "coloured", lru_cache(lambda c, lang: (seen.append(len(c)), whole(c, lang))[1])
    )
    code = "value = compute(1, 'text')\n" * 2000
    for end in range(code_html.SMALL + 1, len(code), 40):
        html = code_html.growing(code[:end], "python")
        assert unescape(re.sub(r"<[^>]+>", "", html)) == code[:end]
    assert sum(seen) < 6 * len(code)


def test_blocks_that_are_done_are_not_rendered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, seen = markdown._reader(grows=True), []
    parse = reader.parse
    monkeypatch.setattr(
        reader, "parse", lambda text, *e: (seen.append(len(text)), parse(text, *e))[1]
    )
    grown, text = markdown.Growing(), "A paragraph of some words.\n\n" * 300
    for end in range(0, len(text), 10):
        grown(text[:end])
    assert max(seen) < 200


def test_markdown_is_rendered() -> None:
    html = markdown.html("**粗** `x < y`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n1. 一\n2. 二")
    for part in ("<strong>粗</strong>", "<code>x &lt; y</code>", "<td>2</td>", "<li>二</li>"):
        assert part in html
    assert 'rel="noopener noreferrer nofollow"' in markdown.html("[a](https://example.com)")


@pytest.mark.parametrize("text", ATTACKS)
def test_conversations_and_beams_are_as_safe(text: str) -> None:
    session = Session("0" * 32)
    session.begin(text)
    session.end(
        session.request_id,
        Parts(text, text),
        {"tokens": 3, "speed": 1.0, "first": 0.1, "who": text},
    )
    words = partial(translate, "zh")
    snapshot = Snapshot(text, (BeamState(text, -1.0, 3), BeamState("b", -2.0, 3)))
    for html in (
        chat_html.history(session, words),
        chat_html.growing(snapshot, "columns", words),
        chat_html.growing(Snapshot(f"<think>{text}", marks=ThoughtMarks()), "columns", words),
        chat_html.growing(
            Snapshot(f"<think>{text}</think>{text}", marks=ThoughtMarks()), "columns", words
        ),
        chat_html.problem(text, text),
    ):
        assert "<script" not in html
        assert "<img" not in html
        assert "<style" not in html
        assert html.count("</textarea>") == html.count("<textarea")
        assert not re.search(r"<[^>]*\son(error|load)\s*=", html)
