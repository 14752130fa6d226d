"""`vicuna data check | stats | preview | convert`: look at data before training on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vicuna import config
from vicuna.config import DatasetEntry, DataSettings
from vicuna.config.parse import T
from vicuna.data import dataset, formats
from vicuna.data.encode import NEXT_TOKEN, NO_TARGET, Encoder, Example
from vicuna.data.lengths import CUTOFFS, Lost
from vicuna.data.preview import spans
from vicuna.data.read import read
from vicuna.data.sources import expand
from vicuna.data.template import Renderer, find
from vicuna.data.types import Conversation, Problem
from vicuna.errors import EXIT_MISTAKE, SettingsError, UserError


def _parse(cls: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    files: list[str] = []
    settings, _ = config.parse(cls, words, free=files)
    if not files:
        raise SettingsError(["which file? Give files, folders, globs or hub ids"])
    return settings, files


def renderer_for(settings: DataSettings) -> Renderer:
    """The template and tokenizer of these settings; needs no weights.

    Raises: UserError where there is no such base or template.
    """
    from vicuna.model.base import locate_vocabulary
    from vicuna.model.vocabulary import load_vocabulary

    vocabulary = load_vocabulary(locate_vocabulary(settings.model))
    return Renderer(find(settings.template, vocabulary), Encoder(vocabulary))


def check(words: Sequence[str]) -> int:
    """Exit code 0 where every file has usable records, 2 where one has none."""
    settings, files = _parse(config.DataCommandSettings, words)
    entries = [DatasetEntry(path=f) for f in files]
    _, report = dataset.load(entries, settings, renderer_for(settings))
    if settings.json_output:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        from rich.console import Console

        Console(highlight=False).print(report.rich_table())
    return 0 if all(f.used for f in report.files) else EXIT_MISTAKE


def stats(words: Sequence[str]) -> int:
    """Token lengths of each file, and what each cutoff would lose."""
    settings, files = _parse(config.DataCommandSettings, words)
    renderer = renderer_for(settings)
    # Every length counts here, so nothing is dropped for being long.
    whole = settings.model_copy(update={"cutoff_len": 1 << 30, "overlong": "drop"})
    results = []
    for name in files:
        found, _ = dataset.load([DatasetEntry(path=name)], whole, renderer)
        if not len(found):
            raise UserError("no usable records", where=name, fix="vicuna data check says why.")
        tokens, characters = _answer_lengths(found, renderer)
        results.append(_stats(name, found, tokens / max(1, characters)))
    if settings.json_output:
        print(json.dumps({"files": results, "model": settings.model}, ensure_ascii=False))
    else:
        _print_stats(results, settings)
    return 0


def _answer_lengths(found: dataset.Dataset, renderer: Renderer) -> tuple[int, int]:
    """(tokens, characters) of the first answers: the template's own words do not count."""
    tokens = characters = 0
    for i in range(min(len(found), 500)):
        example = found[i]
        learned = example.ids[1:][example.labels[:-1] == NEXT_TOKEN].tolist()
        answer = [t for t in learned if t not in renderer.encoder.control_ids]
        tokens += len(answer)
        characters += len(renderer.encoder.decode(answer))
    return tokens, characters


def _stats(name: str, found: dataset.Dataset, tokens_per_character: float) -> dict[str, Any]:
    lengths = found.lengths()
    return {
        "path": name,
        "examples": len(found),
        "tokens": int(lengths.tokens.sum()),
        "supervised_tokens": int(found.column("targets").sum()),
        "length": {
            **{f"p{q}": lengths.quantile(q) for q in (50, 90, 99)},
            "max": lengths.longest,
        },
        "tokens_per_character": round(tokens_per_character, 3),
        "cutoffs": {str(c): _cutoff(lengths.lost(c)) for c in CUTOFFS},
    }


def _cutoff(lost: Lost) -> dict[str, float]:
    return {"longer": round(lost.longer, 4), "answer_lost": round(lost.answer_lost, 4)}


def _print_stats(results: Sequence[dict[str, Any]], settings: DataSettings) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for r in results:
        length = r["length"]
        console.print(
            f"{r['path']}: {r['examples']:,} examples, {r['tokens']:,} tokens "
            f"({r['supervised_tokens']:,} supervised), {r['tokens_per_character']:.2f} tokens a "
            f"character with {settings.model}\n"
            f"length p50 {length['p50']}, p90 {length['p90']}, p99 {length['p99']}, "
            f"longest {length['max']}"
        )
        table = Table(box=None, header_style="bold")
        for title in ("cutoff_len", "longer", "lose the whole answer", "whole"):
            table.add_column(title, justify="right")
        for cutoff, lost in r["cutoffs"].items():
            kept = 1 - lost["longer"]
            table.add_row(
                f"{int(cutoff):,}",
                f"{lost['longer']:.1%}",
                f"{lost['answer_lost']:.1%}",
                f"{kept:.1%}",
            )
        console.print(table)


