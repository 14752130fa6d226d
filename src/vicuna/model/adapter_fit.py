"""Whether an adapter fits a base: names and shapes of the layers it changes, and copies of the base
that lie beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.messages import Message
from vicuna.model import lora_config
from vicuna.model.adapter_files import AdapterFiles
from vicuna.model.lora_config import CONFIG, MERGE
from vicuna.weights.read import SafetensorsWeights, open_weights
from vicuna.weights.torch_files import load_pickled

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_LAYER = re.compile(r"\.(\d+)\.")

Shapes = Mapping[str, tuple[int, ...]]  # (out, in) of a base's linear layers, by their names


def check(files: AdapterFiles, shapes: Shapes) -> None:
    """Refuse an adapter whose layers a base lacks, or has in another shape.

    Raises: UserError that says in what they differ.
    """
    why = misfit(files, shapes)
    if why:
        raise _does_not_fit(files, why)


def _does_not_fit(files: AdapterFiles, why: str) -> UserError:
    return UserError(
        "the adapter does not fit this base: {why}",
        why=why,
        base=files.base,
        where=f"adapter {files.path}",
        fix="Use the base it was trained on: --model {base}."
        if files.base
        else "Use the base it was trained on.",
    )


def misfit(files: AdapterFiles, shapes: Shapes) -> str:
    """In what adapter and base differ, in words; "" where they fit."""
    pairs = files.pairs()
    lacking = [m for m in pairs if m not in shapes]
    if lacking:
        return _lacking(lacking, list(pairs), shapes)
    sizes = {m: ((b.shape[0], a.shape[1]), tuple(shapes[m])) for m, (a, b) in pairs.items()}
    wrong = {m: both for m, both in sizes.items() if both[0] != both[1]}
    if not wrong:
        return _cut_short(files, shapes)
    if "lm_head" in wrong and wrong["lm_head"][0][1] == wrong["lm_head"][1][1]:
        return _other_shape(_HEAD, *wrong["lm_head"])
    deep = [m for m, (ours, theirs) in wrong.items() if _reads_hidden(m) and ours[1] != theirs[1]]
    module = (deep or list(wrong))[0]
    ours, theirs = wrong[module]
    differs = Message(
        "{module} is {ours} in the adapter, {theirs} in the base",
        module=module,
        ours=_by(ours),
        theirs=_by(theirs),
    )
    return Message("another hidden size: {details}", details=differs) if deep else differs


def _reads_hidden(module: str) -> bool:
    """Whether a layer's input is as wide as the model."""
    return module.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"))


def _cut_short(files: AdapterFiles, shapes: Shapes) -> str:
    """Whether the adapter is whole for a base with fewer layers: all of the first, no other."""
    modules = set(files.pairs())
    kinds = {_kind(m) for m in modules}
    last = max(map(_number, modules))
    left = _targeted(files, [m for m in shapes if _kind(m) in kinds]) - modules
    if not left and last >= 0:
        # PEFT writes `all-linear` as a list of all names, which says nothing of further layers.
        first = {m for m in shapes if 0 <= _number(m) <= last}
        left = {m for m in shapes if _number(m) > last} if first == modules else set()
    if not left or any(_number(m) <= last for m in left):
        return ""
    layers = 1 + max(map(_number, shapes))
    return Message(
        "another number of layers: {last} in the adapter, {layers} in the base",
        last=last + 1,
        layers=layers,
    )


def _targeted(files: AdapterFiles, modules: list[str]) -> set[str]:
    """Modules that the adapter's config gives a LoRA."""
    config = files.config
    if not config.get("target_modules"):
        config = {**config, "target_modules": list(files.lora.target)}
    return lora_config.targeted(config, modules, files.path / CONFIG)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _lacking(lacking: list[str], modules: list[str], shapes: Shapes) -> str:
    numbers = [_number(m) for m in modules]
    layers = 1 + max((_number(m) for m in shapes), default=-1)
    known = {_kind(m) for m in shapes}
    if layers and all(_kind(m) in known for m in modules) and max(numbers) >= layers:
        return Message(
            "another number of layers: at least {numbers} there, {layers} here",
            numbers=max(numbers) + 1,
            layers=layers,
        )
    first = lacking[0]
    like = next(iter(m for m in shapes if _number(m) == 0), next(iter(shapes), "nothing"))
    if len(lacking) == len(modules):
        return Message(
            "another architecture: it changes {first}, a layer of the base is called {layer}",
            first=first,
            layer=like,
        )
    return Message("{first} has no counterpart in it", first=first)


