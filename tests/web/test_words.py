"""Two languages: every text in both, and marks that become texts where the page is sent."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from vicuna.web import i18n

FIELD = re.compile(r"\{(\w+)")


def test_every_text_is_in_both_languages_with_the_same_fields() -> None:
    for key, (english, chinese) in i18n.catalog().items():
        assert english.strip(), key
        assert chinese.strip(), key
        assert sorted(FIELD.findall(english)) == sorted(FIELD.findall(chinese)), key


def test_no_key_stands_twice_in_a_file() -> None:
    for path in (Path(i18n.__file__).parent / "texts").glob("*.yaml"):
        keys = re.findall(r"^([\w.]+):", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [k for k, n in Counter(keys).items() if n > 1] == [], path.name


def test_a_mark_becomes_the_text_of_the_language_inside_json_too() -> None:
    body = json.dumps({"label": i18n.label("page.chat"), "other": "@@no.such.key@@"})
    assert json.loads(i18n.fill_labels(body, "zh")) == {"label": "对话", "other": "@@no.such.key@@"}
    assert json.loads(i18n.fill_labels(body, "en"))["label"] == "Chat"
    with pytest.raises(KeyError):
        i18n.label("no.such.key")


@pytest.mark.parametrize(
    ("tab", "cookie", "wishes", "language"),
    [
        ("", "", "zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("", "", "en-GB, zh;q=0.9", "en"),
        ("", "", "fr, zh-TW;q=0.3, en;q=0.2", "zh"),
        ("", "", "fr", "en"),
        ("", "", "", "en"),
        ("", "", "zh;q=broken", "en"),
        ("", "en", "zh", "en"),
        ("zh", "en", "en", "zh"),
        ("klingon", "en", "zh", "en"),
        ("", "klingon", "zh", "zh"),
    ],
)
def test_the_switch_goes_before_the_browser_s_wishes(
    tab: str, cookie: str, wishes: str, language: str
) -> None:
    assert i18n._choose(tab, cookie, wishes) == language


def test_no_text_is_kept_that_nothing_shows() -> None:
    """Every key stands in the code, or matches an f-string of it, as `state.{run.state}`."""
    web = Path(i18n.__file__).parent
    sources = [*web.glob("*.py"), *(web / "templates").glob("*.html")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    literals = re.findall(r"[\"']([a-z]+\.[\w{}.\[\]-]+)[\"']", code)
    patterns = {re.sub(r"\\{.*?\\}", r"[\\w-]+", re.escape(literal)) for literal in literals}
    shown = re.compile("|".join(sorted(patterns)))
    # Found by their English, and told of in tests of their own; settings are read by their names.
    elsewhere = ("mistake.", "choice.", "cost.", "said.", "reason.", "detail.", "settings.")
    keys = [key for key in i18n.catalog() if not key.startswith(elsewhere)]
    assert [key for key in keys if not shown.fullmatch(key)] == []
