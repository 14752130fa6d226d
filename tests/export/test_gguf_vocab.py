"""The vocabulary of GGUF files: llama.cpp encodes text from it as our tokenizer does, and so does
what we read back from it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from generate_kit import CORPUS, byte_level, sentencepiece
from metadata_kit import lines, train_sentencepiece
from tokenizers import Tokenizer as HFTokenizer

from gguf_kit import save_base, vary
from kit import metaspace, save_tokenizer, tiny_model
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import UserError
from vicuna.export.gguf_writer import write_base
from vicuna.gguf import tokenizer as gguf_tokenizer
from vicuna.gguf.folder import vocabulary_folder
from vicuna.gguf.read import read_fields
from vicuna.model.vocabulary import load_vocabulary

needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs the extra cpp (xllamacpp)"
)
TEXTS = [
    *CORPUS,
    "2026年11月24日，气温12.5度，电话13800138000。",
    "don't  stop;\n\n\tx = y+1  \n  三个空格   结尾 ",
    "𠮷野家 😀👍🏽 naïve — “引号”（括号）…",
    "a<s>b</s> <|im_start|>user",
]


@contextmanager
def engine_of(path: Path) -> Iterator[Any]:
    from vicuna.generate.engines.llamacpp import LlamaCppEngine

    with LlamaCppEngine(path, context_length=256, threads=1) as engine:
        yield engine


def ruled(name: str) -> HFTokenizer:
    """`byte_level()` as a family cuts text."""
    tokenizer = byte_level()
    spec = json.loads(tokenizer.to_str())
    family = gguf_tokenizer.family_by_name(name)
    assert family
    spec["pre_tokenizer"] = gguf_tokenizer.pre_tokenizer_of(family)
    spec["model"]["ignore_merges"] = family.ignore_merges
    return HFTokenizer.from_str(json.dumps(spec))


def written(folder: Path, tokenizer: HFTokenizer, **words: Any) -> tuple[Tokenizer, Path]:
    size = tokenizer.get_vocab_size() + 12  # more rows than tokens, as many models have
    save_base(folder, vary(tiny_model("llama", vocab_size=size)), tokenizer, **words)
    write_base(folder, folder / "x.gguf", "f16")
    return Tokenizer(load_vocabulary(folder)), folder / "x.gguf"


@needs_llamacpp
@pytest.mark.parametrize("name", [f.name for f in gguf_tokenizer.FAMILIES])
def test_llamacpp_encodes_as_the_tokenizer_does(tmp_path: Path, name: str) -> None:
    encoder, path = written(tmp_path, ruled(name))
    with engine_of(path) as engine:
        for text in TEXTS:
            assert engine.tokenize(text) == encoder.text(text, first=True)


def with_all_merges(tokenizer: HFTokenizer) -> HFTokenizer:
    """As real conversions are: whatever makes a piece is a merge."""
    spec = json.loads(tokenizer.to_str())
    spec["model"]["merges"].append(["▁", "ab"])
    return HFTokenizer.from_str(json.dumps(spec))


@needs_llamacpp
@pytest.mark.parametrize("make", [sentencepiece, metaspace])
def test_llamacpp_encodes_sentencepiece_as_the_tokenizer_does(tmp_path: Path, make: Any) -> None:
    encoder, path = written(tmp_path, with_all_merges(make()), unk_token="<unk>")
    fields = read_fields(path)
    assert fields["tokenizer.ggml.model"] == "llama"
    types = dict(zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]))
    assert (types["<unk>"], types["<0x41>"], types["<s>"], types["ab"]) == (2, 6, 3, 1)
    assert sum(t == 5 for t in types.values()) == 12
    with engine_of(path) as engine:
        # (Metaspace, other than SentencePiece itself, adds no space to a text that begins with one.)
        for text in [*TEXTS, "ab a b aab  ab"]:
            assert engine.tokenize(text) == encoder.text(text, first=True)


def test_sentencepiece_comes_back(tmp_path: Path) -> None:
    encoder, path = written(tmp_path, with_all_merges(sentencepiece()), unk_token="<unk>")
    back = Tokenizer(load_vocabulary(vocabulary_folder(path)))
    for text in [*TEXTS, "ab a b aab  ab", " ab"]:
        for first in (True, False):
            assert back.text(text, first=first) == encoder.text(text, first=first)
        assert back.decode(back.text(text, first=True)).strip(" ") == text.strip(" ")


@pytest.mark.parametrize("name", [f.name for f in gguf_tokenizer.FAMILIES])
def test_the_tokenizer_of_a_gguf_file_comes_back(tmp_path: Path, name: str) -> None:
    encoder, path = written(tmp_path, ruled(name))
    back = Tokenizer(load_vocabulary(vocabulary_folder(path)))
    for text in TEXTS:
        assert back.text(text) == encoder.text(text)
    assert back.data.eos_id == encoder.data.eos_id
    assert back.control_ids >= encoder.control_ids


def test_the_chat_template_and_all_ends_come_back(tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = tiny_model("llama", vocab_size=tokenizer.get_vocab_size())
    model.save_pretrained(tmp_path)
    fast = save_tokenizer(tmp_path, tokenizer)
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    fast.save_pretrained(tmp_path)
    ends = [fast.eos_token_id, fast.convert_tokens_to_ids("<|im_end|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    write_base(tmp_path, tmp_path / "x.gguf")
    back = load_vocabulary(vocabulary_folder(tmp_path / "x.gguf"))
    assert back.chat_template == fast.chat_template
    assert set(back.end_ids) == set(ends)


def test_a_tokenizer_of_no_known_family_is_refused_with_its_rule(tmp_path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z]+|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    save_base(tmp_path, tiny_model("llama", vocab_size=352), tokenizer)
    with pytest.raises(UserError, match="no known family") as e:
        write_base(tmp_path, tmp_path / "x.gguf")
    assert "[A-Z]+" in str(e.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path, tiny_model("llama", vocab_size=100))
    with pytest.raises(UserError, match="only 100 rows"):
        write_base(tmp_path, tmp_path / "x.gguf")


# -- SentencePiece itself ----


@needs_llamacpp
def test_a_sentencepiece_model_is_the_same_everywhere(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    train_sentencepiece(tmp_path)
    theirs = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = Tokenizer(load_vocabulary(tmp_path))
    write_base(tmp_path, tmp_path / "x.gguf")
    back = Tokenizer(load_vocabulary(vocabulary_folder(tmp_path / "x.gguf")))
    scores = read_fields(tmp_path / "x.gguf")["tokenizer.ggml.scores"]
    assert scores == [theirs.get_score(i) for i in range(2200)]
    assert back.data.bos_id == ours.data.bos_id == 1
    with engine_of(tmp_path / "x.gguf") as engine:
        for text in [*TEXTS[:-1], *lines("heldout_zh.jsonl")]:
            wanted = theirs.encode(text)
            assert ours.text(text, first=True) == wanted
            assert engine.tokenize(text) == wanted
            assert back.text(text, first=True) == wanted