def _number(module: str) -> int:
    found = _LAYER.search(module)
    return int(found[1]) if found else -1


def _kind(module: str) -> str:
    return _LAYER.sub(".*.", module, count=1)


# -- the base's folder ----


def check_weights(files: AdapterFiles, folder: Path) -> None:
    """`check` against the weights in a base's folder, for engines that look into nothing else.

    Raises: UserError that says in what they differ.
    """
    weights = open_weights(folder)
    held = {n: weights.shape(n) for n in weights.names() if len(weights.shape(n)) == 2}
    if _EMBEDDING in held:
        held.setdefault(_HEAD, held[_EMBEDDING])
    check(files, {n.removesuffix(".weight"): shape for n, shape in held.items()})


def notes_on(files: AdapterFiles, folder: Path) -> list[str]:
    """What should be known about an adapter on the base of a folder: copies of the base that lie
    beside it are compared, layers that it leaves out are named.

    Raises: UserError where a copy is not what the base has.
    """
    notes = _compare_copies(files, folder) if files.copies else []
    left = _left_out(files, folder)
    if left:
        notes.append(
            Message(
                "the config wants {count} matrices that the weights lack, such as "
                "{left}: as in PEFT, nothing is added to them",
                count=len(left),
                left=sorted(left)[0],
            )
        )
    return notes


def _left_out(files: AdapterFiles, folder: Path) -> set[str]:
    """Matrices that the config targets and the weights do not hold."""
    base = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    layers = base.get("text_config", base).get("num_hidden_layers")
    if not isinstance(layers, int):
        return set()
    modules = files.pairs()
    every: set[str] = set()
    for module in modules:
        every |= {_LAYER.sub(f".{n}.", module, count=1) for n in range(layers)}
    return _targeted(files, sorted(every)) - set(modules)


def _compare_copies(files: AdapterFiles, folder: Path) -> list[str]:
    weights = open_weights(folder)
    held = set(weights.names())
    copies = _read_copies(files)
    uncompared = []
    for name, copy in copies.items():
        source = _EMBEDDING if name == _HEAD and _HEAD not in held else name
        if source not in held:
            raise _not_the_bases(files, name, "is neither a LoRA nor a weight of the base")
        if not copy.is_floating_point() or not weights.dtype(source).is_floating_point:
            uncompared.append(name)
            continue
        if tuple(copy.shape) != weights.shape(source):
            raise _does_not_fit(files, _other_shape(name, copy.shape, weights.shape(source)))
        if not _equal(copy, weights.read(source)):
            raise _not_the_bases(files, name, "is not what the base has: it was trained, too")
    if uncompared:
        return [
            f"{uncompared[0]} lies beside the adapter and cannot be compared with the base's, which"
            " is quantised; the base's is used"
        ]
    return []


def _other_shape(name: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> str:
    if name in (_HEAD, _EMBEDDING) and ours[1:] == theirs[1:]:
        return Message(
            "another vocabulary: {ours} tokens in the adapter, {theirs} in the base",
            ours=ours[0],
            theirs=theirs[0],
        )
    return f"{name} is {_by(tuple(ours))} in the adapter, {_by(tuple(theirs))} in the base"


def _read_copies(files: AdapterFiles) -> dict[str, Tensor]:
    path = files.path / files.weights_file
    if path.suffix == ".safetensors":
        stored = SafetensorsWeights([path])
        return {name: stored.read(key) for name, key in files.copies.items()}
    loaded: Mapping[str, Any] = load_pickled(path)
    return {name: loaded[key] for name, key in files.copies.items()}


def _equal(copy: Tensor, own: Tensor) -> bool:
    """Whether a copy is the base's weight, or what it is in the type of either."""
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


def _not_the_bases(files: AdapterFiles, name: str, why: str) -> UserError:
    return UserError(
        "this adapter is more than a LoRA: it also holds {name}, which {why}",
        name=files.copies[name],
        why=why,
        merge=MERGE,
        where=f"adapter {files.path}",
        fix="Use the very base it was trained on (--model); or where that weight was trained: "
        "{merge}",
    )
