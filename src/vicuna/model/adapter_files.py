"""An adapter as it lies on disk, read: what we save, what plain PEFT saved, what 2023 saved.

`adapter_model.safetensors`, `adapter_model.bin` or `pytorch_model.bin` (in a checkpoint, beside the
optimiser's files); keys with or without `.default`, under any wrapper; no config at all, or one
that names fewer modules than the weights hold. The caller's files are never changed.

What is more than a LoRA (`lora_config`; DoRA, trained embeddings, biases) is refused: left out in
silence, the answers would be those of another adapter. Copies of the base's weights, which PEFT
writes beside a LoRA of the output matrix, are compared with the base (`adapter_fit`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.errors import UserError
from vicuna.json_yaml import read_json
from vicuna.messages import Message
from vicuna.model import adapter_location, adapter_mlx, lora_config
from vicuna.model.adapter_location import META, WEIGHTS, locate_adapter
from vicuna.model.lora_config import CONFIG
from vicuna.weights.read import SafetensorsWeights
from vicuna.weights.torch_files import load_pickled

_OF_TRAINING = ".lora_velora_"  # part of no answer
LEAD = "base_model.model."
_WEIGHT = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# Keys of an adapter that is more than a LoRA.
_MORE = re.compile(r"lora_magnitude_vector|lora_embedding_[AB]|modules_to_save|lora_[AB]\.")


@dataclass
class LoraSettings:
    """The shape of an adapter. target: `all`, or names of linear layers.

    ranks, alphas: those of modules that differ, by the module's full name.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target: tuple[str, ...] = ("all",)
    rslora: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The highest rank of any module."""
        return max([self.rank, *self.ranks.values()])

    def scale_of(self, module: str) -> float:
        """What B@A of a module is multiplied by before it is added to its weight."""
        rank, alpha = self.ranks.get(module, self.rank), self.alphas.get(module, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


@dataclass
class AdapterFiles:
    """An adapter as read from disk: PEFT's settings, tensors under PEFT's keys, and what was noted.

    meta: `vicuna.json`'s content, empty for adapters of other origin. notes: what had to be guessed
    or repaired, in words. base_name: the base as PEFT's config names it. weights_file: the file the
    tensors came from. alpha_from: where alpha was found, "" where it was assumed. config: PEFT's,
    as it was read. copies: keys in the file of what should be the base's own, by the base's name.
    """

    path: Path
    lora: LoraSettings
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    base_name: str = ""
    weights_file: str = ""
    alpha_from: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The base as the adapter names it, "" where it does not."""
        return str((self.meta.get("base") or {}).get("name") or self.base_name)

    @property
    def scale(self) -> float:
        """What B@A is multiplied by, but where a module has a rank or an alpha of its own."""
        return self.lora.scale_of("")

    @property
    def even(self) -> bool:
        """Whether all modules have one rank and one alpha."""
        return not (self.lora.ranks or self.lora.alphas)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A (rank, in), B (out, rank)) by the name of the base's module.

        Raises: UserError where one of a pair is missing.
        """
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            found = _WEIGHT.match(key)
            assert found
            module = found["module"].removeprefix(LEAD)
            sides.setdefault(module, {})[found["side"]] = tensor
        for module, pair in sides.items():
            if len(pair) != 2:
                raise UserError(
                    "{module} has lora_{pair} alone, its other half is missing",
                    module=module,
                    pair=next(iter(pair)),
                    where=f"adapter {self.path}",
                    fix="The file is damaged; fetch it again.",
                )
        return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}

    def silent(self) -> list[str]:
        """Modules to which it adds nothing: their B, or their A, is all zero."""
        return [m for m, (a, b) in self.pairs().items() if not (a.any() and b.any())]

    def not_finite(self) -> list[str]:
        """Keys of tensors with values that are no numbers."""
        return [k for k, t in self.tensors.items() if not torch.isfinite(t).all()]


# -- reading ----


def read_adapter(adapter: str, checked: bool = True) -> AdapterFiles:
    """Read an adapter of any age.

    Args:
        checked: False reads one with values that are no numbers, too: to look at it.

    Raises: UserError where the folder holds none, its weights are damaged, or it is more than a
        LoRA.
    """
    folder = locate_adapter(adapter)
    notes: list[str] = []
    if (folder / adapter_mlx.WEIGHTS).is_file() and not (folder / WEIGHTS[0]).is_file():
        tensors, config = adapter_mlx.read(folder, LEAD)
        copies: dict[str, str] = {}
        file, origin = adapter_mlx.WEIGHTS, CONFIG
        notes.append("written by mlx-lm")
    else:
        own = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
        lora_config.check(own, folder / CONFIG, notes)
        tensors, copies, file = _read_tensors(folder, notes)
        config, origin = (own, CONFIG) if own else _config_above(folder, tensors, notes)
        _check_copies(copies, config, folder)
    _drop_untargeted(tensors, config, folder, notes)
    lora, origin = _shape(tensors, config, origin, folder, notes)
    meta = read_json(folder / META) if (folder / META).is_file() else {}
    if not isinstance(meta.get("base") or {}, dict):
        raise UserError(
            "{meta} is broken: its base is no table", meta=META, where=str(folder / META)
        )
    name = str(config.get("base_model_name_or_path") or "")
    files = AdapterFiles(folder, lora, tensors, meta, notes, name, file, origin, config, copies)
    files.pairs()
    if checked:
        _check_values(files)
    return files


def _read_tensors(folder: Path, notes: list[str]) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """(LoRA tensors under PEFT's keys, copies of the base's, the file they came from)."""
    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        if name == WEIGHTS[2]:
            adapter_location.refuse_model(folder)
        keys: list[str]
        loaded: Mapping[str, Tensor]
        if path.suffix == ".safetensors":
            weights = SafetensorsWeights([path])
            keys = weights.names()
            loaded = {key: weights.read(key) for key in keys if _WEIGHT.match(key)}
        else:
            loaded = load_pickled(path)
            keys = list(loaded)
            notes.append(Message("old format {name}", name=name))
        tensors = {_plain_key(k): v.contiguous() for k, v in loaded.items() if _WEIGHT.match(k)}
        if not tensors:
            adapter_location.refuse_keys(keys, path)
            raise UserError("no LoRA weights in this file", where=str(path), fix=_made_empty(path))
        return tensors, _check_rest([k for k in keys if not _WEIGHT.match(k)], path, notes), name
    raise adapter_location.no_adapter_here(folder)


def _made_empty(path: Path) -> str:
    if path.stat().st_size > 4096:
        return "It is no LoRA adapter."
    return "Saved without its weights (a known fault of 2023); take an earlier checkpoint."


def _plain_key(key: str) -> str:
    """The key as PEFT writes it to disk today, whatever the model was wrapped in."""
    key = re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", key)
    at = key.find(LEAD)
    return key[at:] if at >= 0 else LEAD + key


def _check_rest(keys: list[str], path: Path, notes: list[str]) -> dict[str, str]:
    """Refuse what was trained beside the LoRA; what may be the base's own, to be compared with it.

    The copy of a whole base in a trainer's checkpoint is left alone.
    """
    if any(_OF_TRAINING in k for k in keys):
        keys = [k for k in keys if _OF_TRAINING not in k]
        notes.append("what VeLoRA kept for its gradients is not used")
    if more := [k for k in keys if _MORE.search(k)]:
        raise UserError(
            "this adapter is more than a LoRA: it also holds {name}{more}",
            name=more[0],
            more=Message(" and {count} more", count=len(more) - 1) if len(more) > 1 else "",
            merge=lora_config.MERGE,
            where=str(path),
            fix="Without them its answers would be others. {merge}",
        )
    if path.name == WEIGHTS[2]:
        if keys:
            notes.append(
                Message(
                    "{name} also holds {count} tensors of the base, not used",
                    name=path.name,
                    count=len(keys),
                )
            )
        return {}
    return {_plain_key(k).removeprefix(LEAD).replace(".base_layer.", "."): k for k in keys}


def _check_copies(copies: Mapping[str, str], config: Mapping[str, Any], folder: Path) -> None:
    """Refuse what the config says that it was trained."""
    biases = [name for name in copies if name.endswith(".bias")]
    kind = config.get("bias") or "none"
    if biases and kind != "none":
        raise UserError(
            "this adapter is more than a LoRA: bias is {type}, and it holds {name}{more}",
            type=kind,
            name=biases[0],
            more=Message(" and {count} more", count=len(biases) - 1) if len(biases) > 1 else "",
            where=str(folder / CONFIG),
            fix=lora_config.MERGE,
        )


def _drop_untargeted(
    tensors: dict[str, Tensor], config: Mapping[str, Any], folder: Path, notes: list[str]
) -> None:
    """What the config leaves out PEFT does not use, though the weights hold it."""
    of = {key: _module(key) for key in tensors}
    modules = sorted(set(of.values()))
    left = lora_config.untargeted(config, modules, folder / CONFIG)
    if not left:
        return
    if len(left) == len(modules):
        raise UserError(
            "target_modules, exclude_modules or layers_to_transform leave out every layer that "
            "the weights hold",
            where=str(folder / CONFIG),
            fix="The config is not that of these weights; fetch both again.",
        )
    for key, module in of.items():
        if module in left:
            del tensors[key]
    notes.append(
        Message(
            "the config leaves out {count} of {total} matrices that the weights hold; as "
            "in PEFT, they are not used",
            count=len(left),
            total=len(modules),
        )
    )


def _module(key: str) -> str:
    """The base's module that a LoRA tensor belongs to."""
    found = _WEIGHT.match(key)
    assert found
    return found["module"].removeprefix(LEAD)


