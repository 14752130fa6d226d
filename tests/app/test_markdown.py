"""Texts of people and models on the page: markdown, and nothing that does anything."""

from __future__ import annotations

import re
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vicuna.app import chat_html, markdown
from vicuna.app.room import Branch, Picture
from vicuna.app.sessions import Session
from vicuna.app.words import say

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


@given(st.text(alphabet="<>\"'&!-/`*[]()#a: \nxsonclick=javscript", max_size=60))
def test_nor_does_any_other(text: str) -> None:
    harmless(markdown.html(text))


def test_markdown_is_rendered() -> None:
    html = markdown.html("**粗** `x < y`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n1. 一\n2. 二")
    for part in ("<strong>粗</strong>", "<code>x &lt; y</code>", "<td>2</td>", "<li>二</li>"):
        assert part in html
    assert 'rel="noopener noreferrer nofollow"' in markdown.html("[a](https://example.com)")


@pytest.mark.parametrize("text", ATTACKS)
def test_conversations_and_beams_are_as_safe(text: str) -> None:
    session = Session("0" * 32)
    session.begin(text)
    session.end(session.asked, text, {"tokens": 3, "speed": 1.0, "first": 0.1, "who": text})
    words = partial(say, "zh")
    picture = Picture(text, (Branch(text, -1.0, 3), Branch("b", -2.0, 3)))
    for html in (
        chat_html.history(session, words),
        chat_html.growing(picture, "columns", words),
        chat_html.problem(text, text),
    ):
        assert "<script" not in html
        assert "<img" not in html
        assert "<style" not in html
        assert html.count("</textarea>") == html.count("<textarea")
        assert not re.search(r"<[^>]*\son(error|load)\s*=", html)
