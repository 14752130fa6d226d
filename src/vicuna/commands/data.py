"""`vicuna data check | stats | preview`: look at data before training on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vicuna import config
from vicuna.config import DataSettings
from vicuna.config.parse import T
from vicuna.data import dataset
from vicuna.data.dataset import CUTOFFS, Lost
from vicuna.data.loss_mask import NEXT_TOKEN, NO_TARGET, Example
from vicuna.data.preview import spans
from vicuna.data.templates.compare_with_original import lines_for
from vicuna.data.templates.registry import find_template
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import EXIT_MISTAKE, SettingsError, UserError
from vicuna.terminal import say_json


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
    template = find_template(settings.template, vocabulary)
    template = template.choose(settings.thinking, settings.thinking_loss)
    return Renderer(template, Tokenizer(vocabulary))


@contextmanager
def _reading() -> Iterator[dataset.Say]:
    """How far the reading is, on standard error: the result alone goes to standard output."""
    from vicuna.console import Console, working

    with working(Console(stderr=True), "reading data") as say:
        yield say


def check(words: Sequence[str]) -> int:
    """Exit code 0 where every file has usable records, 2 where one has none."""
    settings, files = _parse(config.DataCheckSettings, words)
    entries = config.dataset_entries(files)
    renderer = renderer_for(settings)
    with _reading() as say:
        found, report = dataset.load(entries, settings, renderer, say)
    if settings.json_output:
        say_json(report.to_json())
    else:
        from vicuna.console import Console

        console = Console()
        console.print(report.rich_table())
        for line in lines_for(renderer, _some(found)):
            console.print(line, markup=False)
    return 0 if all(f.used for f in report.files) else EXIT_MISTAKE


def stats(words: Sequence[str]) -> int:
    """Token lengths of each file, and what each cutoff would lose."""
    settings, files = _parse(config.DataCheckSettings, words)
    renderer = renderer_for(settings)
    # Every length counts here, so nothing is dropped for being long.
    whole = settings.model_copy(update={"cutoff_len": 1 << 30, "overlong": "drop"})
    results = []
    for name in files:
        with _reading() as say:
            found, _ = dataset.load(config.dataset_entries([name]), whole, renderer, say)
        if not len(found):
            raise UserError("no usable records", where=name, fix="vicuna data check says why.")
        tokens, characters = _answer_lengths(found, renderer)
        results.append(_stats(name, found, tokens / max(1, characters)))
    if settings.json_output:
        say_json({"files": results, "model": settings.model})
    else:
        _print_stats(results, settings)
    return 0


def _some(found: dataset.Dataset) -> list[Example]:
    """At most 256 examples from all over the data."""
    return [found[i] for i in range(0, len(found), max(1, len(found) // 256))][:256]


def _answer_lengths(found: dataset.Dataset, renderer: Renderer) -> tuple[int, int]:
    """(tokens, characters) of the first answers: the template's own words do not count."""
    tokens = characters = 0
    for i in range(min(len(found), 500)):
        example = found[i]
        learned = example.ids[1:][example.labels[:-1] == NEXT_TOKEN].tolist()
        answer = [t for t in learned if t not in renderer.tokenizer.control_ids]
        tokens += len(answer)
        characters += len(renderer.tokenizer.decode(answer))
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
    from rich.table import Table

    from vicuna.console import Console

    console = Console()
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
    settings, files = _parse(config.DataPreviewSettings, words)
    renderer = renderer_for(settings)
    entries = config.dataset_entries(files)
    with _reading() as say:
        found, _ = dataset.load(entries, settings, renderer, say)
    if settings.start >= len(found):
        raise UserError("there are only {count} usable examples", count=len(found), where="start")
    from vicuna.console import Console

    console = Console()
    console.print(
        f"template {renderer.template.name}; [green]learned[/], not learned, "
        f"[reverse]control token[/]; answers end with {renderer.tokenizer.token(renderer.end_id)}"
    )
    for line in lines_for(renderer, _some(found)):
        console.print(line, markup=False)
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
        style += ["green"] if span.in_loss else []
        style += ["dim"] if span.silent else []
        text.append(span.text, " ".join(style))
    return text
