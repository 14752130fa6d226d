"""Meta's own layout of Llama 1, 2 and 3: `consolidated.NN.pth` and `params.json`.

Its files are the shares of as many GPUs: a matrix is cut along its rows or its columns, whichever
its layer is parallel in. Queries and keys have each rotated pair of a head side by side, Hugging
Face has them half a head apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicuna.convert.pth import PthWriter
from vicuna.errors import UserError
from vicuna.export.gguf_names import rope_settings
from vicuna.json_yaml import read_json, write_json
from vicuna.messages import Message
from vicuna.weights.read import ALL, Weights
from vicuna.weights.torch_files import load_pickled

PARAMS = "params.json"
HF_CONFIG = "hf_config.json"  # config.json of the model that was written in this layout
_FILE = "consolidated.{:02d}.pth"
# Meta's name, Hugging Face's, the dimension it is cut along (None: every file has all of it).
_TOP: tuple[tuple[str, str, int | None], ...] = (
    ("tok_embeddings.weight", "model.embed_tokens.weight", 1),
    ("norm.weight", "model.norm.weight", None),
    ("output.weight", "lm_head.weight", 0),
)
_LAYER: tuple[tuple[str, str, int | None], ...] = (
    ("attention.wq.weight", "self_attn.q_proj.weight", 0),
    ("attention.wk.weight", "self_attn.k_proj.weight", 0),
    ("attention.wv.weight", "self_attn.v_proj.weight", 0),
    ("attention.wo.weight", "self_attn.o_proj.weight", 1),
    ("feed_forward.w1.weight", "mlp.gate_proj.weight", 0),
    ("feed_forward.w2.weight", "mlp.down_proj.weight", 1),
    ("feed_forward.w3.weight", "mlp.up_proj.weight", 0),
    ("attention_norm.weight", "input_layernorm.weight", None),
    ("ffn_norm.weight", "post_attention_layernorm.weight", None),
)
_BUFFER = re.compile(r"rope\.freqs$|inv_freq$")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Llama 3's embedding is cut along its tokens; its vocabulary is told by its size.
_LLAMA3_TOKENS = 128_000
# What Meta's code has as constants (Llama 3.1), and the context of each family.
_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_NAMED_SCALING = {"factor": "rope_scaling_factor", "high_freq_factor": "high_freq_factor"}
_ORIGINAL_CONTEXT = 8192


def is_meta(folder: Path) -> bool:
    """Whether a folder holds a model in Meta's layout."""
    return (folder / PARAMS).is_file() or any(folder.glob("consolidated.*.pth"))


@dataclass(frozen=True)
class _Place:
    """A tensor in both layouts."""

    meta: str
    hf: str
    dim: int | None

    @property
    def rotated(self) -> str:
        """`q` or `k` where pairs are rotated, else nothing."""
        return {"wq": "q", "wk": "k"}.get(self.meta.rsplit(".", 2)[-2], "")


