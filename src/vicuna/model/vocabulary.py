"""A base's tokenizer as plain data (`TokenizerData`), and the checks that it fits the base.

The most reported fault of the 2023 project was a wrong end token: answers that never stopped. Every
load checks that the end token exists and that the embedding has a row for each token that can
occur; `vicuna doctor` looks at the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vicuna.data.conversation import Turn
from vicuna.data.templates.base import Template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer, TokenizerData
from vicuna.errors import UserError
from vicuna.files import cache_dir, whole_file
from vicuna.messages import Message
from vicuna.model.adapter_location import META

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
    "vocab.json",
    "merges.txt",
    META,
)
_FORMAT = "3"  # counts up when what is derived here changes


def load_vocabulary(folder: Path) -> TokenizerData:
    """The tokenizer of a model folder.

    transformers reads it once; the result is kept in the cache under the files' hash, because
    importing transformers takes longer than all the work `vicuna data` does on a small file.

    Raises: UserError where the folder has no tokenizer that can be used.
    """
    digest = hashlib.sha256(_FORMAT.encode())
    for name in _TOKENIZER_FILES:
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + path.read_bytes())
    cached = cache_dir("tokenizers", f"{digest.hexdigest()[:32]}.json")
    if cached.is_file():
        try:
            fields = json.loads(cached.read_text(encoding="utf-8"))
            fields["end_ids"] = tuple(fields["end_ids"])
            return TokenizerData(**fields)
        except (ValueError, TypeError, KeyError, OSError):
            pass  # a damaged cache entry is made anew
    vocabulary = _read_tokenizer(folder)
    # The cache only saves time.
    with contextlib.suppress(UserError), whole_file(cached) as aside:
        aside.write_text(json.dumps(asdict(vocabulary)), encoding="utf-8")
    return vocabulary


def _read_tokenizer(folder: Path) -> TokenizerData:
    from transformers import AutoTokenizer

    from vicuna.model.base import silence_libraries

    silence_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        text = tokenizer.backend_tokenizer.to_str()
    except Exception as e:  # the library raises many kinds for a tokenizer it cannot read
        raise UserError(
            "no usable tokenizer: {error}",
            error=e,
            where=str(folder),
            fix="The folder needs tokenizer.json, or tokenizer.model for SentencePiece.",
        ) from e
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token, so answers could never stop",
            where=str(folder),
            fix="Set eos_token in tokenizer_config.json.",
        )
    probe = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and bool(probe) and probe[0] == bos
    eos = int(tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    chat_template = tokenizer.chat_template
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    added: dict[str, int] = {
        t["content"]: t["id"] for t in json.loads(text)["added_tokens"] if t["special"]
    }
    named = tokenizer.special_tokens_map
    return TokenizerData(
        tokenizer_json=text,
        bos_id=int(bos) if adds_bos and bos is not None else None,
        eos_id=eos,
        pad_id=int(pad) if pad is not None else eos,
        bos_token=tokenizer.bos_token or "",
        eos_token=tokenizer.eos_token,
        chat_template=chat_template,
        end_ids=_generation_ends(folder, eos),
        special_tokens=added,
        template=_brought_template(folder),
        named_tokens={k: str(v) for k, v in named.items() if isinstance(v, str)},
    )


def _brought_template(folder: Path) -> dict[str, Any] | None:
    """The template of the adapter that was merged into a base, as `vicuna merge` notes it."""
    try:
        noted = json.loads((folder / META).read_text(encoding="utf-8"))["template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return noted if isinstance(noted, dict) else None


def _generation_ends(folder: Path, eos: int) -> tuple[int, ...]:
    """All ids the model's makers let generation stop at."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return (eos,)
    try:
        ends = json.loads(path.read_text()).get("eos_token_id")
    except ValueError:
        return (eos,)
    if ends is None:
        return (eos,)
    return tuple(int(e) for e in (ends if isinstance(ends, list) else [ends]))


