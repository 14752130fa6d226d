"""LoRA adapters: attach, save, load; which base they belong to.

What is saved is plain PEFT (`adapter_config.json`, `adapter_model.safetensors`) plus `vicuna.json`
with the template it was trained with and the base it belongs to. `adapter_files` reads that, and
what others and earlier years saved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.files import cache_dir, whole_folder
from vicuna.messages import Message, joined
from vicuna.model import adapter_fit, lora_targets
from vicuna.model.adapter_files import (
    LEAD,
    META,
    AdapterFiles,
    LoraSettings,
    locate_adapter,
    plain_config,
    read_adapter,
)
from vicuna.model.config_files import read_config

__all__ = [
    "AdapterFiles",
    "LoraSettings",
    "adapter_tensors",
    "attach",
    "attach_saved",
    "check_base",
    "check_belongs",
    "even",
    "identify",
    "locate_adapter",
    "plain_folder",
    "read_adapter",
    "save",
    "save_files",
    "write",
]

FIRST = "default"  # PEFT's own name of an adapter

# -- the base an adapter belongs to ----


def identify(folder: Path) -> dict[str, Any]:
    """What tells a base from another: its shape, and a hash of samples of its weight files.

    Llama 1 and 2 of one size have the same shape and tokenizer: only the weights differ. Sixteen
    samples of 64 KiB a file are enough to tell, and take no time at any size.
    """
    config = read_config(folder)
    keys = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = config.get("text_config", config)
    shape = {k: text.get(k) for k in keys}
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size};".encode())
        with path.open("rb") as f:
            for i in range(16):
                f.seek(size * i // 16)
                digest.update(f.read(65536))
    return {**shape, "weights": digest.hexdigest()[:32]}


def check_belongs(adapter: AdapterFiles, folder: Path, allow_other: bool) -> list[str]:
    """Refuse an adapter that does not belong to the base of a folder; what should be known, in
    words.

    Raises: UserError where shape or weights differ, or it holds weights that are not the base's.
    """
    warning = check_base(adapter, identify(folder), allow_other)
    found = adapter_fit.notes_on(adapter, folder)
    return [*([warning] if warning else []), *found]


def check_base(adapter: AdapterFiles, base: dict[str, Any], allow_other: bool) -> str | None:
    """Refuse an adapter of another base; a warning in words where that was allowed.

    Raises: UserError where shape or weights differ.
    """
    belongs = adapter.meta.get("base")
    if not belongs or not isinstance(belongs, dict):
        return None
    differs = [k for k in base if k in belongs and belongs[k] != base[k]]
    if not differs:
        return None
    name = belongs.get("name", "another base")
    where = f"adapter {adapter.path}"
    if differs != ["weights"]:
        details = joined(
            Message("{key} {there} there, {base} here", key=k, there=belongs[k], base=base[k])
            for k in differs[:3]
        )
        raise UserError(
            "this adapter belongs to a base of another shape ({name}: {details})",
            name=name,
            details=details,
            where=where,
            fix="Use --model {name}.",
        )
    if not allow_other:
        raise UserError(
            "this adapter was trained on other weights ({name})",
            name=name,
            where=where,
            fix="Use --model {name}, or --allow_other_base true if the base really is the same.",
        )
    return f"adapter {adapter.path} was trained on other weights ({name}); used as allowed"


# -- attach ----


def attach(
    model: Any, lora: LoraSettings, seed: int, base_name: str = "", name: str = FIRST
) -> Any:
    """A PEFT model with a fresh adapter in fp32 whose initial weights depend on the seed alone.

    Args:
        model: a base; or a PEFT model, which gets a further adapter that is not active yet.
        name: of the adapter among those of the model.

    Raises: UserError where no layer has one of the names, or one of those cannot have an adapter.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora_targets.find(model, lora.target),
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            peft = _injected(model, config, name)
    except ValueError as e:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
        raise UserError(
            "no layer of this model has one of these names: {target}",
            target=", ".join(lora.target),
            names=", ".join(names),
            where="lora_target",
            fix="Use all, or some of: {names}.",
        ) from e
    return _named(peft, base_name, name)


def _injected(model: Any, config: Any, name: str) -> Any:
    """A PEFT model around a base, or the same one with a further adapter."""
    from peft import PeftModel, get_peft_model

    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
        return model
    return get_peft_model(model, config, adapter_name=name)


def _named(peft: Any, base_name: str, name: str) -> Any:
    if base_name:
        peft.peft_config[name].base_model_name_or_path = base_name
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft


def _is_linear(module: nn.Module) -> bool:
    known = isinstance(module, nn.Linear) or "Linear" in type(module).__name__
    return known and hasattr(module, "out_features")


