"""The conversation in the terminal, driven by a script of lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from generate_kit import saying

from vicuna.commands.chat import converse
from vicuna.data.conversation import Turn
from vicuna.data.templates.renderer import Renderer
from vicuna.generate.chat import Chat
from vicuna.generate.settings import Settings


def talk(
    engine: Any, renderer: Renderer, *lines: str | BaseException, **options: Any
) -> tuple[Chat, str]:
    """The conversation and the screen after these lines; an exception is raised at the prompt."""
    shown: list[str] = []
    script = iter(lines)

    def read(prompt: str) -> str:
        assert prompt
        line = next(script, None)
        if line is None:
            raise EOFError
        if isinstance(line, BaseException):
            raise line
        return line

    settings = options.pop("settings", Settings())
    chat = converse(engine, renderer, settings, read=read, out=shown.append, **options)
    return chat, "".join(shown)


def texts(chat: Chat) -> list[str]:
    return [t.text for t in chat.turns]


def test_answers_stream_and_are_remembered(renderer: Renderer) -> None:
    engine = saying(renderer, "你好！", "再见😀")
    chat, screen = talk(engine, renderer, "你好", "", "  再见  ")
    assert texts(chat) == ["你好", "你好！", "再见", "再见😀"]
    assert screen == "你好！\n再见😀\n\n"
    assert engine.prompts[1] == renderer.prompt(
        [Turn("user", "你好"), Turn("assistant", "你好！"), Turn("user", "再见")]
    )


def test_each_token_is_shown_before_the_next_is_computed(renderer: Renderer) -> None:
    shown: list[str] = []
    engine = saying(renderer, "abc", hook=lambda said: shown.append(str(said)))
    lines = iter(["q"])

    def read(_: str) -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    converse(engine, renderer, Settings(), read=read, out=shown.append)
    assert "".join(shown).startswith("0a1b2c3")


def interrupt_at(token: int, how: Callable[[], None]) -> Callable[[int], None]:
    def hook(said: int) -> None:
        if said == token:
            how()

    return hook


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("how", "kept"), [(raise_interrupt, "abc"), (press_ctrl_c, "abcd")])
def test_ctrl_c_stops_the_answer_only(
    renderer: Renderer, how: Callable[[], None], kept: str
) -> None:
    engine = saying(renderer, "abcdefgh", "xyz", hook=interrupt_at(3, how))
    engine.hook, once = (lambda said: once(said) if len(engine.prompts) == 1 else None), engine.hook
    before = signal.getsignal(signal.SIGINT)
    chat, screen = talk(engine, renderer, "first", "second")
    assert texts(chat) == ["first", kept, "second", "xyz"]
    assert f"{kept}\n(stopped)\n" in screen
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_interrupts_at_once(renderer: Renderer) -> None:
    def twice() -> None:
        press_ctrl_c()
        press_ctrl_c()

    chat, screen = talk(
        saying(renderer, "abcdefgh", hook=interrupt_at(2, twice)), renderer, "question"
    )
    assert texts(chat) == ["question", "ab"]
    assert "(stopped)" in screen


def test_an_answer_stopped_before_it_began_leaves_no_question(renderer: Renderer) -> None:
    engine = saying(renderer, "abc", hook=interrupt_at(0, raise_interrupt))
    assert texts(talk(engine, renderer, "question")[0]) == []


def test_ctrl_c_and_exit_at_the_prompt_leave(renderer: Renderer) -> None:
    for last in (KeyboardInterrupt(), "/exit", "/quit"):
        chat, _ = talk(saying(renderer, "a"), renderer, "q", last, "never asked")
        assert texts(chat) == ["q", "a"]


def test_undo_and_reset(renderer: Renderer) -> None:
    engine = saying(renderer, "a", "b", "c", "d")
    chat, screen = talk(
        engine, renderer, "1", "2", "/undo", "3", "/reset", "4", "/undo", "/undo", system="s"
    )
    assert texts(chat) == []
    assert "Taken back: 2\n" in screen
    assert "Nothing to take back" in screen
    system = Turn("system", "s")
    one, a, three = Turn("user", "1"), Turn("assistant", "a"), Turn("user", "3")
    assert engine.prompts[2] == renderer.prompt([system, one, a, three])
    assert engine.prompts[3] == renderer.prompt([system, Turn("user", "4")])


def test_system(renderer: Renderer) -> None:
    engine = saying(renderer, "a", "b")
    talk(engine, renderer, "/system 你是 诗人。", "1", "/system", "/undo", "2")
    assert engine.prompts[0] == renderer.prompt([Turn("system", "你是 诗人。"), Turn("user", "1")])
    assert engine.prompts[1] == renderer.prompt([Turn("user", "2")])


def test_save(renderer: Renderer, tmp_path: Path) -> None:
    file = tmp_path / "talk 1.jsonl"
    _, screen = talk(
        saying(renderer, "答"), renderer, "问", f"/save {file}", "/save", "/save /no/such/x"
    )
    assert json.loads(file.read_text()) == {
        "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    }
    assert f"Saved to {file}." in screen
    assert "/save: the file's name is missing" in screen
    assert "/no/such/x: cannot write" in screen


def test_help_and_unknown_commands(renderer: Renderer) -> None:
    _, screen = talk(saying(renderer), renderer, "/help", "/hepl")
    assert "/save FILE" in screen
    assert "No command /hepl; did you mean /help? /help lists them." in screen


def test_a_path_begins_a_question(renderer: Renderer) -> None:
    chat, _ = talk(saying(renderer, "a"), renderer, "/etc/hosts 是什么？")
    assert texts(chat)[0] == "/etc/hosts 是什么？"


def test_dropped_turns_are_told_once(renderer: Renderer) -> None:
    engine = saying(renderer, *["abc"] * 6, context_length=60)
    _, screen = talk(engine, renderer, *"123456", settings=Settings(max_new_tokens=10))
    assert screen.count("the context of 60 tokens") == 4
    assert "(the oldest question with its answer no longer fits" in screen
    assert "(the 4 oldest questions with their answers no longer fit" in screen
    assert all(len(p) <= 50 for p in engine.prompts)


def test_a_question_too_long_is_refused_and_forgotten(renderer: Renderer) -> None:
    engine = saying(renderer, "a", context_length=60)
    chat, screen = talk(engine, renderer, "好" * 100, "short")
    assert "the model's context only 60" in screen
    assert texts(chat) == ["short", "a"]


def test_how_an_answer_ended_is_said(renderer: Renderer) -> None:
    chat, screen = talk(
        saying(renderer, "abcdef", ""), renderer, "1", "2", settings=Settings(max_new_tokens=3)
    )
    assert "abc\n(stopped at 3 tokens" in screen
    assert "(the model said nothing)" in screen
    assert texts(chat) == ["1", "abc"]


def test_bytes_that_are_not_text(renderer: Renderer) -> None:
    chat, _ = talk(saying(renderer, "a"), renderer, "caf\udce9?")
    assert texts(chat)[0] == "caf\ufffd?"


PIPED = """
import sys
sys.path.insert(0, sys.argv[1])
from generate_kit import byte_level, make_renderer, saying
from vicuna.generate.settings import Settings
from vicuna.commands.chat import converse
renderer = make_renderer(byte_level(), "chatml")
converse(saying(renderer, "你好！", "b"), renderer, Settings())
"""


def test_piped_input_shows_answers_only_and_ends() -> None:
    folder = str(Path(__file__).parents[1] / "generate")
    done = subprocess.run(
        [sys.executable, "-c", PIPED, folder],
        input="你好\n/undo\nq",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUTF8": "1"},
        timeout=120,
    )
    assert (done.stdout, done.stderr) == ("你好！\nTaken back: 你好\nb\n\n", "")


def test_beams_are_drawn_and_the_text_stays(renderer: Renderer) -> None:
    from test_beam_view import terminal

    from vicuna.commands.beam_view import drawn_beams

    console, file = terminal()
    chat, screen = talk(
        saying(renderer, "你好！", "再见！"), renderer, "问", "/undo", "又问",
        settings=Settings(num_beams=3, min_new_tokens=2),
        view=lambda out: drawn_beams(console, out, rate=1e9),
    )  # fmt: skip
    assert texts(chat) == ["又问", "再见！"]
    assert screen == "你好！\nTaken back: 问\n再见！\n\n"
    assert "你好！" in file.getvalue()


def test_the_adapter_is_switched(renderer: Renderer) -> None:
    switched: list[tuple[bool, float]] = []

    def switch(on: bool, strength: float) -> None:
        switched.append((on, strength))

    lines = ("/adapter off", "/adapter on", "/adapter on 0.5", "/adapter on .25", "/adapter on -1")
    _, screen = talk(saying(renderer), renderer, *lines, switch=switch)
    assert switched == [(False, 1), (True, 1), (True, 0.5), (True, 0.25), (True, -1)]
    assert screen.splitlines()[:3] == [
        "The base alone answers.", "The adapter answers.", "The adapter answers at 0.5.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "line", ["/adapter", "/adapter of", "/adapter on x", "/adapter off 1", "/adapter runs/full"]
)
def test_a_wrong_switch_switches_nothing(renderer: Renderer, line: str) -> None:
    switched: list[Any] = []
    _, screen = talk(saying(renderer), renderer, line, switch=lambda *a: switched.append(a))
    assert not switched
    assert screen.startswith("/adapter: on or off? It switches the adapter that this talk was ")
    assert "start anew: vicuna chat --adapter" in screen


def test_where_there_is_no_adapter_the_user_is_told(renderer: Renderer) -> None:
    _, screen = talk(saying(renderer), renderer, "/adapter off")
    assert screen.startswith("/adapter: there is no adapter to switch\n")