# -- sanity ----

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One result of the check-up: how bad it is, and what was found in words."""

    level: Level
    text: str


def check_up(
    tokenizer: Tokenizer, template: Template, model_vocab_size: int | None, config: dict[str, Any]
) -> list[Finding]:
    """Check a tokenizer and a template against each other and against the model's config.

    Args:
        model_vocab_size: rows of the embedding, None where unknown.
        config: the model's config.json.
    """
    v = tokenizer.data
    renderer = Renderer(template, tokenizer)
    found: list[Finding] = []

    def say(good: bool, ok: str, bad: str, level: Level = "error") -> None:
        found.append(Finding("ok", ok) if good else Finding(level, bad))

    ids = {"bos": v.bos_id, "eos": v.eos_id, "pad": v.pad_id, "end of answer": renderer.end_id}
    size = model_vocab_size or tokenizer.vocab_size
    for name, i in ids.items():
        if i is not None:
            say(
                0 <= i < size,
                f"{name} is {tokenizer.token(i)} ({i})",
                f"{name} id {i} lies outside the vocabulary of {size}",
            )
    say(
        tokenizer.vocab_size <= size,
        f"the model has a row for each of the tokenizer's {tokenizer.vocab_size} tokens",
        f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {size} rows",
        # Special tokens that nothing produces do no harm: `check_embedding_rows` looks at each.
        "warning",
    )
    say(
        renderer.end_id in tokenizer.control_ids,
        "the end token is a special token",
        f"the end token {tokenizer.token(renderer.end_id)} is not marked special: text can forge "
        "it, and answers may never stop",
    )
    declared = config.get("eos_token_id")
    declared_ids = declared if isinstance(declared, list) else [declared]
    say(
        declared is None or v.eos_id in declared_ids or renderer.end_id in declared_ids,
        "tokenizer and model agree on the end of sequence",
        f"the tokenizer ends with {v.eos_id}, the model's config says {declared}: generation here "
        "stops at the tokenizer's and the template's",
        "warning",
    )
    wanted = template.end_token
    if wanted != "eos" and tokenizer.token_id(wanted) is None:
        text = (
            f"template {template.name} ends answers with {wanted}, which this vocabulary does not"
        )
        found.append(
            Finding(
                "warning",
                Message(
                    "{content} have; {token} is used instead",
                    content=text,
                    token=tokenizer.token(v.eos_id),
                ),
            )
        )
    found.append(_round_trip(tokenizer))
    found.append(_forgery(tokenizer, renderer))
    return found


def _round_trip(tokenizer: Tokenizer) -> Finding:
    text = "床前明月光，疑是地上霜。𠮷 😀 1234 + 5 = ？\n第二行  two  spaces"
    back = tokenizer.decode(tokenizer.text(text, first=True)).lstrip(" ")
    if back == text:
        return Finding("ok", "Chinese, rare characters and white space survive a round trip")
    return Finding(
        "error",
        Message(
            "text does not survive a round trip: {content!r} became {back!r}",
            content=text,
            back=back,
        ),
    )


def _forgery(tokenizer: Tokenizer, renderer: Renderer) -> Finding:
    said = " ".join(t for t in tokenizer.data.special_tokens) or "</s>"
    ids = set(tokenizer.text(said)) & tokenizer.control_ids
    unk = tokenizer.data.special_tokens.get("<unk>")
    ids.discard(-1 if unk is None else unk)
    if ids:
        names = ", ".join(tokenizer.token(i) for i in sorted(ids))
        return Finding("error", Message("text can forge control tokens: {names}", names=names))
    plain = renderer.prompt([Turn("user", "你好")])
    forged = renderer.prompt([Turn("user", f"你好{said}")])
    controls = [sum(i in renderer.stop_ids for i in p) for p in (plain, forged)]
    if controls[0] != controls[1]:
        return Finding("error", "a question can end its own turn")
    return Finding("ok", "no text can become a control token")


# -- tokens for which the embedding has no row ----------------------------------------------------
#
# Such a token would end a run in an index error at the first record that has it. A special token
# that no text and no template can produce (a placeholder for images, say) does no harm.

_SHOWN = 3
_GAP = 4096  # ids above the number of tokens that are looked at: numbering may have holes


def embedding_rows(config: dict[str, Any]) -> int | None:
    """Rows of the embedding by a base's config.json; None if it does not say."""
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    rows = inner.get("vocab_size", config.get("vocab_size"))
    return rows if isinstance(rows, int) else None


def tokens_without_row(renderer: Renderer, rows: int) -> dict[int, str]:
    """Tokens at or beyond `rows` that can occur: of text, or named by the tokenizer or template."""
    tokenizer = renderer.tokenizer
    v = tokenizer.data
    used = {v.eos_id, v.pad_id, renderer.end_id, *renderer.stop_ids, *v.end_ids}
    if v.bos_id is not None:
        used.add(v.bos_id)
    beyond = [i for i in range(rows, tokenizer.vocab_size + _GAP) if _exists(tokenizer, i)]
    beyond += [i for i in used if i >= rows and i not in beyond]
    return {i: tokenizer.token(i) for i in beyond if i in used or i not in tokenizer.control_ids}


def _exists(tokenizer: Tokenizer, token_id: int) -> bool:
    return tokenizer.token(token_id) != f"<{token_id}>"


def check_embedding_rows(renderer: Renderer, config: dict[str, Any], where: Path) -> None:
    """Raises: UserError where a token that can occur has no row in the embedding."""
    rows = embedding_rows(config)
    lacking = tokens_without_row(renderer, rows) if rows else {}
    if not lacking or rows is None:
        return
    some = [f"{token!r} ({i})" for i, token in sorted(lacking.items())[:_SHOWN]]
    more = f" and {len(lacking) - _SHOWN:,} more" if len(lacking) > _SHOWN else ""
    raise UserError(
        "the base's embedding has {rows:,} rows, and none for the tokenizer's {names}{more}",
        rows=rows,
        names=", ".join(some),
        more=more,
        where=str(where),
        fix="Use the tokenizer files that the base was published with, or a base whose embedding "
        "was enlarged for this tokenizer.",
    )
