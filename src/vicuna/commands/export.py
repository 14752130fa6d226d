"""`vicuna export gguf`: write a GGUF file and compare it with its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vicuna import config
from vicuna.config import ExportSettings
from vicuna.errors import SettingsError
from vicuna.export.gguf_types import FULL
from vicuna.files import whole_files
from vicuna.messages import Message
from vicuna.paths import shell_word
from vicuna.terminal import say

if TYPE_CHECKING:
    from vicuna.commands.model_source import ModelSource
    from vicuna.export.importance import Importance
    from vicuna.verify.report import Report

# What a result is compared by: the gate of the bits it has.
_GATES = {"f32": "32bit", "f16": "16bit", "bf16": "16bit"}


def run(argv: Sequence[str]) -> int:
    """Write the file, compare it with its source, print the report."""
    positional: list[str] = []
    settings, given = config.parse(ExportSettings, argv, free=positional)
    if settings.adapter_only and positional and not settings.adapter:
        settings.adapter = positional.pop(0)  # --adapter_only RUN
    mistakes = [f"{word!r} is not a setting (--key value)" for word in positional]
    _check(settings, mistakes, {*given})
    from vicuna.commands.model_source import check_target, open_source
    from vicuna.export import modelfile as modelfiles
    from vicuna.verify.report import beside

    target = Path(settings.output).expanduser()
    check_target(target, settings.force, "the file")
    modelfile = target.with_name(f"{target.name}.Modelfile")
    if settings.modelfile:
        check_target(modelfile, settings.force, "the Modelfile")
    source = open_source(settings)
    write = _adapter if settings.adapter_only else _base
    told = beside(target)
    with whole_files(target, modelfile, told) as (aside, model_aside, report_aside):
        report = write(settings, source, target, aside)
        if settings.modelfile:
            made = modelfiles.modelfile(source.renderer, target, settings.adapter_only)
            model_aside.write_text(made.text, encoding="utf-8")
            report.notes += made.notes
        report.write_as(report_aside)
    report.finish()
    _say_next(settings, target, modelfile)
    return 0


def _check(settings: ExportSettings, mistakes: list[str], given: set[str]) -> None:
    if not settings.output:
        mistakes.append("output is missing: the file to write (--output model.gguf)")
    elif Path(settings.output).is_dir():
        mistakes.append(
            Message("output {output} is a folder; name a file in it", output=settings.output)
        )
    if settings.adapter_only:
        if not settings.adapter:
            mistakes.append("adapter_only needs the adapter (--adapter RUN)")
        if settings.type not in FULL:
            mistakes.append(
                Message("an adapter can be f32, f16 or bf16, not {type}", type=settings.type)
            )
        if settings.imatrix:
            mistakes.append("imatrix has no effect on an adapter, which is not quantized")
    elif settings.imatrix and settings.type in FULL:
        mistakes.append(
            Message("imatrix has no effect on {type}, which is not quantized", type=settings.type)
        )
    if not settings.imatrix:
        unused = sorted(given & {"num_samples", "cutoff_len", "seed"})
        mistakes += [Message("{name} has no effect without imatrix", name=name) for name in unused]
    if mistakes:
        raise SettingsError(mistakes)


# -- a base ----


def _base(settings: ExportSettings, source: ModelSource, target: Path, aside: Path) -> Report:
    from vicuna.commands.model_source import progress_counter
    from vicuna.export.gguf_vocab import ChatFormat
    from vicuna.export.gguf_writer import write_base
    from vicuna.export.template_text import jinja
    from vicuna.verify.logits import GgufLogits
    from vicuna.verify.report import Report, size_of
    from vicuna.weights.read import weight_files

    about = {**source.about(), "type": settings.type}
    kind = _GATES.get(settings.type, f"{settings.type[1]}bit")
    report = Report(f"export gguf --type {settings.type}", target, kind, about, source.notes)
    chat_format = (
        ChatFormat(jinja(source.renderer), source.renderer.end_id)
        if source.has_own_template
        else None
    )
    importance = _importance(settings, source, target) if settings.imatrix else None
    write_base(
        source.folder,
        aside,
        settings.type,
        source.title,
        base=source.name,
        adapter=source.adapter,
        chat_format=chat_format,
        importance=importance,
        progress=progress_counter("tensors"),
    )
    report.measure(sum(size_of(f) for f in weight_files(source.folder)[0]), aside)
    report.verify(
        settings, source.logit_source, lambda: GgufLogits(aside), lambda: source.renderer.tokenizer
    )
    return report


def _importance(settings: ExportSettings, source: ModelSource, target: Path) -> Importance:
    """Read an importance matrix, or compute one and keep it beside the file."""
    from vicuna.commands.model_source import progress_counter
    from vicuna.data.calibration import texts_for
    from vicuna.export import importance
    from vicuna.export.gguf_names import Names, Shape

    given = Path(settings.imatrix).expanduser()
    if importance.is_importance(given):
        return importance.read_importance(given)
    names = Names(Shape.of(source.config, str(source.folder)))  # refused before anything is loaded
    texts = texts_for(
        settings.imatrix, source.renderer, settings.num_samples, settings.cutoff_len, settings.seed
    )
    model = _loaded(source)
    found = importance.measure(
        model, names, texts, settings.imatrix, progress_counter("importance")
    )
    kept = target.with_name(f"{target.stem}.imatrix.gguf")
    importance.write_importance(found, kept)
    tokens = sum(map(len, texts))
    source.notes.append(
        Message(
            "importance from {count} texts ({tokens:,} tokens) of {imatrix}, kept as {name}",
            count=len(texts),
            tokens=tokens,
            imatrix=settings.imatrix,
            name=kept.name,
        )
    )
    return found


def _loaded(source: ModelSource) -> object:
    """The model itself, its adapter beside it: what it computes is what is measured."""
    from vicuna.model import adapter, load

    device = load.pick_device()
    model = load.load_base(source.folder, load.choose("auto", device), device)
    if source.adapter is not None:
        model = adapter.attach_saved(model, source.adapter)
        model.to(device)
    return model.eval()


# -- an adapter ----


def _adapter(settings: ExportSettings, source: ModelSource, target: Path, aside: Path) -> Report:
    from vicuna.export.gguf_cache import base_file
    from vicuna.export.gguf_writer import write_adapter
    from vicuna.export.template_text import jinja
    from vicuna.verify.logits import GgufLogits
    from vicuna.verify.report import Report, size_of

    assert source.adapter is not None
    about = {**source.about(), "type": settings.type, "adapter_only": True}
    report = Report("export gguf --adapter_only", target, "16bit", about, source.notes)
    template = jinja(source.renderer) if source.has_own_template else ""
    write_adapter(
        source.adapter, source.config, aside, settings.type, source.title, template, source.name
    )
    report.measure(size_of(source.adapter.path), aside)
    report.verify(
        settings,
        source.logit_source,
        lambda: GgufLogits(base_file(source.folder, "f16"), aside),
        lambda: source.renderer.tokenizer,
    )
    return report


def _say_next(settings: ExportSettings, target: Path, modelfile: Path) -> None:
    """What lies where, and how to talk with it."""
    if settings.modelfile:
        name, file = shell_word(target.stem.lower()), shell_word(modelfile)
        say(f"Modelfile  {modelfile}")
        say(f"Ollama:    ollama create {name} -f {file} && ollama run {name}")
    else:
        say("Ollama:    --modelfile writes a Modelfile with the template, too")
    if settings.adapter_only:
        say(f"chat:      vicuna run BASE.gguf --adapter {shell_word(settings.adapter)}")
    else:
        say(f"chat:      vicuna run {shell_word(target)}")
