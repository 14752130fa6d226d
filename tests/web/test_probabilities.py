"""An answer token by token, with what else could have stood in its place."""

from __future__ import annotations

import json
import re
from functools import partial
from html import unescape

import pytest

from kit import save_tokenizer
from vicuna.data.tokenizer import Tokenizer
from vicuna.generate.events import Answer, TokenLogprob
from vicuna.model.vocabulary import load_vocabulary
from vicuna.web import probabilities
from vicuna.web.i18n import translate
from vicuna.web.probabilities import ShownToken


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return Tokenizer(load_vocabulary(folder))


def test_the_tokens_together_are_the_answer_and_each_has_its_probability(
    encoder: Tokenizer,
) -> None:
    ids = encoder.text("春天 <b>好</b>\n🌸")
    end = next(iter(encoder.control_ids))
    logprobs = tuple(TokenLogprob(i, -0.5, ((i, -0.5), (end, -2.0))) for i in [*ids, end])
    found = probabilities.shown_tokens(Answer("", (), 0.0, "stop", logprobs), encoder)
    assert "".join(token.text for token in found) == "春天 <b>好</b>\n🌸"
    assert {token.probability for token in found} == {0.6065}
    assert found[-1].text == ""
    assert found[-1].top[0][0] == encoder.token(end)
    assert all(len(token.top) == 2 and token.top[1][1] == 0.1353 for token in found[:-1])
    assert probabilities.shown_tokens(Answer("a", (1,), 0.0, "stop"), encoder) == []


def test_they_are_shown_as_text_and_tinted() -> None:
    evil = "<img src=x onerror=alert(1)>\"'"
    tokens = [
        ShownToken(evil, 0.95, ((evil, 0.95), ("b", 0.01))),
        ShownToken("", 0.05, (("\n", 0.05),)),
    ]
    html = probabilities.html(tokens, partial(translate, "zh"))
    assert "<img" not in html
    assert '<span class="v-tok l4"' in html
    assert '<span class="v-tok l0 part"' in html
    top = re.findall(r'data-top="([^"]*)"', html)
    assert json.loads(unescape(top[0])) == [[evil, 0.95], ["b", 0.01]]
