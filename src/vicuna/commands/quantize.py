"""`vicuna quantize gptq | awq | bnb`: write a quantized model and compare it with its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicuna import config
from vicuna.config import QuantizeSettings
from vicuna.errors import SettingsError, UserError
from vicuna.files import whole_folder
from vicuna.messages import Message
from vicuna.terminal import say

if TYPE_CHECKING:
    from vicuna.commands.model_source import ModelSource
    from vicuna.verify.logits import LogitSource

_BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "bnb": (4, 8)}
_GROUPS = (128, 64, 32)
_QUESTION = "What is the capital of France?"
_OF_CALIBRATION = {"calibration", "num_samples", "cutoff_len", "seed"}
# Settings that have no effect with a method.
_IDLE = {
    "gptq": set(),
    "awq": {"act_order", "damp"},
    "bnb": {"act_order", "damp", "group_size", "environment", *_OF_CALIBRATION},
}


def gptq(argv: Sequence[str]) -> int:
    """`vicuna quantize gptq`."""
    return run("gptq", argv)


def awq(argv: Sequence[str]) -> int:
    """`vicuna quantize awq`."""
    return run("awq", argv)


def bnb(argv: Sequence[str]) -> int:
    """`vicuna quantize bnb`."""
    return run("bnb", argv)


def run(method: str, argv: Sequence[str]) -> int:
    """Write the quantized model, compare it with its source, and print the report."""
    settings, given = config.parse(QuantizeSettings, argv)
    _check(method, settings, set(given))
    from vicuna.commands.model_source import open_source
    from vicuna.verify.report import Report
    from vicuna.weights.output_folder import result_folder

    source = open_source(settings)
    read = [source.folder, *([source.adapter.path] if source.adapter else [])]
    target = result_folder(settings.output_dir, settings.force, read)
    _refuse_quantised(source)
    about = {**source.about(), "method": method, "bits": settings.bits}
    if method != "bnb":
        about["group_size"] = settings.group_size = _group(settings, given, source)
    name = f"quantize {method} --bits {settings.bits}"
    report = Report(name, target, f"{settings.bits}bit", about, source.notes)
    with whole_folder(target) as aside:
        after = _write(method, settings, source, aside)
        _finish_folder(source, aside)
        report.measure(_size(source), aside)
        report.verify(settings, source.logit_source, after, lambda: source.renderer.tokenizer)
        if settings.verify and method != "bnb":
            try:
                report.answers[_QUESTION] = _answer(source, after())
            except UserError as e:  # it was compared and is good: it is not lost for this
                report.notes.append(Message("the test question failed: {details}", details=e.what))
        report.write(aside)
    report.finish()
    return 0


def _check(method: str, settings: QuantizeSettings, given: set[str]) -> None:
    mistakes = []
    if not settings.output_dir:
        mistakes.append("output_dir is missing: the folder to write (--output_dir D)")
    if settings.bits not in _BITS[method]:
        allowed = ", ".join(map(str, _BITS[method]))
        mistakes.append(
            Message(
                "{method} supports {allowed} bits, not {bits}",
                method=method,
                allowed=allowed,
                bits=settings.bits,
            )
        )
    mistakes += [
        Message("{name} has no effect with {method}", name=n, method=method)
        for n in sorted(given & _IDLE[method])
    ]
    if mistakes:
        raise SettingsError(mistakes)


def _refuse_quantised(source: ModelSource) -> None:
    if source.config.get("quantization_config"):
        raise UserError(
            "this base is already quantized",
            where=str(source.folder),
            fix="Quantize the original weights instead.",
        )


_WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads")


def _group(settings: QuantizeSettings, given: dict[str, object], source: ModelSource) -> int:
    """Weights that share a scale: what was asked for, if it divides the rows of every matrix.

    Raises: SettingsError where it does not; UserError where config.json lacks a width.
    """
    found = source.config
    missing = [n for n in _WIDTHS if not isinstance(found.get(n), int) or found[n] < 1]
    if missing:
        raise UserError(
            "config.json has no {missing}",
            missing=missing[0],
            where=str(source.folder),
            fix="Download the base again.",
        )
    hidden, inner, heads = (int(found[n]) for n in _WIDTHS)
    head = int(found.get("head_dim") or hidden // heads)
    widths = sorted({hidden, inner, heads * head})
    fits = [g for g in _GROUPS if all(w % g == 0 for w in widths)]
    size = settings.group_size
    if size == -1 or (size > 0 and all(w % size == 0 for w in widths)):
        return size
    if "group_size" not in given and fits:
        source.notes.append(
            Message(
                "group_size {fit}: {size} does not divide the row widths {widths}",
                fit=fits[0],
                size=size,
                widths=widths,
            )
        )
        return fits[0]
    instead = f"; {', '.join(map(str, fits))} or -1 do" if fits else "; -1 (a whole row) does"
    raise SettingsError(
        [
            Message(
                "group_size {size} does not divide the row widths {widths}{instead}",
                size=size,
                widths=widths,
                instead=instead,
            )
        ]
    )


def _write(
    method: str, settings: QuantizeSettings, source: ModelSource, aside: Path
) -> Callable[[], LogitSource]:
    """Write the weights; what gives their scores."""
    if method == "bnb":
        from vicuna.quantize.bnb import write

        return write(settings.bits, source, aside)
    from vicuna.commands.model_source import progress_counter
    from vicuna.data.calibration import texts_for
    from vicuna.quantize.environment import python_of
    from vicuna.quantize.merged_base import merged_folder
    from vicuna.quantize.process import QuantizedLogits, quantize

    texts = texts_for(
        settings.calibration, source.renderer, settings.num_samples, settings.cutoff_len,
        settings.seed,
    )  # fmt: skip
    source.notes.append(
        Message(
            "calibrated on {count} texts ({total:,} tokens) of {calibration}, template {name}",
            count=len(texts),
            total=sum(map(len, texts)),
            calibration=settings.calibration,
            name=source.renderer.template.name,
        )
    )
    python = python_of(settings.environment)
    if method == "awq":
        _tell_how_long(source, sum(map(len, texts)))
    with merged_folder(source) as folder:
        job = {
            "model": str(folder), "output": str(aside), "method": method, "bits": settings.bits,
            "group_size": settings.group_size, "act_order": settings.act_order,
            "damp": settings.damp, "texts": texts,
        }  # fmt: skip
        quantize(python, job, progress_counter("layers"))
    return lambda: QuantizedLogits(python, aside, method)


def _answer(source: ModelSource, scorer: Any) -> str:
    """What the result says to `_QUESTION`: nobody else here can open it and ask."""
    from vicuna.data.conversation import Turn

    renderer = source.renderer
    prompt = renderer.prompt([Turn("user", _QUESTION)])
    ids = scorer.answer(prompt, sorted(renderer.stop_ids), longest=48)
    return renderer.tokenizer.decode(ids).strip()


def _tell_how_long(source: ModelSource, tokens: int) -> None:
    """Say before it begins what AWQ's search takes where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return
    # Measured on the embedded base: 1,100 to 5,300 tokens, one core and two.
    seconds = _size(source) / 2e6 * (0.4 + 0.00016 * tokens)
    say(
        f"Without a GPU, AWQ takes about {seconds / 60:,.0f} minutes of one core for this model "
        f"and {tokens:,} tokens; fewer --num_samples take less.",
        error=True,
    )


def _finish_folder(source: ModelSource, aside: Path) -> None:
    """Leave a folder that stands alone: the base's own tokenizer, the template, the end tokens."""
    from vicuna.export.chat_format import write_chat_format
    from vicuna.weights.output_folder import copy_side_files

    (aside / "quant_log.csv").unlink(missing_ok=True)
    written = (aside / "config.json").read_bytes()
    copy_side_files(source.folder, aside)
    (aside / "config.json").write_bytes(written)
    if source.has_own_template:
        write_chat_format(source.renderer, aside)
    if "quantization_config" not in json.loads(written):
        raise UserError("the library wrote weights that are not quantized", where=str(aside))


def _size(source: ModelSource) -> int:
    from vicuna.verify.report import size_of
    from vicuna.weights.read import weight_files

    return sum(size_of(path) for path in weight_files(source.folder)[0])
