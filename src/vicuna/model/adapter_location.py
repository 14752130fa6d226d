"""Where an adapter is located: a folder, a run, or a hub id. Anything else is refused by its name.

Needs no PyTorch, so that a folder can be looked through quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vicuna.errors import UserError
from vicuna.hub import must_be_hub_id, snapshot
from vicuna.messages import Message
from vicuna.model.lora_config import CONFIG
from vicuna.paths import given_path, shell_word
from vicuna.weights.headers import refuse_legacy_format

META = "vicuna.json"  # what this project notes beside an adapter or a merged base
# Today's, then those of 2023.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin")


def locate_adapter(adapter: str) -> Path:
    """The folder of an adapter: a path, a run folder that holds `adapter/`, or a hub id."""
    path = given_path(adapter)
    if (path / "adapter").is_dir() and not (path / CONFIG).exists():
        return path / "adapter"
    if path.is_dir():
        return path
    if path.is_file():
        refuse_legacy_format(path)
        refuse_file(path)
    if must_be_hub_id(adapter):
        return _from_hub(adapter)
    raise UserError(
        "no such adapter",
        where=f"adapter {adapter}",
        fix="Give a folder with adapter_config.json, a run folder, or a hub id.",
    )


def _from_hub(adapter: str) -> Path:
    patterns = ["*.json", "adapter_model.*", "adapters.safetensors", "pytorch_model.bin"]
    return snapshot(adapter, patterns, where=f"adapter {adapter}")


# -- what is no adapter ----------------------------------------------------------------------------

_PEFT = "A PEFT adapter is a folder with adapter_config.json and adapter_model.safetensors."

# The pattern of a file's name, what it is, and the way out.
_FILES = (
    ("adapters.npz", "an adapter of an early mlx-lm (npz)",
     "Save it with a newer mlx-lm (adapters.safetensors), or fuse it: mlx_lm.fuse."),
    ("*.pth.lora", "an adapter of LitGPT",
     "litgpt merge_lora CHECKPOINT, litgpt convert_from_litgpt; then use the result as --model."),
    ("lit_model*.pth", "a checkpoint of LitGPT",
     "litgpt convert_from_litgpt CHECKPOINT OUTPUT; then use the result as --model."),
    ("pytorch_lora_weights.*", "a LoRA of diffusers, for pictures", _PEFT),
    ("adapter_[0-9]*.pt", "an adapter in torchtune's own format",
     "torchtune also writes PEFT's format (adapter_model.bin with adapter_config.json); give that "
     "folder."),
    ("adapter_model.pt", "an adapter in torchtune's own format",
     "torchtune also writes PEFT's format (adapter_model.bin with adapter_config.json); give that "
     "folder."),
    ("*.ckpt", "a checkpoint of Lightning",
     "Take the adapter out of it with the program that wrote it (PEFT's save_pretrained)."),
    ("consolidated.*.pth", "a model in Meta's layout",
     "Convert it (vicuna convert --to hf), and use it as --model."),
    ("*.nemo", "a checkpoint of NeMo", "Export it to Hugging Face's layout with NeMo."),
    ("*.gguf", "a GGUF file, llama.cpp's",
     "Give the PEFT folder that a GGUF LoRA was made from; a whole model is --model FILE.gguf."),
)  # fmt: skip
# A folder inside, and what it shows.
_FOLDERS = (
    ("global_step*", "DeepSpeed's shards without the adapter",
     "Gather them: python zero_to_fp32.py . adapter_model.bin (the script lies in the folder)."),
    ("pytorch_model_fsdp*", "shards of FSDP without the adapter",
     "Gather them: accelerate merge-weights."),
)  # fmt: skip


def no_adapter_here(folder: Path) -> UserError:
    """Why a folder is no adapter, as an error."""
    refuse_model(folder)
    for pattern, what, fix in (*_FILES, *_FOLDERS):
        found = sorted(folder.glob(pattern))
        if found:
            return UserError(
                "this is {details} ({name})",
                details=what,
                name=found[0].name,
                where=str(folder),
                fix=fix,
            )
    inside = sorted(
        {p.parent for n in WEIGHTS for d in ("*", "*/*", "*/*/*") for p in folder.glob(f"{d}/{n}")},
        key=lambda p: (len(p.parts), p.stat().st_mtime),
    )
    if inside:
        names = [str(p.relative_to(folder)) for p in inside]
        word = "a checkpoint" if names[-1].startswith("checkpoint") else "one"
        return UserError(
            "no adapter weights in this folder",
            word=word,
            names=", ".join(names[-3:]),
            where=str(folder),
            fix="Name {word} in it: {names}.",
        )
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        return UserError(
            "this run has no adapter yet: it ended before its first checkpoint",
            folder=shell_word(folder),
            where=str(folder),
            fix="Go on with it: vicuna train --resume {folder}",
        )
    lone = (folder / CONFIG).is_file()
    what = (
        f"{CONFIG} is here, its weights are not"
        if lone
        else Message("no adapter weights in this folder")
    )
    return UserError(
        what,
        more=Message(" Was it copied without its large files (git lfs)?") if lone else "",
        where=str(folder),
        fix="It needs adapter_model.safetensors (or the old adapter_model.bin).{more}",
    )


def refuse_model(folder: Path) -> None:
    """Nothing where a folder may be an adapter.

    Raises: UserError where it is a whole model.
    """
    if (folder / CONFIG).is_file() or not (folder / "config.json").is_file():
        return
    if any((folder / name).is_file() for name in WEIGHTS[:2]):
        return
    weights = [p for n in ("*.safetensors", "pytorch_model*.bin") for p in folder.glob(n)]
    if weights and not folder.name.startswith("checkpoint-"):
        raise UserError(
            "this is a whole model, not an adapter",
            folder=shell_word(folder),
            where=str(folder),
            fix="Use it as --model {folder}.",
        )


def refuse_keys(keys: Sequence[str], path: Path) -> None:
    """Nothing where the names of tensors show no other program's.

    Raises: UserError that names the program.
    """
    some = " ".join(keys[:2000])
    if "lora_unet_" in some or "lora_te" in some or ".lora_down." in some:
        raise UserError(
            "this is a LoRA of kohya's scripts, for pictures or in their own format",
            where=str(path),
            fix=_PEFT,
        )
    if "lora_linear_layer" in some or some.startswith("unet."):
        raise UserError("this is a LoRA of diffusers, for pictures", where=str(path), fix=_PEFT)
    if ".lora_a" in some:
        raise UserError(
            "its tensors are named as those of mlx-lm or torchtune",
            where=str(path),
            fix="Give the folder as the program wrote it, with the names of its files.",
        )
    if "model.embed_tokens.weight" in some or "transformer.wte.weight" in some:
        raise UserError(
            "this is a whole model, not an adapter",
            parent=shell_word(path.parent),
            where=str(path),
            fix="Use its folder as --model {parent}.",
        )


def refuse_file(path: Path) -> None:
    """What a file is that was given for an adapter, which is a folder.

    Raises: UserError, always.
    """
    name = path.name
    if name in WEIGHTS or name in (CONFIG, "adapters.safetensors"):
        raise UserError(
            "an adapter is a folder", parent=path.parent, where=str(path), fix="Give {parent}."
        )
    for pattern, what, fix in _FILES:
        if path.match(pattern):
            raise UserError("this is {details}", details=what, where=str(path), fix=fix)
    if name.endswith((".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")):
        raise UserError("this is an archive", where=str(path), fix="Unpack it; give the folder.")
    if path.suffix == ".safetensors":
        from vicuna.weights.read import SafetensorsWeights

        refuse_keys(SafetensorsWeights([path]).names(), path)
    raise UserError("an adapter is a folder, this is a file", where=str(path), fix=_PEFT)
