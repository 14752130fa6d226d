"""Tiny bases whose GGUF metadata llama.cpp's own converter was asked for, and what it wrote.

    python tests/export/metadata_kit.py LLAMA_CPP    # writes llamacpp_metadata.json anew

LLAMA_CPP is a checkout of llama.cpp (its Python files suffice). A tiny tokenizer is none that the
converter knows, so it is told the family; everything else is what it writes by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORDED = HERE / "llamacpp_metadata.json"
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "generate")]

from generate_kit import CORPUS, byte_level  # noqa: E402
from tokenizers import AddedToken, Tokenizer  # noqa: E402

from gguf_kit import save_base  # noqa: E402
from kit import tiny_model  # noqa: E402
from vicuna.gguf import tokenizer as gguf_tokenizer  # noqa: E402
from vicuna.gguf.read import read_fields  # noqa: E402

# Not special in the tokenizer; some are by their spelling.
TEXT_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "[ANSWER]", "::")
SPELT = ("<|fim_prefix|>", "<｜tool｜>", "<unused7>", "<mask>")

# Family of layers, family of the tokenizer, special tokens by role, settings of config.json.
BASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama-2": ("llama", "sentencepiece", {}, {}),
    "llama-3": ("llama", "llama-bpe", {"pad_token": None}, {"bos_token_id": 0}),
    "smollm": ("llama-gqa-tied", "smollm", {}, {}),
    "mistral-nemo": (
        "mistral", "tekken", {"unk_token": "<unk>", "pad_token": None}, {"sliding_window": None},
    ),
    "qwen2": (
        "qwen2", "qwen2", {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "</s>"},
        {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen3": (
        "qwen3", "qwen2", {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "</s>"},
        {"bos_token_id": 1, "eos_token_id": 2},
    ),
}  # fmt: skip


def lines(name: str) -> list[str]:
    """Real Chinese text: the lines of a sample."""
    text = resources.files("vicuna.samples").joinpath(name).read_text(encoding="utf-8")
    return text.splitlines()


def train_sentencepiece(folder: Path) -> None:
    """A base with a tokenizer.model as Llama 1 and 2 have it, trained here."""
    import sentencepiece as spm

    (folder / "text.txt").write_text("\n".join([*CORPUS, *lines("instruct_zh.jsonl")[:60]]))
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=2200, byte_fallback=True, character_coverage=0.98, split_digits=True,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, minloglevel=2,
        normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "add_bos_token": True, "legacy": False}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tiny_model("llama", vocab_size=2200, bos_token_id=1, eos_token_id=2).save_pretrained(folder)


def make_base(name: str, folder: Path) -> None:
    """Write one of `BASES` in Hugging Face's layout."""
    layers, family, names, config = BASES[name]
    if family == "sentencepiece":
        folder.mkdir()
        train_sentencepiece(folder)
        return
    tokenizer = _tokenizer(family)
    rows = tokenizer.get_vocab_size() + 5
    save_base(folder, tiny_model(layers, vocab_size=rows, **config), tokenizer, **names)


def _tokenizer(family: str) -> Tokenizer:
    spec = json.loads(byte_level().to_str())
    rule = gguf_tokenizer.family_by_name(family)
    assert rule
    spec["pre_tokenizer"] = gguf_tokenizer.pre_tokenizer_of(rule)
    spec["model"]["ignore_merges"] = rule.ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TEXT_TOKENS])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in SPELT])
    tokenizer.add_special_tokens(["<|im_end|>", "<unk>"])
    return tokenizer


def metadata(path: Path) -> dict[str, Any]:
    """A file's metadata; of the tokens only those that differ from plain ones."""
    fields = dict(read_fields(path))
    tokens, types = fields.pop("tokenizer.ggml.tokens"), fields.pop("tokenizer.ggml.token_type")
    fields["types"] = {t: int(k) for t, k in zip(tokens, types) if k != 1}
    merges = fields.pop("tokenizer.ggml.merges", None)
    fields["merges"] = None if merges is None else len(merges)
    return {k: v for k, v in sorted(fields.items()) if not k.startswith("GGUF.")}


def record(llamacpp: Path) -> None:
    """Ask llama.cpp's converter for the metadata of all bases."""
    told = (
        "import sys, runpy; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/gguf-py'];"
        "sys.argv = sys.argv[2:]; import conversion.base as b;"
        "b.TextModel.get_vocab_base_pre = lambda self, tokenizer: {family!r};"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    found = {}
    for name, (_, family, _, _) in BASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / name
            make_base(name, folder)
            script = llamacpp / "convert_hf_to_gguf.py"
            subprocess.run(
                [sys.executable, "-c", told.format(family=family), str(llamacpp), str(script),
                 str(folder), "--outtype", "f16", "--outfile", str(folder / "x.gguf")],
                check=True, env={**os.environ, "NO_LOCAL_GGUF": ""},
            )  # fmt: skip
            found[name] = metadata(folder / "x.gguf")
    RECORDED.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(Path(sys.argv[1]).resolve())