def _shape(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    origin: str,
    folder: Path,
    notes: list[str],
) -> tuple[LoraSettings, str]:
    """(ranks as the weights have them and alphas as the config says, where alpha was found)."""
    ranks = _ranks(tensors, folder)
    modules = list(ranks)
    usual = Counter(ranks.values()).most_common(1)[0][0]
    rank = config["r"] if config.get("r") in ranks.values() else usual
    own_ranks = {m: r for m, r in ranks.items() if r != rank}
    where = folder / CONFIG
    said = lora_config.patterned(config.get("rank_pattern"), modules, where, "rank_pattern")
    _compare_ranks(config, said, ranks, notes)
    alpha = config.get("lora_alpha")
    if alpha is None:
        origin = ""
        notes.append(
            Message(
                "{missing}: rank {rank} and modules read from the weights, alpha {alpha} "
                "assumed (the 2023 project's rule)",
                missing=Message("no {file}", file=CONFIG)
                if not config
                else Message("no lora_alpha in {file}", file=CONFIG),
                rank=rank,
                alpha=2 * rank,
            )
        )
    alpha = _number(2 * rank if alpha is None else alpha, "lora_alpha", folder)
    alphas = lora_config.patterned(config.get("alpha_pattern"), modules, where, "alpha_pattern")
    own_alphas = {m: _number(a, "alpha_pattern", folder) for m, a in alphas.items()}
    ends = {m.rsplit(".", 1)[-1] for m in modules}
    _note_forgotten(config, ends, notes)
    if config.get("ensure_weight_tying") and ends & {"lm_head", "embed_tokens"}:
        raise UserError(
            "this adapter is more than a LoRA: ensure_weight_tying is true, so that its lm_head "
            "is that of the embedding, which is not supported",
            where=str(where),
            fix=lora_config.MERGE,
        )
    lora = LoraSettings(
        rank=rank,
        alpha=alpha,
        target=tuple(sorted(ends)),
        rslora=bool(config.get("use_rslora", False)),
        ranks=own_ranks,
        alphas={m: a for m, a in own_alphas.items() if a != alpha},
    )
    return lora, origin


