"""LoRA adapters: attach, save, load; which base they belong to.

What is saved is plain PEFT (`adapter_config.json`, `adapter_model.safetensors`) plus `vicuna.json`
with the template it was trained with and the base it belongs to. `adapter_files` reads that, and
what others and earlier years saved.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.cache import cache_dir, whole_folder
from vicuna.errors import UserError
from vicuna.model import targets
from vicuna.model.adapter_files import (
    META,
    AdapterFiles,
    LoraSettings,
    locate_adapter,
    plain_config,
    read_adapter,
)

__all__ = [
    "AdapterFiles",
    "LoraSettings",
    "adapter_tensors",
    "attach",
    "attach_saved",
    "check_base",
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
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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


def check_base(adapter: AdapterFiles, base: dict[str, Any], allow_other: bool) -> str | None:
    """Refuse an adapter of another base; a warning in words where that was allowed.

    Raises: UserError where shape or weights differ.
    """
    belongs = adapter.meta.get("base")
    if not belongs:
        return None
    differs = [k for k in base if k in belongs and belongs[k] != base[k]]
    if not differs:
        return None
    name = belongs.get("name", "another base")
    where = f"adapter {adapter.path}"
    if differs != ["weights"]:
        details = ", ".join(f"{k} {belongs[k]} there, {base[k]} here" for k in differs[:3])
        raise UserError(
            f"this adapter belongs to a base of another shape ({name}: {details})",
            where=where,
            fix=f"Use --model {name}.",
        )
    if not allow_other:
        raise UserError(
            f"this adapter was trained on other weights ({name})",
            where=where,
            fix=f"Use --model {name}, or --allow_other_base true if the base really is the same.",
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
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets.find(model, lora.target),
        use_rslora=lora.rslora,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if isinstance(model, PeftModel):
                model.add_adapter(name, config)
                peft: Any = model
            else:
                peft = get_peft_model(model, config, adapter_name=name)
    except ValueError as e:
        names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if _is_linear(m)})
        raise UserError(
            "no layer of this model has one of these names: " + ", ".join(lora.target),
            where="lora_target",
            fix=f"Use all, or some of: {', '.join(names)}.",
        ) from e
    if base_name:
        peft.peft_config[name].base_model_name_or_path = base_name
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or "Linear" in type(module).__name__


def adapter_tensors(peft: Any, name: str = FIRST) -> dict[str, Tensor]:
    """An adapter's tensors under the keys PEFT writes to disk, as contiguous CPU copies."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in sorted(state.items())}


def save(peft: Any, folder: Path, meta: dict[str, Any]) -> None:
    """Write the adapter into an existing folder. The caller makes the folder whole or absent."""
    config = peft.peft_config[FIRST].to_dict()
    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    write(folder, config, adapter_tensors(peft), meta)


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


def plain_folder(files: AdapterFiles) -> Path:
    """A folder that plain PEFT opens: the adapter's own, or one in the cache where it is older.

    For engines that read adapters by themselves.
    """
    if files.weights_file == "adapter_model.safetensors" and not files.notes:
        return files.path
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

    Raises: UserError where they do not fit the base; a PEFT model is then as it was before.
    """
    lora = LoraSettings(**{**adapter.lora.__dict__, "dropout": dropout})
    belongs = str(adapter.meta.get("base", {}).get("name", ""))
    peft = attach(model, lora, seed=0, base_name=belongs, name=name)
    try:
        _fill(peft, adapter, name)
    except UserError:
        if len(peft.peft_config) > 1:
            peft.delete_adapter(name)
        raise
    return peft


def _fill(peft: Any, adapter: AdapterFiles, name: str) -> None:
    """Put an adapter's weights into a PEFT model."""
    from peft import set_peft_model_state_dict

    try:
        result: Any = set_peft_model_state_dict(peft, adapter.tensors, adapter_name=name)
        unused = list(result.unexpected_keys)
    except RuntimeError as e:
        raise UserError(
            f"the adapter does not fit this base: {str(e).strip().splitlines()[-1].strip()}",
            where=f"adapter {adapter.path}",
            fix="Use the base it was trained on (adapter_config.json names it).",
        ) from e
    wanted = set(adapter_tensors(peft, name))
    if unused or wanted - set(adapter.tensors):
        odd = (unused or sorted(wanted - set(adapter.tensors)))[0]
        raise UserError(
            f"the adapter does not fit this base: {odd} has no counterpart",
            where=f"adapter {adapter.path}",
            fix="Use the base it was trained on (adapter_config.json names it).",
        )
