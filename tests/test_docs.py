"""The documents are true where a program can tell: links, paths, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vicuna import config
from vicuna.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")])
SETTINGS = {c.name: getattr(config, c.settings) for c in COMMANDS}


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def shell_lines(page: Path) -> list[str]:
    """The commands in a page's bash blocks, with continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def calls(page: Path) -> list[tuple[str, list[str]]]:
    """Each call of `vicuna` in a page: the command's name and its arguments."""
    result = []
    for line in shell_lines(page):
        argv = shlex.split(line, comments=True)
        while argv and re.fullmatch(r"[A-Z_]+=.*", argv[0]):
            argv = argv[1:]
        if argv[:1] == ["vicuna"]:
            two = " ".join(argv[1:3])
            name, rest = (two, argv[3:]) if two in SETTINGS else (argv[1], argv[2:])
            result.append((name, rest))
    return result


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path):
    text = page.read_text(encoding="utf-8")
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith("http"):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append("".join(link))
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_path_in_the_repository_exists(page: Path):
    named = re.findall(
        r"`((?:src/vicuna|tests|bench|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")
    )
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_test_that_the_invariants_name_exists():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/architecture.md").read_text(encoding="utf-8"))
    code = "\n".join(p.read_text(encoding="utf-8") for p in ROOT.glob("tests/**/test_*.py"))
    assert named
    assert [name for name in named if f"def {name}(" not in code] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_and_option_exists(page: Path):
    wrong = []
    for name, argv in calls(page):
        if name not in SETTINGS:
            wrong.append(name)
            continue
        fields = SETTINGS[name].model_fields
        for word in argv:
            key = word[2:].partition("=")[0] if word.startswith("--") else ""
            key = {"json": "json_output"}.get(key, key.replace("-", "_"))
            if key and key != "help" and not {key, key.removeprefix("no_")} & set(fields):
                wrong.append(f"{name} {word}")
        if (
            name in ("train", "plan")
            and argv
            and not argv[0].startswith(("-", "["))
            and "=" not in argv[0]
        ):
            known = argv[0] in config.builtin_recipes() or argv[0].endswith((".yaml", ".yml"))
            wrong += [] if known else [f"{name} {argv[0]}"]
    assert wrong == []


def test_both_readmes_have_the_same_commands_and_figures():
    english, chinese = ROOT / "README.md", ROOT / "README.zh.md"
    assert calls(english) == calls(chinese)
    rows = re.compile(r"\| *\**(\d+)\** *\| *\**([\d.]+)\** *\|")
    table = rows.findall(english.read_text(encoding="utf-8"))
    assert table
    assert table == rows.findall(chinese.read_text(encoding="utf-8"))
