"""What the tests of generation share: two tokenizers, a tiny random Llama, and an engine that says
what it is told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer, TokenizerData
from vicuna.generate.engines.base import Cancelled, never
from vicuna.model.adapter import AdapterFiles

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。" * 3,
    "你好，我是助手。今天天气很好，我们去公园吧。😀😀 naïve café",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> HFTokenizer:
    """Like GPT-2, Llama 3 and Qwen: bytes, and some merges of them."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece() -> HFTokenizer:
    """Like Llama 1 and 2: characters, a space before the first word, bytes for what is rare."""
    pieces = [*SPECIALS, "<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    letters = sorted({c for line in CORPUS[1:] for c in line if c not in " 😀"} | set("abc"))
    pieces += ["▁", *letters, "ab", "▁a", "▁ab"]
    vocab = {p: i for i, p in enumerate(dict.fromkeys(pieces))}
    merges = [("a", "b"), ("▁", "a"), ("▁a", "b")]
    model = models.BPE(
        vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = HFTokenizer(model)
    tokenizer.add_special_tokens([*SPECIALS, "<unk>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return tokenizer


def vocabulary(tokenizer: HFTokenizer, ends: Sequence[int] = ()) -> TokenizerData:
    specials = {t["content"]: t["id"] for t in json.loads(tokenizer.to_str())["added_tokens"]}
    return TokenizerData(
        tokenizer_json=tokenizer.to_str(),
        bos_id=specials["<s>"],
        eos_id=specials["</s>"],
        pad_id=specials["</s>"],
        bos_token="<s>",
        eos_token="</s>",
        end_ids=(specials["</s>"], *ends),
        special_tokens=specials,
    )


def make_renderer(tokenizer: HFTokenizer, template: str, ends: Sequence[int] = ()) -> Renderer:
    words = vocabulary(tokenizer, ends)
    return Renderer(find_template(template, words), Tokenizer(words))


def tiny_llama(vocab_size: int, seed: int = 0, **changes: Any) -> Any:
    """A Llama of two layers with weights large enough that its answers wander."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**shape, **changes})).eval()


class PathEngine:
    """Scores are a function of the whole path of token ids; it keeps each row's path as a list.

    hook: called before each scoring with the number of tokens behind the prompt; may raise.
    """

    about = ""

    def __init__(
        self,
        score: Callable[[list[list[int]]], Tensor],
        context_length: int = 10_000,
        max_rows: int = 16,
        hook: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.score, self.hook = score, hook
        self.context_length, self.max_rows = context_length, max_rows
        self.prompts: list[list[int]] = []
        self.stepped: list[list[int]] = []
        self.rows: list[list[int]] = []

    def prefill(self, prompt_ids: Sequence[int], cancel: Callable[[], bool] = never) -> Tensor:
        if cancel():
            raise Cancelled
        self.prompts.append(list(prompt_ids))
        self.rows = [list(prompt_ids)]
        return self._logits()[0]

    def step(self, token_ids: Sequence[int], parents: Sequence[int]) -> Tensor:
        assert 1 <= len(token_ids) == len(parents) <= self.max_rows
        self.stepped.append(list(token_ids))
        self.rows = [[*self.rows[p], t] for p, t in zip(parents, token_ids)]
        assert len(self.rows[0]) <= self.context_length
        return self._logits()

    def reset(self) -> None:
        self.rows = []

    def load_adapter(self, name: str, files: AdapterFiles) -> None:
        raise AssertionError(f"no adapter {name} of {files}")

    def use_adapters(self, mix: Mapping[str, float]) -> None:
        assert not mix

    def drop_adapter(self, name: str) -> None:
        raise AssertionError(f"no adapter {name}")

    def close(self) -> None:
        self.reset()

    def _logits(self) -> Tensor:
        self.hook(len(self.rows[0]) - len(self.prompts[-1]))
        return self.score(self.rows)


def plain_engine(model: Any, **options: Any) -> PathEngine:
    """A transformers model without any cache: each step computes the rows from their beginning."""

    def score(rows: list[list[int]]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor(rows), use_cache=False).logits[:, -1].float()

    return PathEngine(score, **options)


def random_engine(
    vocab_size: int, seed: int = 0, spread: float = 2.0, **options: Any
) -> PathEngine:
    """Random logits that depend on the whole path, and no model."""

    def row(path: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(hash((seed, *path)) & (2**62 - 1))
        return torch.randn(vocab_size, generator=generator) * spread

    return PathEngine(lambda rows: torch.stack([row(r) for r in rows]), **options)


class ScriptedEngine(PathEngine):
    """Says what it is told to: each prompt takes the next script of token ids.

    hook: called before each token with the number of tokens said; may raise.
    """

    def __init__(self, vocab_size: int, scripts: Sequence[Sequence[int]], **options: Any) -> None:
        super().__init__(self._say, **options)
        self.vocab_size = vocab_size
        self.scripts = [list(s) for s in scripts]

    def _say(self, rows: list[list[int]]) -> Tensor:
        said = len(rows[0]) - len(self.prompts[-1])
        if not said:
            self.now = self.scripts.pop(0)
        logits = torch.full((len(rows), self.vocab_size), -10.0)
        logits[:, self.now[said]] = 10.0
        return logits


def saying(renderer: Renderer, *answers: str, **options: Any) -> ScriptedEngine:
    """An engine that gives these answers, each ended by the template's end token."""
    encoder = renderer.tokenizer
    scripts = [[*encoder.text(a), renderer.end_id] for a in answers]
    return ScriptedEngine(encoder.vocab_size, scripts, **options)


@pytest.fixture(scope="session")
def renderer() -> Renderer:
    return make_renderer(byte_level(), "chatml")


@pytest.fixture(scope="session")
def encoder(renderer: Renderer) -> Tokenizer:
    return renderer.tokenizer


@pytest.fixture(scope="session")
def model(encoder: Tokenizer) -> Any:
    return tiny_llama(encoder.vocab_size)


@pytest.fixture
def engine(model: Any) -> Any:
    from vicuna.generate.engines.torch import TorchEngine

    return TorchEngine(model, 256)
