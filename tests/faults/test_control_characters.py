"""Nothing that came from a file, a model or a hub reaches a terminal as a control character."""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_kit import copied, vicuna
from place_kit import ROWS
from rich.table import Table

import vicuna as package
from vicuna.console import Console
from vicuna.terminal import COMMANDS, say, say_json, visible

SOURCE = Path(package.__file__).parent
# Clears the screen, sets the title, rings, moves the cursor, one byte CSI, turns the direction.
HOSTILE = "x\x1b[2J\x1b]0;t\x07\x08\r\x7f\x9b31m\x90\u202egnp\u2066."
# What may print by itself: the door, and one side of a conversation between two processes.
DOORS = ("terminal.py", "console.py", "quantize/worker.py")


def _calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "rich.console":
            yield from (f"rich.console.{a.name}" for a in node.names if a.name == "Console")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" or name.endswith((".stdout.write", ".stderr.write", "print_exc")):
                yield f"{name} in line {node.lineno}"
            yield from (
                f"{name} in line {node.lineno}"
                for given in [*node.args, *(k.value for k in node.keywords)]
                if name.startswith("traceback.print") or ast.unparse(given) == "sys.stderr"
            )


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.name)
def test_all_that_is_printed_goes_through_the_door(path: Path) -> None:
    if path.relative_to(SOURCE).as_posix() not in DOORS:
        assert list(_calls(path)) == []


def test_controls_become_signs() -> None:
    assert visible("a\tb\nc\r\nd 你好 😀") == "a\tb\nc\nd 你好 😀"
    assert not COMMANDS.search(visible(HOSTILE))
    assert visible("\x1b[2J\x7f\x9b") == "␛[2J␡\ufffd"
    for code in [*range(0x20), *range(0x7F, 0xA0)]:
        if chr(code) not in "\t\n":
            assert not COMMANDS.search(visible(chr(code))), hex(code)


def test_a_console_keeps_its_own_colours_and_nothing_of_the_text() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=200)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    console.print(f"[red]{HOSTILE}[/]")
    console.print("[/no markup] :smile:")
    console.print(table)
    console.rule(HOSTILE)
    plain = out.getvalue()
    assert "\x1b[31m" in plain
    assert ":smile:" in plain
    assert "[2J" in plain
    for command in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e", "\r"):
        assert command not in plain


def test_json_keeps_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    value = {HOSTILE: [HOSTILE, "half \ud800 of one"]}
    say_json(value)
    printed = capsys.readouterr().out
    assert not COMMANDS.search(printed.rstrip("\n"))
    assert json.loads(printed) == value


def test_a_line_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"answer {HOSTILE}", error=True)
    assert not COMMANDS.search(capsys.readouterr().err.rstrip("\n"))


@pytest.fixture(scope="module")
def hostile(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place, with controls in every name, key and text that a command may repeat."""
    folder = copied(place, tmp_path_factory.mktemp("hostile") / "place")
    for name in ("tiny", "run", "data.jsonl", "tiny.gguf", "recipe.yaml"):
        (folder / name).rename(folder / f"{HOSTILE}{name}")
    base = folder / f"{HOSTILE}tiny"
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer[HOSTILE] = HOSTILE
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (folder / f"{HOSTILE}bad").mkdir()
    shutil.copy(base / "tokenizer.json", folder / f"{HOSTILE}bad")
    config = json.loads((base / "config.json").read_text())
    config["rope_scaling"] = {HOSTILE: HOSTILE}
    (folder / f"{HOSTILE}bad" / "config.json").write_text(json.dumps(config))
    note = folder / f"{HOSTILE}run" / "adapter" / "vicuna.json"
    noted = json.loads(note.read_text())
    noted["template"]["name"] = HOSTILE
    noted["base"]["name"] = str(base)
    note.write_text(json.dumps(noted))
    records = [
        {"instruction": HOSTILE, "output": HOSTILE},
        {"instruction": "q", HOSTILE: "a"},
        {"messages": [{"role": HOSTILE, "content": HOSTILE}]},
        {"instruction": HOSTILE, "output": ""},
        {"instruction": "问", "output": "答"},
        {"instruction": "问二", "output": "答"},
    ]
    lines = [json.dumps(r, ensure_ascii=False) for r in records]
    (folder / f"{HOSTILE}data.jsonl").write_text("\n".join([*lines, HOSTILE]), encoding="utf-8")
    (folder / f"{HOSTILE}recipe.yaml").write_text('"x\\e[2J": 1\n')
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("name", [n for n in ROWS if n not in ("web", "demo", "download")])
def test_commands_print_no_controls(hostile: Path, tmp_path: Path, name: str) -> None:
    for number, row in enumerate(ROWS[name]):
        folder = copied(hostile, tmp_path / str(number))
        for base in ("tiny", "bad"):
            names = {"tiny": f"{HOSTILE}{base}", "data.jsonl": f"{HOSTILE}data.jsonl"}
            names |= {n: HOSTILE + n for n in ("run", "tiny.gguf", "recipe.yaml")}
            words = [names.get(w, w) for w in row.words.split()]
            if name.startswith("quantize") and name != "quantize bnb":
                words.append(f"--{HOSTILE}")
            done = vicuna(folder, *words, said=f"{HOSTILE}\n/{HOSTILE}\n/save {HOSTILE}\n")
            assert done.code in (0, 2), done.all
            found = [line for line in done.all.split("\n") if COMMANDS.search(line)]
            assert not found, (words, found)
