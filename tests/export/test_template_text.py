"""Templates as text for other programs: they render what training rendered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from generate_kit import SPECIALS, byte_level, vocabulary

from vicuna.data.conversation import Turn
from vicuna.data.templates.chat_template import ChatTemplate
from vicuna.data.templates.registry import builtin_templates, find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.templates.sandbox import Program
from vicuna.data.tokenizer import Tokenizer
from vicuna.export.modelfile import modelfile
from vicuna.export.template_text import default_system, go, jinja, recognised

WORDS = vocabulary(byte_level())
ENCODER = Tokenizer(WORDS)
TALKS = [
    [Turn("user", "你好")],
    [Turn("system", "be kind"), Turn("user", "hi")],
    [Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")],
    [Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b\n"), Turn("user", 'say "c"'),
     Turn("assistant", "d"), Turn("user", "e")],
]  # fmt: skip


def renderer(name: str) -> Renderer:
    return Renderer(find_template(name, WORDS), ENCODER)


@pytest.mark.parametrize("name", builtin_templates())
@pytest.mark.parametrize("talk", TALKS)
def test_jinja_gives_the_tokens_that_training_saw(name: str, talk: list[Turn]) -> None:
    ours = renderer(name)
    read_back = ChatTemplate(jinja(ours), "<s>", "</s>", SPECIALS)
    assert Renderer(read_back, ENCODER).prompt(talk) == ours.prompt(talk)


@pytest.mark.parametrize("name", builtin_templates())
def test_a_tokenizers_own_template_is_recognised(name: str) -> None:
    ours = renderer(name)
    theirs = ChatTemplate(jinja(ours), "<s>", "</s>", SPECIALS)
    found = recognised(theirs)
    assert found is not None
    assert found.name == name
    assert default_system(theirs) == ours.template.default_system


def test_a_template_of_no_known_kind_is_left_out_and_said() -> None:
    source = "{% for m in messages %}@{{ m['role'] }}@{{ m['content'] }}</s>{% endfor %}@assistant@"
    odd = Renderer(ChatTemplate(source, "<s>", "</s>", SPECIALS), ENCODER)
    assert go(odd) is None
    made = modelfile(odd, Path("x.gguf"))
    assert "TEMPLATE" not in made.text
    assert "none of the known ones" in made.notes[0]


def test_the_embedded_bases_own_system_prompt_is_found() -> None:
    from vicuna.model.base import EMBEDDED, locate_vocabulary
    from vicuna.model.vocabulary import load_vocabulary

    words = load_vocabulary(locate_vocabulary(EMBEDDED))
    template = find_template("auto", words)
    found = recognised(template)
    assert found is not None
    assert found.name == "chatml"
    assert default_system(template).startswith("You are a helpful AI assistant named SmolLM")


def test_go_for_chatml_letter_by_letter() -> None:
    text = go(renderer("chatml"))
    assert text is not None
    assert text.count("{{- if") + text.count("{{ if") == text.count("{{- end") - 1
    assert '{{ "<|im_start|>user\\n" }}{{ $turn.Content }}{{ "<|im_end|>\\n' in text
    assert text.endswith('{{ $turn.Content }}{{ "<|im_end|>" }}{{ "\\n" }}{{- end -}}{{- end -}}')


@pytest.mark.parametrize("name", builtin_templates())
def test_go_renders_what_training_saw(name: str) -> None:
    """Read by a few lines that know the constructs used here; Ollama itself was not run."""
    from go_kit import render

    ours = renderer(name)
    text = go(ours)
    assert text is not None
    for talk in TALKS:
        told = talk
        if talk[0].role != "system" and ours.template.default_system:
            told = [Turn("system", ours.template.default_system), *talk]  # SYSTEM of the Modelfile
        bos = (
            []
            if WORDS.bos_id is None or "{bos}" not in builtin_templates()[name].get("start", "")
            else [0]
        )
        shown = render(text, [(t.role, t.text) for t in told])
        assert [*bos, *whole(shown)] == whole(tokens(ours.prompt(talk)))


def tokens(ids: list[int]) -> str:
    return ENCODER.spelled(ids)


def whole(text: str) -> list[int]:
    """Ids of a text in which special tokens count, as llama.cpp reads a rendered prompt."""
    return ENCODER.mark(text)


def test_a_modelfile_says_how_to_talk_and_when_to_stop(tmp_path: object) -> None:
    made = modelfile(renderer("alpaca"), Path("law.gguf"))
    lines = made.text.splitlines()
    assert lines[0] == "FROM ./law.gguf"
    assert 'PARAMETER stop "</s>"' in lines
    assert any(line.startswith('SYSTEM """Below is an instruction') for line in lines)
    assert any("no input beside the question" in note for note in made.notes)
    alone = modelfile(renderer("chatml"), Path("law.gguf"), adapter_only=True)
    assert "ADAPTER ./law.gguf" in alone.text
    assert "base.gguf" in alone.notes[0]


REASONS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_other_programs_ask_for_thoughts_as_the_adapter_was_trained(thinking: Any) -> None:
    from go_kit import render

    template = ChatTemplate(REASONS, "<s>", "</s>", SPECIALS).choose(thinking)
    ours = Renderer(template, ENCODER)
    text = go(ours)
    assert text is not None
    exported = Renderer(ChatTemplate(jinja(ours), "<s>", "</s>", SPECIALS), ENCODER)
    for talk in TALKS[:3]:
        asked = ours.prompt(talk)
        assert ("</think>" in ENCODER.spelled(asked)) == (thinking == "off")
        assert whole(render(text, [(t.role, t.text) for t in talk])) == asked
        assert exported.prompt(talk) == asked
        messages = [{"role": t.role, "content": t.text} for t in talk]
        shown = Program(jinja(ours), {"bos_token": "<s>"}).render(messages, True)
        assert ENCODER.reference(shown) == asked