def _places(layers: int, vocabulary: int) -> Iterator[_Place]:
    for meta, hf, dim in _TOP:
        by_tokens = meta.startswith("tok_") and vocabulary >= _LLAMA3_TOKENS
        yield _Place(meta, hf, 0 if by_tokens else dim)
    for n in range(layers):
        for meta, hf, dim in _LAYER:
            yield _Place(f"layers.{n}.{meta}", f"model.layers.{n}.{hf}", dim)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, in) from Hugging Face's order into Meta's."""
    return rows.view(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


def halve(rows: Tensor, heads: int) -> Tensor:
    """The other way."""
    return rows.view(heads, -1, 2, rows.shape[1]).transpose(1, 2).reshape(rows.shape).contiguous()


# -- settings ----


def config_of(params: dict[str, Any], weights: MetaWeights, context: int = 0) -> dict[str, Any]:
    """config.json of a model in Meta's layout; what params.json leaves out is in the weights.

    Args:
        context: positions it was made for; 0: those of its family.
    """
    layers, heads = int(params["n_layers"]), int(params["n_heads"])
    vocabulary = weights.shape(_EMBEDDING)[0]
    third = vocabulary >= _LLAMA3_TOKENS
    eps = float(params["norm_eps"])
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(params.get("rope_theta", 10000.0)),
    }
    family = 8192 if third else 4096 if eps > 5e-6 else 2048
    if params.get("use_scaled_rope"):
        given = {k: float(params.get(name, _SCALING[k])) for k, name in _NAMED_SCALING.items()}
        rope |= {**_SCALING, **given, "rope_type": "llama3"}
        rope["original_max_position_embeddings"] = _ORIGINAL_CONTEXT
        family = 131072
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": int(params["dim"]),
        "intermediate_size": weights.shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(params.get("n_kv_heads") or heads),
        "vocab_size": vocabulary,
        "max_position_embeddings": context or family,
        "rms_norm_eps": eps,
        "rope_parameters": rope,
        "tie_word_embeddings": weights.tied,
        "hidden_act": "silu",
        "bos_token_id": 128000 if third else 1,
        "eos_token_id": 128001 if third else 2,
        "dtype": str(weights.dtype(_EMBEDDING)).removeprefix("torch."),
    }


def params_of(config: dict[str, Any], where: str) -> dict[str, Any]:
    """params.json of a model in Hugging Face's layout.

    Raises: UserError where Meta's code has no place for what the config says.
    """
    _check_config(config, where)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    kv_heads = int(config.get("num_key_value_heads") or heads)
    rope = rope_settings(config)
    params: dict[str, Any] = {
        "dim": hidden,
        "n_layers": int(config["num_hidden_layers"]),
        "n_heads": heads,
        "norm_eps": float(config.get("rms_norm_eps", 1e-6)),
        "vocab_size": int(config["vocab_size"]),
        **_ffn(hidden, int(config["intermediate_size"])),
    }
    if kv_heads != heads:
        params["n_kv_heads"] = kv_heads
    if rope["rope_theta"] != 10000.0:
        params["rope_theta"] = float(rope["rope_theta"])
    if rope["rope_type"] == "llama3":
        params["use_scaled_rope"] = True
        for key, name in _NAMED_SCALING.items():
            if float(rope[key]) != _SCALING[key]:
                params[name] = float(rope[key])
    return params


def _check_config(config: dict[str, Any], where: str) -> None:
    rope = rope_settings(config)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    faults = []
    if config.get("model_type") != "llama":
        faults.append(f"models of type {config.get('model_type')}")
    if config.get("attention_bias") or config.get("mlp_bias"):
        faults.append("biases")
    if int(config.get("head_dim") or hidden // heads) * heads != hidden:
        faults.append(f"heads of {config['head_dim']} (it has {hidden} / {heads})")
    if rope["rope_type"] not in ("default", "llama3"):
        faults.append(f"positions scaled by {rope['rope_type']!r}")
    elif rope["rope_type"] == "llama3" and (
        float(rope["low_freq_factor"]) != 1.0
        or int(rope["original_max_position_embeddings"]) != _ORIGINAL_CONTEXT
    ):
        faults.append("positions scaled otherwise than Llama 3's")
    if faults:
        raise UserError(
            "Meta's format does not support {faults}",
            faults=" and ".join(faults),
            where=where,
            fix="It supports Llama 1, 2 and 3 and models of the same architecture.",
        )


def _ffn(hidden: int, wanted: int) -> dict[str, Any]:
    """What gives the width of the feed-forward layers by Meta's rule: a share of 4 * hidden,
    times ffn_dim_multiplier, rounded up to multiple_of."""
    base = int(2 * 4 * hidden / 3)
    for multiple in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        if multiple * math.ceil(base / multiple) == wanted:
            return {"multiple_of": multiple}
    multiple = next(m for m in (4096, 1024, 256, 64, 16, 4, 1) if wanted % m == 0)
    for digits in range(1, 17):
        factor = round((wanted - multiple / 2 + 0.5) / base, digits)
        if multiple * math.ceil(int(factor * base) / multiple) == wanted:
            return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    raise ValueError(f"no rule gives {wanted} for {hidden}")  # the last digits always do


# -- reading ----


class MetaWeights:
    """A model in Meta's layout as `Weights` under Hugging Face's names.

    Raises: UserError where a file is missing, damaged, would run code, or does not fit the others.
    """

    by_rows = False  # where each row lies depends on the cut and on the heads

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.params = read_json(folder / PARAMS)
        for key in ("dim", "n_layers", "n_heads", "norm_eps"):
            if not isinstance(self.params.get(key), (int, float)) or self.params[key] <= 0:
                raise UserError(
                    "{key} is missing or no number", key=key, where=str(folder / PARAMS)
                )
        files = sorted(folder.glob("consolidated.*.pth"))
        if not files or [f.name for f in files] != [_FILE.format(i) for i in range(len(files))]:
            raise UserError(
                "files of the weights are missing: expected consolidated.00.pth and on, found "
                "{files}",
                files=", ".join(f.name for f in files) or Message("none"),
                where=str(folder),
                fix="Download the missing ones again.",
            )
        self.files = files
        self._shards = [load_pickled(f) for f in files]
        self._heads = int(self.params["n_heads"])
        self._places = self._located()
        self.tied = _HEAD not in self._places or self._same(_HEAD, _EMBEDDING)
        if self.tied:
            self._places.pop(_HEAD, None)

    def _located(self) -> dict[str, _Place]:
        first = self._shards[0]
        every = _places(int(self.params["n_layers"]), 0)
        places = {p.hf: p for p in every if p.meta in first or p.hf != _HEAD}
        lacking = [
            (p.meta, f.name)
            for p in places.values()
            for f, shard in zip(self.files, self._shards)
            if p.meta not in shard
        ]
        if lacking:
            raise UserError(
                "{file} lacks {name}{more}",
                file=lacking[0][1],
                name=lacking[0][0],
                more=Message(" (and {count} more are missing)", count=len(lacking) - 1)
                if len(lacking) > 1
                else "",
                where=str(self._folder),
                fix="params.json and the weights do not belong together, or a file is damaged.",
            )
        known = {p.meta for p in places.values()}
        strange = sorted(k for k in first if k not in known and not _BUFFER.search(k))
        if strange:
            raise UserError(
                "{name} has no place in a Llama model of {n_layers} layers",
                name=strange[0],
                n_layers=self.params["n_layers"],
                where=str(self.files[0]),
            )
        # Which way an embedding is cut shows in its width.
        if len(self.files) > 1 and first["tok_embeddings.weight"].shape[-1] == self.params["dim"]:
            places[_EMBEDDING] = _Place("tok_embeddings.weight", _EMBEDDING, 0)
        self._check_shapes(places)
        return places

    def _check_shapes(self, places: dict[str, _Place]) -> None:
        for place in places.values():
            shapes = {tuple(s[place.meta].shape) for s in self._shards}
            types = {s[place.meta].dtype for s in self._shards}
            if len(shapes) > 1 or len(types) > 1:
                raise UserError(
                    "{meta} differs between the files: {shapes}",
                    meta=place.meta,
                    shapes=sorted(map(str, shapes | types)),
                    where=str(self._folder),
                )
            if len(next(iter(shapes))) != (1 if place.dim is None else 2):
                raise UserError(
                    "{meta} has the shape {shapes}",
                    meta=place.meta,
                    shapes=next(iter(shapes)),
                    where=str(self._folder),
                )
        dim = int(self.params["dim"])
        for hf, axis in ((_EMBEDDING, 1), ("model.layers.0.self_attn.q_proj.weight", 0)):
            if (found := self._joined(places[hf])[axis]) != dim:
                raise UserError(
                    "params.json says dim {dim}, {meta} says {value}",
                    dim=dim,
                    meta=places[hf].meta,
                    value=found,
                    where=str(self._folder),
                )

    def _joined(self, place: _Place) -> tuple[int, ...]:
        shape = list(self._shards[0][place.meta].shape)
        if place.dim is not None:
            shape[place.dim] *= len(self._shards)
        return tuple(shape)

    def _same(self, one: str, other: str) -> bool:
        return self.shape(one) == self.shape(other) and torch.equal(
            self.read(one), self.read(other)
        )

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._joined(self._places[name])

    def dtype(self, name: str) -> torch.dtype:
        return self._shards[0][self._places[name].meta].dtype

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        return self._whole(self._places[name])[rows]

    def _whole(self, place: _Place) -> Tensor:
        parts = [s[place.meta] for s in self._shards]
        if place.dim is None:
            if any(not torch.equal(parts[0], p) for p in parts[1:]):
                raise UserError(
                    "{meta} differs between the files", meta=place.meta, where=str(self._folder)
                )
            return parts[0].clone()
        whole = torch.cat(parts, place.dim) if len(parts) > 1 else parts[0].clone()
        if not place.rotated:
            return whole
        heads = self._heads
        if place.rotated == "k":
            heads = int(self.params.get("n_kv_heads") or heads)
        if whole.shape[0] % (2 * heads):
            raise UserError(
                "{meta} has {size} rows, which {heads} heads cannot share",
                meta=place.meta,
                size=whole.shape[0],
                heads=heads,
                where=str(self._folder),
            )
        return halve(whole, heads)

    @property
    def buffers(self) -> list[str]:
        """What the files hold beside weights: tables that every program computes by itself."""
        return sorted(k for k in self._shards[0] if _BUFFER.search(k))


# -- writing ----


def write_meta(
    folder: Path, config: dict[str, Any], weights: Weights, shards: int, where: str
) -> list[str]:
    """Write a model in Meta's layout into a folder, a tensor at a time; returns what to know.

    Raises: UserError where the layout has no place for the model, or it cannot be cut so.
    """
    params = params_of(config, where)
    heads, kv_heads = int(params["n_heads"]), int(params.get("n_kv_heads") or params["n_heads"])
    held = set(weights.names())
    places = list(_places(params["n_layers"], params["vocab_size"]))
    sources = {p.meta: p.hf if p.hf in held or p.hf != _HEAD else _EMBEDDING for p in places}
    _check_names(set(sources.values()), held, where)
    table = [_share(p, weights, sources[p.meta], shards, where) for p in places]
    with ExitStack() as stack:
        files = [
            stack.enter_context(PthWriter(folder / _FILE.format(i), table)) for i in range(shards)
        ]
        for place in places:
            tensor = weights.read(sources[place.meta])
            if place.rotated:
                tensor = interleave(tensor, heads if place.rotated == "q" else kv_heads)
            parts = [tensor] * shards if place.dim is None else tensor.chunk(shards, place.dim)
            for file, part in zip(files, parts):
                file.write(place.meta, part)
    write_json(folder / PARAMS, params)
    if heads % shards or kv_heads % shards:
        return [
            f"{heads} heads ({kv_heads} of keys and values) cannot be shared by {shards} GPUs: "
            "this project reads the files, Meta's own code cannot run them"
        ]
    return []


def _check_names(wanted: set[str], held: set[str], where: str) -> None:
    lacking = sorted(wanted - held)
    strange = sorted(n for n in held - wanted - {_HEAD} if not _BUFFER.search(n))
    if lacking or strange:
        what = f"{lacking[0]} is missing" if lacking else f"Meta's layout has no {strange[0]}"
        raise UserError(what, where=where, fix="It supports plain models of the Llama family.")


def _share(
    place: _Place, weights: Weights, source: str, shards: int, where: str
) -> tuple[str, torch.dtype, tuple[int, ...]]:
    """(name, type, shape) of one file's part of a tensor."""
    shape = list(weights.shape(source))
    if place.dim is not None:
        if shape[place.dim] % shards:
            raise UserError(
                "{source} {shape} cannot be cut into {shards} along dimension {dim}",
                source=source,
                shape=tuple(shape),
                shards=shards,
                dim=place.dim,
                where=where,
                fix="Choose fewer --num_shards.",
            )
        shape[place.dim] //= shards
    return place.meta, weights.dtype(source), tuple(shape)


def _count(config: dict[str, Any], key: str) -> int:
    """A size that a config.json names. Raises: UserError if it does not, or names no number."""
    if not isinstance(config.get(key), int):
        raise UserError("config.json does not say {key}", key=key, fix="Download the model again.")
    return int(config[key])