def preview(words: Sequence[str]) -> int:
    """Print examples token by token: green is learned, reversed is a control token."""
    settings, files = _parse(config.PreviewSettings, words)
    renderer = renderer_for(settings)
    entries = [DatasetEntry(path=f) for f in files]
    found, _ = dataset.load(entries, settings, renderer)
    if settings.start >= len(found):
        raise UserError(f"there are only {len(found)} usable examples", where="start")
    from rich.console import Console

    console = Console(highlight=False)
    console.print(
        f"template {renderer.template.name}; [green]learned[/], not learned, "
        f"[reverse]control token[/]; answers end with {renderer.encoder.token(renderer.end_id)}"
    )
    for i in range(settings.start, min(settings.start + settings.number, len(found))):
        example = found[i]
        learned = int((example.labels != NO_TARGET).sum())
        console.rule(f"example {i}: {len(example.ids)} tokens, {learned} learned")
        console.print(_coloured(example, renderer))
    return 0


def _coloured(example: Example, renderer: Renderer) -> Any:
    from rich.text import Text

    text = Text()
    for span in spans(example, renderer):
        style = ["reverse"] if span.control else []
        style += ["green"] if span.learned else []
        style += ["dim"] if span.silent else []
        text.append(span.text, " ".join(style))
    return text


def convert(words: Sequence[str]) -> int:
    """Write all usable records of the files in one format."""
    from pathlib import Path

    settings, files = _parse(config.ConvertSettings, words)
    if not settings.output:
        raise SettingsError(["output is missing: give the file to write (--output new.jsonl)"])
    output = Path(settings.output)
    if output.exists() and not settings.force:
        raise UserError("the file exists", where=str(output), fix="Add --force to replace it.")
    aside = output.with_name(f".{output.name}.part")
    written = dropped = 0
    with aside.open("w", encoding="utf-8") as out:
        for path in (p for name in files for p in expand(name)):
            problems: list[Problem] = []
            for raw in read(path, problems, settings.encoding or None):
                conversation = formats.parse(raw).conversation
                if conversation is None:
                    dropped += 1
                    continue
                line = json.dumps(as_format(conversation, settings.to), ensure_ascii=False)
                out.write(line + "\n")
                written += 1
            dropped += sum(p.action == "dropped" for p in problems)
    if not written:
        aside.unlink()
        raise UserError("no usable records", where=", ".join(files), fix="See vicuna data check.")
    aside.rename(output)
    print(f"{written:,} records written to {output}, {dropped:,} dropped")
    return 0


def as_format(conversation: Conversation, to: str) -> dict[str, Any]:
    """A conversation as a record of another format.

    Formats of one turn (alpaca, pair) take a longer conversation's last turn and put what came
    before into `history`, so that nothing is lost.
    """
    if conversation.kind == "text":
        return {"text": conversation.turns[-1].text}
    turns = conversation.turns
    system = turns[0].text if turns[0].role == "system" else ""
    pairs = [(q, a) for q, a in pairwise(turns) if q.role == "user" and a.role == "assistant"]

    def said(q: Any) -> str:
        return f"{q.text}\n{q.input}" if q.input and q.text else q.text or q.input

    record: dict[str, Any] = {"system": system} if system else {}
    history = [{"input": said(q), "output": a.text} for q, a in pairs[:-1]]
    question, answer = pairs[-1]
    if to == "messages":
        messages = [{"role": "system", "content": system}] if system else []
        for q, a in pairs:
            messages.append({"role": "user", "content": said(q)})
            messages.append({"role": "assistant", "content": a.text})
        return {"messages": messages}
    if to == "sharegpt":
        said_by = [{"from": "system", "value": system}] if system else []
        for q, a in pairs:
            said_by += [{"from": "human", "value": said(q)}, {"from": "gpt", "value": a.text}]
        return {"conversations": said_by}
    if to == "chat":
        return {
            **record,
            "input": [said(q) for q, _ in pairs],
            "output": [a.text for _, a in pairs],
        }
    if to == "history" or history:
        return {**record, "history": history, "input": said(question), "output": answer.text}
    if to == "alpaca":
        fields = {"instruction": question.text, "input": question.input, "output": answer.text}
        return {**record, **fields}
    return {**record, "prompt": said(question), "response": answer.text}