def _ranks(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, int]:
    """The rank of each module, as its own weights say."""
    ranks: dict[str, int] = {}
    for key, tensor in sorted(tensors.items()):
        found = _WEIGHT.match(key)
        assert found
        if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
            raise UserError(
                "{key} is no matrix of numbers: {shape} {dtype}",
                key=key,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                where=str(folder),
            )
        rank = tensor.shape[0] if found["side"] == "A" else tensor.shape[1]
        if ranks.setdefault(_module(key), rank) != rank:
            raise UserError(
                "the two halves of {module} have ranks {rank_a} and {rank_b}",
                module=_module(key),
                rank_a=ranks[_module(key)],
                rank_b=rank,
                where=str(folder),
                fix="The file is damaged; fetch it again.",
            )
    return ranks


def _compare_ranks(
    config: Mapping[str, Any],
    said: Mapping[str, Any],
    ranks: Mapping[str, int],
    notes: list[str],
) -> None:
    """Note where config and weights differ; the weights count."""
    wrong = {m: r for m, r in ranks.items() if said.get(m, config.get("r", r)) != r}
    if not wrong:
        return
    first = next(iter(wrong))
    shown = said.get(first, config.get("r"))
    if len(wrong) == len(ranks) and len(set(wrong.values())) == 1 and not said:
        notes.append(
            Message(
                "the config says rank {value}, the weights have {rank}",
                value=shown,
                rank=ranks[first],
            )
        )
        return
    notes.append(
        Message(
            "the config says rank {value} for {first}, the weights have {rank}",
            value=shown,
            first=first,
            rank=ranks[first],
        )
        + (Message("; so it is with {count} more", count=len(wrong) - 1) if len(wrong) > 1 else "")
    )


