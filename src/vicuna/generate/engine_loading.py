"""How each engine is opened: from the name of a base and perhaps an adapter to what computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vicuna.config import AnswerSettings
from vicuna.errors import UserError
from vicuna.generate.engines.base import Engine
from vicuna.model import adapter as adapters
from vicuna.model import adapter_fit
from vicuna.model.adapter import AdapterFiles
from vicuna.model.base import EMBEDDED, locate, locate_gguf, locate_vocabulary
from vicuna.model.config_files import read_config

# precision -> type of the GGUF file that is written for it.
_GGUF_TYPES = {"auto": "f16", "fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "q8_0"}
_VLLM_TYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass
class Opened:
    """An opened engine.

    vocabulary: the folder its vocabulary is in.
    check: refuses an adapter of another base (UserError); what was found, in words.
    load: gives an adapter to the engine under a name. It changes nothing until it is chosen.
    about: what computes, in words.
    """

    engine: Engine
    vocabulary: Path
    check: Callable[[AdapterFiles], list[str]]
    load: Callable[[str, AdapterFiles], None]
    about: str = ""


def open_engine(settings: AnswerSettings, base: str, files: AdapterFiles | None) -> Opened:
    """The engine that the settings ask for, over a base alone.

    Args:
        files: the adapter that will be loaded first. If it belongs to another base, that is said
            before anything is loaded.

    Raises: UserError where base and adapter do not belong together, or something is missing.
    """
    return _OPENERS[settings.engine](settings, base, files)


# -- torch ----


def _open_torch(settings: AnswerSettings, base: str, files: AdapterFiles | None) -> Opened:
    from vicuna.generate.engines import torch as torch_engines
    from vicuna.model import device_map, load

    over = device_map.devices(settings.device_map)
    folder = locate(base)
    check = _checker(settings, folder)
    _check(check, files)
    chosen = load.choose(settings.precision, over[0])
    if len(over) == 1:
        model = load.load_base(folder, chosen, over[0])
    else:
        fill = settings.device_map == "auto"
        model = load.load_base(folder, chosen, over[0], device_map.spread(over, fill))
        device_map.check(model, over)
    model.eval()
    context = settings.context_length or load.context_length(model)
    engine = torch_engines.open_engine(model, context, settings.cache_type, alone=True)
    return Opened(engine, folder, check, engine.load_adapter)


def _checker(settings: AnswerSettings, folder: Path) -> Callable[[AdapterFiles], list[str]]:
    """What refuses an adapter of another base than the one in a folder."""

    def check(files: AdapterFiles) -> list[str]:
        found = adapters.check_belongs(files, folder, settings.allow_other_base)
        return [*files.notes, *found]

    return check


def _check(check: Callable[[AdapterFiles], list[str]], files: AdapterFiles | None) -> None:
    if files is not None:
        check(files)


def _refuse(settings: AnswerSettings, name: str, why: str) -> None:
    """Refuse a setting that an engine cannot follow, where it was given."""
    if getattr(settings, name) != "auto":
        raise UserError(
            f"{name} has no effect with {settings.engine}: {why}",
            where=name,
            fix="Leave it out, or use --engine torch.",
        )


# -- llama.cpp ----


def _open_llamacpp(settings: AnswerSettings, base: str, files: AdapterFiles | None) -> Opened:
    import torch

    from vicuna.generate.engines.llamacpp import LlamaCppEngine
    from vicuna.llamacpp.library import library

    _refuse(settings, "device_map", "llama.cpp places the layers itself")
    library()  # a missing wheel is met before a base is converted
    gguf, folder, check, taken = _gguf_of(settings, base)
    _check(check, files)
    # Filters and penalties are torch's. Its threads would spin between two of them, on the cores
    # that llama.cpp computes on; a few rows of scores need no more than one.
    torch.set_num_threads(1)
    others = max(settings.num_beams, settings.num_return_sequences) - 1
    engine = LlamaCppEngine(
        gguf,
        context_length=settings.context_length,
        spare=lambda context: others * min(settings.max_new_tokens, context),
        threads=settings.threads,
        cache_type="f16" if settings.cache_type == "auto" else settings.cache_type,
    )

    def load(name: str, files: AdapterFiles) -> None:
        from vicuna.export.gguf_cache import adapter_file

        if any(folder.glob("*.safetensors")):  # else a GGUF file is the base: llama.cpp looks
            adapter_fit.check_weights(files, folder)
        config = read_config(folder)
        engine.load_adapter(name, adapter_file(files, config))

    many = "" if engine.threads == 1 else "s"
    about = (
        f"llama.cpp: {taken}, {engine.threads} thread{many}, a context of {engine.context_length} "
        f"tokens (the model was made for {engine.trained_context})"
    )
    return Opened(engine, folder, check, load, about)


def _gguf_of(
    settings: AnswerSettings, base: str
) -> tuple[Path, Path, Callable[[AdapterFiles], list[str]], str]:
    """(GGUF file, folder of vocabulary and config.json, what checks adapters, which file it is).

    A GGUF file that the user gives is taken as it is unless a precision is asked for; a folder is
    written as GGUF once. So is the embedded base: its own file, of 4 bits, is only how it travels,
    and llama.cpp would answer otherwise from it than torch does.
    """
    given = locate_gguf(base)
    if given is not None and settings.precision == "auto" and base != EMBEDDED:
        folder = locate_vocabulary(base)
        check = _shape_checker(settings, folder, base)
        return given, folder, check, f"{given.name} as it is"
    kind = _GGUF_TYPES.get(settings.precision)
    if kind is None:
        raise UserError(
            f"llama.cpp has no {settings.precision}",
            where="precision",
            fix="Use auto, fp32, bf16, fp16 or int8 (q8_0), or a .gguf file of a 4-bit type.",
        )
    from vicuna.export.gguf_cache import base_file

    folder = locate(base)
    check = _checker(settings, folder)
    return base_file(folder, kind), folder, check, f"{base} in {kind.upper()}"


def _shape_checker(
    settings: AnswerSettings, folder: Path, base: str
) -> Callable[[AdapterFiles], list[str]]:
    """As `_checker`, for a GGUF file: of quantised weights only the shape can be compared."""
    shape = read_config(folder)

    def check(files: AdapterFiles) -> list[str]:
        belongs = files.meta.get("base", {})
        keys = [k for k in shape if k in belongs and k != "model_type"]
        same = {k: shape[k] for k in keys}
        warning = adapters.check_base(files, same, settings.allow_other_base)
        notes = [*files.notes, *([warning] if warning else [])]
        if files.copies:
            notes.append("weights of the base beside the adapter were not compared with its own")
        if belongs.get("name", base) != base:
            notes.append(f"only the shape of {base} was compared with {belongs['name']}'s")
        return notes

    return check


# -- vllm ----


def _open_vllm(settings: AnswerSettings, base: str, files: AdapterFiles | None) -> Opened:
    from vicuna.generate.engines.vllm import VllmEngine, library

    _refuse(settings, "device_map", "vLLM places the layers itself")
    _refuse(settings, "cache_type", "vLLM's cache has types of its own")
    library()
    folder = locate(base)
    check = _checker(settings, folder)
    _check(check, files)
    dtype = _VLLM_TYPES.get(settings.precision)
    if dtype is None:
        raise UserError(
            f"{settings.precision} is not passed on to vLLM",
            where="precision",
            fix="Use auto, fp32, bf16 or fp16, or a base that is quantised on disk.",
        )
    rank = files.lora.largest if files else 0
    engine = VllmEngine(folder, settings.context_length, dtype, lora_rank=rank)

    def load(name: str, files: AdapterFiles) -> None:
        adapter_fit.check_weights(files, folder)
        engine.load_adapter(name, adapters.plain_folder(files))

    return Opened(engine, folder, check, load)


_OPENERS: dict[str, Callable[[AnswerSettings, str, AdapterFiles | None], Opened]] = {
    "torch": _open_torch,
    "llama.cpp": _open_llamacpp,
    "vllm": _open_vllm,
}
