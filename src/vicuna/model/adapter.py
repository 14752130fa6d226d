"""LoRA adapters: attach, save, load. The one place that knows how an adapter lies on disk.

What is saved is plain PEFT (`adapter_config.json`, `adapter_model.safetensors`) plus `vicuna.json`
with the template it was trained with and the base it belongs to. What is read is that, what plain
PEFT saved, and what the 2023 project saved: `adapter_model.bin` or `pytorch_model.bin`, keys with
or without `.default`, no config at all, or a config that names fewer modules than the weights hold.
The caller's files are never changed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicuna.errors import UserError
from vicuna.model.adapter_names import META, WEIGHTS

FIRST = "default"  # PEFT's own name of an adapter
_WEIGHT = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass
class LoraSettings:
    """The shape of an adapter. target: `all`, or names of linear layers."""

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target: tuple[str, ...] = ("all",)
    rslora: bool = False


@dataclass
class AdapterFiles:
    """An adapter as read from disk: PEFT's settings, tensors under PEFT's keys, and what was noted.

    meta: `vicuna.json`'s content, empty for adapters of other origin. base_name: the base as PEFT's
    config names it. notes: what had to be guessed
    or repaired, in words.
    """

    path: Path
    lora: LoraSettings
    tensors: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    base_name: str = ""

    @property
    def scale(self) -> float:
        """What B@A is multiplied by before it is added to a weight."""
        rank, alpha = self.lora.rank, self.lora.alpha
        return alpha / (rank**0.5 if self.lora.rslora else rank)

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """(A (rank, in), B (out, rank)) by the name of the base's module.

        Raises: UserError where one of a pair is missing.
        """
        sides: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self.tensors.items():
            found = _WEIGHT.match(key)
            assert found
            module = found["module"].removeprefix("base_model.model.")
            sides.setdefault(module, {})[found["side"]] = tensor
        for module, pair in sides.items():
            if len(pair) != 2:
                raise UserError(
                    f"{module} has lora_{next(iter(pair))} alone, its other half is missing",
                    where=f"adapter {self.path}",
                    fix="The file is damaged; fetch it again.",
                )
        return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


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

    Raises: UserError where no layer has one of the names.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    target: str | list[str] = "all-linear" if lora.target == ("all",) else list(lora.target)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=target,
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
    write(adapter_tensors(peft), peft.peft_config[FIRST].to_dict(), folder, meta)


def write(
    tensors: dict[str, Tensor], config: dict[str, Any], folder: Path, meta: dict[str, Any]
) -> None:
    """The same, of tensors under PEFT's keys and PEFT's settings."""
    from safetensors.torch import save_file

    config["inference_mode"] = True
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, default=list, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    text = json.dumps(meta, ensure_ascii=False, indent=2)
    (folder / META).write_text(text + "\n", encoding="utf-8")


# -- read ----


def locate_adapter(adapter: str) -> Path:
    """The folder of an adapter: a path, a run folder that holds `adapter/`, or a hub id."""
    path = Path(adapter).expanduser()
    if (path / "adapter").is_dir() and not (path / "adapter_config.json").exists():
        return path / "adapter"
    if path.is_dir():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", adapter) and not path.parent.is_dir():
        return _from_hub(adapter)
    raise UserError(
        "no such adapter",
        where=f"adapter {adapter}",
        fix="Give a folder with adapter_config.json, a run folder, or a hub id.",
    )


def _from_hub(adapter: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "adapter_model.*", "pytorch_model.bin"]
        return Path(snapshot_download(adapter, allow_patterns=wanted))
    except Exception as e:  # network, name, login: the hub library has a dozen kinds
        raise UserError(
            f"the hub has no such adapter or cannot be reached ({type(e).__name__})",
            where=f"adapter {adapter}",
            fix="Check the name; HF_ENDPOINT sets a mirror, HF_HUB_OFFLINE=1 uses the local cache.",
        ) from e


def read_adapter(adapter: str) -> AdapterFiles:
    """Read an adapter of any age.

    Raises: UserError where the folder holds none, or its weights are damaged.
    """
    folder = locate_adapter(adapter)
    notes: list[str] = []
    tensors = _read_tensors(folder, notes)
    modules, rank = _shape_of(tensors, folder)
    config: dict[str, Any] = {}
    path = folder / "adapter_config.json"
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as e:
            raise UserError(f"adapter_config.json is broken: {e}", where=str(path)) from e
    else:
        notes.append(
            f"no adapter_config.json: rank {rank} and modules read from the weights, alpha "
            f"{2 * rank} assumed (the 2023 project's rule)"
        )
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"only LoRA adapters can be used, this is {kind}", where=str(folder))
    named = config.get("target_modules") or []
    if isinstance(named, list) and named and set(modules) - set(named):
        extra = ", ".join(sorted(set(modules) - set(named)))
        notes.append(f"the config forgets modules that the weights hold: {extra}; they are used")
    if config.get("r", rank) != rank:
        notes.append(f"the config says rank {config['r']}, the weights have {rank}")
    lora = LoraSettings(
        rank=rank,
        alpha=float(config.get("lora_alpha", 2 * rank)),
        target=tuple(modules),
        rslora=bool(config.get("use_rslora", False)),
    )
    meta_path = folder / META
    meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    name = str(config.get("base_model_name_or_path") or "")
    return AdapterFiles(folder, lora, tensors, meta, notes, name)


def _read_tensors(folder: Path, notes: list[str]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    for name in WEIGHTS:
        path = folder / name
        if not path.is_file():
            continue
        try:
            if path.suffix == ".safetensors":
                loaded = load_file(str(path))
            else:
                # weights_only refuses pickles that would run code.
                loaded = torch.load(path, map_location="cpu", weights_only=True)
                notes.append(f"old format {name}")
        except Exception as e:  # damaged files raise many kinds
            raise UserError(
                f"cannot read the weights: {(str(e).splitlines() or [type(e).__name__])[0]}",
                where=str(path),
                fix="The file is damaged or not a plain list of tensors; fetch it again.",
            ) from e
        tensors = {_plain_key(k): v for k, v in loaded.items() if _WEIGHT.match(k)}
        if not tensors:
            raise UserError("no LoRA weights in this file", where=str(path))
        return tensors
    raise UserError(
        "no adapter weights in this folder",
        where=str(folder),
        fix="It needs adapter_model.safetensors (or the old adapter_model.bin).",
    )


def _plain_key(key: str) -> str:
    """The key as PEFT writes it to disk today."""
    key = re.sub(r"\.lora_([AB])\.default\.weight$", r".lora_\1.weight", key)
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"


def _shape_of(tensors: dict[str, Tensor], folder: Path) -> tuple[list[str], int]:
    """(names of the adapted modules, rank) as the weights themselves say."""
    modules: set[str] = set()
    ranks: set[int] = set()
    for key, tensor in tensors.items():
        found = _WEIGHT.match(key)
        assert found
        modules.add(found["module"].rsplit(".", 1)[-1])
        ranks.add(tensor.shape[0] if found["side"] == "A" else tensor.shape[1])
    if len(ranks) != 1:
        raise UserError(f"layers of different ranks {sorted(ranks)}", where=str(folder))
    return sorted(modules), ranks.pop()


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