def _note_forgotten(config: Mapping[str, Any], ends: set[str], notes: list[str]) -> None:
    named = config.get("target_modules") or []
    if not isinstance(named, list) or not named:
        return
    if extra := sorted(ends - {str(n).rsplit(".", 1)[-1] for n in named}):
        notes.append(
            Message(
                "the config forgets modules that the weights hold: {extra}; they are used",
                extra=", ".join(extra),
            )
        )


def _config_above(
    folder: Path, tensors: Mapping[str, Tensor], notes: list[str]
) -> tuple[dict[str, Any], str]:
    """(PEFT's config, where it lies) of a checkpoint without one: its run's, if of this rank."""
    above = folder.resolve().parent / CONFIG
    if folder.name.startswith("checkpoint-") and above.is_file():
        config = read_json(above)
        if {config.get("r")} == set(_ranks(tensors, folder).values()):
            lora_config.check(config, above, notes)
            notes.append(
                Message("no {config} here; the run's, one folder up, was read", config=CONFIG)
            )
            return config, str(above)
    return {}, ""


def _number(value: Any, key: str, folder: Path) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not number > 0 or number == float("inf"):
        raise UserError(
            "{key} is {value!r}, but must be above 0",
            key=key,
            value=value,
            where=str(folder / CONFIG),
        )
    return number


def _check_values(files: AdapterFiles) -> None:
    bad = files.not_finite()
    if bad:
        raise UserError(
            "{bad} holds values that are no numbers{more}",
            bad=bad[0],
            more=Message(", and so do {count} more tensors", count=len(bad) - 1)
            if len(bad) > 1
            else "",
            where=f"adapter {files.path}",
            fix="The training overflowed or the file is damaged; take an earlier checkpoint.",
        )
    if len(files.silent()) == len(files.pairs()):
        files.notes.append("every B is zero: this adapter adds nothing to its base")


def plain_config(files: AdapterFiles) -> dict[str, Any]:
    """PEFT's config of an adapter that was read, as PEFT writes it today."""
    from peft import LoraConfig

    lora = files.lora
    modules = files.pairs()
    by_end = all(end in lora.target for end in (m.rsplit(".", 1)[-1] for m in modules))
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=sorted(lora.target if by_end and _everywhere(modules) else modules),
        rank_pattern=dict(sorted(lora.ranks.items())),
        alpha_pattern=dict(sorted(lora.alphas.items())),
        use_rslora=lora.rslora,
        fan_in_fan_out=bool(files.config.get("fan_in_fan_out")),
        task_type="CAUSAL_LM",
        base_model_name_or_path=files.base or None,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return dict(config)


def _everywhere(modules: Iterable[str]) -> bool:
    """Whether each kind of module has the same layers, from the first on without a gap: then its
    name says all. (How many layers the base has is not known here.)"""
    numbers: dict[str, set[int]] = {}
    for module in modules:
        found = re.search(r"\.(\d+)\.", module)
        kind = re.sub(r"\.\d+\.", ".*.", module, count=1)
        numbers.setdefault(kind, set()).update([int(found[1])] if found else [])
    layers = [n for n in numbers.values() if n]
    return all(n == layers[0] and n == set(range(len(n))) for n in layers)