def adapter_tensors(peft: Any, name: str = FIRST) -> dict[str, Tensor]:
    """An adapter's tensors under the keys PEFT writes to disk, as contiguous CPU copies."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in sorted(state.items())}


def save(peft: Any, folder: Path, meta: dict[str, Any]) -> None:
    """Write the adapter into an existing folder. The caller makes the folder whole or absent."""
    config = peft.peft_config[FIRST].to_dict()
    config["inference_mode"] = True
    tensors = adapter_tensors(peft)
    modules = {k.rsplit(".lora_", 1)[0].removeprefix(LEAD) for k in tensors}
    config["target_modules"] = _by_ends(modules, _linear_shapes(peft))
    write(folder, config, tensors, meta)


def save_files(files: AdapterFiles, folder: Path) -> None:
    """Write an adapter that was read, as `save` would, into an existing folder."""
    tensors = {k: v.contiguous() for k, v in sorted(files.tensors.items())}
    write(folder, plain_config(files), tensors, files.meta)


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], meta: dict[str, Any]
) -> None:
    """Write tensors under PEFT's keys, and PEFT's settings, into an existing folder."""
    from safetensors.torch import save_file

    text = json.dumps(config, indent=2, default=list, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(meta, ensure_ascii=False, indent=2)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def even(files: AdapterFiles) -> AdapterFiles:
    """The same adapter with one rank and one scale for all modules, for engines that know no other:
    ranks are filled up with zeros, what a module's scale differs by is multiplied into its B."""
    if files.even:
        return files
    rank = files.lora.largest
    tensors: dict[str, Tensor] = {}
    for module, (a, b) in files.pairs().items():
        lacking, scale = rank - a.shape[0], files.lora.scale_of(module)
        a, b = torch.nn.functional.pad(a, (0, 0, 0, lacking)), b.float() * scale
        tensors[f"{LEAD}{module}.lora_A.weight"] = a.float()
        tensors[f"{LEAD}{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, lacking))
    lora = replace(files.lora, rank=rank, alpha=rank, rslora=False, ranks={}, alphas={})
    return replace(files, lora=lora, tensors=tensors)


def plain_folder(files: AdapterFiles) -> Path:
    """A folder that plain PEFT opens: the adapter's own, or one in the cache where it is older.

    For engines that read adapters by themselves.
    """
    plain = files.weights_file == "adapter_model.safetensors" and not (files.notes or files.copies)
    if plain and files.even:
        return files.path
    files = even(files)
    digest = hashlib.sha256(repr((files.lora, files.base_name)).encode())
    for key, tensor in sorted(files.tensors.items()):
        digest.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    target = cache_dir("adapters", digest.hexdigest()[:24])
    if not target.is_dir():
        with whole_folder(target) as aside:
            save_files(files, aside)
    return target


# -- what was saved ----


def attach_saved(model: Any, adapter: AdapterFiles, dropout: float = 0.0, name: str = FIRST) -> Any:
    """A PEFT model with the weights of an adapter that was read; see `attach`.

    Raises: UserError where they do not fit the base; the model is then as it was before.
    """
    from peft import LoraConfig, PeftModel

    shapes = _linear_shapes(model)
    adapter_fit.check(adapter, shapes)
    lora = adapter.lora
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=_by_ends(adapter.pairs(), shapes),
        rank_pattern=dict(sorted(lora.ranks.items())),
        alpha_pattern=dict(sorted(lora.alphas.items())),
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    fresh = not isinstance(model, PeftModel)
    try:
        peft = _named(_injected(model, config, name), adapter.base, name)
        _fill(peft, adapter, name)
    except BaseException:
        _take_back(model, fresh, name)
        raise
    return peft


def _by_ends(modules: Iterable[str], every: Iterable[str]) -> list[str]:
    """Modules as PEFT's config names them: by the ends of their names, where that says which of all
    modules they are, else by their whole names. So a run's adapter is saved alike however it began.
    """
    modules = set(modules)
    ends = {m.rsplit(".", 1)[-1] for m in modules}
    like = {m for m in every if m.rsplit(".", 1)[-1] in ends}
    return sorted(ends if like == modules else modules)


def _linear_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """(out, in) of the layers of a base that can have an adapter, by their names."""
    from peft import PeftModel

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in base.named_modules():
        inner = getattr(module, "base_layer", module)
        if ".lora_" in name or name.endswith(".base_layer"):
            continue
        if _is_linear(inner):
            shapes[name] = (int(inner.out_features), int(inner.in_features))
        elif type(inner).__name__ == "Conv1D":  # GPT-2's linear layer
            shapes[name] = (int(inner.nf), int(inner.nx))
    return shapes


def _take_back(model: Any, fresh: bool, name: str) -> None:
    """Leave a model as it was before an adapter was attached to it."""
    if not fresh:
        if name in model.peft_config:
            model.delete_adapter(name)
        return
    for parent in list(model.modules()):
        for child, module in list(parent.named_children()):
            if hasattr(module, "base_layer"):
                setattr(parent, child, module.base_layer)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _fill(peft: Any, adapter: AdapterFiles, name: str) -> None:
    """Put an adapter's weights into a PEFT model."""
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(peft, adapter.tensors, adapter_name=name)
        odd = list(result.unexpected_keys)
    except RuntimeError as e:
        raise _unfilled(adapter, str(e).strip().splitlines()[-1].strip()) from e
    odd += sorted(set(adapter_tensors(peft, name)) ^ set(adapter.tensors))
    if odd:
        raise _unfilled(adapter, Message("{name} has no counterpart in it", name=odd[0]))


def _unfilled(adapter: AdapterFiles, why: str) -> UserError:
    return UserError(
        "the adapter does not fit this base: {why}",
        why=why,
        where=f"adapter {adapter.path}",
        fix="Use the base it was trained on (adapter_config.json names it).",
    )
