"""llama.cpp's C interface, as the wheel `xllamacpp` carries it.

That package's own Python interface is a server: it has no batches of several sequences and no
logits. But the shared object inside it exports the C interface of llama.cpp (`llama.h`), which has
both, and LoRA adapters beside the base. It is called here through ctypes; nothing is built.

Structures of `llama.h` change from version to version, so the wheel's version is pinned
(the extra `cpp`), and the layout is checked against known defaults before anything is passed.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import os
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.llamacpp import build
from vicuna.llamacpp.build import VERSION
from vicuna.system_errors import install_extra

# Names a libllama of the same version that was built otherwise; "wheel": the wheel's in any case.
OWN_BUILD = "VICUNA_LIBLLAMA"
WHEEL = "wheel"
INSTALL = install_extra("cpp")
TYPES = {"f32": 0, "f16": 1, "q8_0": 8}  # ggml_type, of the cache
# On the CPU its flash attention sums in 16 bits, which shows beside a cache of 32; a quantised
# cache works with no other. For f16 llama.cpp decides.
_FLASH_AUTO = -1
FLASH = {"f32": 0, "f16": _FLASH_AUTO, "q8_0": 1}
_LOG_ERROR = 4  # ggml_log_level

Abort = c.CFUNCTYPE(c.c_bool, c.c_void_p)
_Log = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
# The interface passes structures by value. Room behind the last field keeps a newer, longer one
# from being written past its end.
_SPARE = ("spare", c.c_char * 256)


class ModelParams(c.Structure):
    """`llama_model_params`."""

    _fields_ = [
        ("devices", c.c_void_p),
        ("tensor_buft_overrides", c.c_void_p),
        ("n_gpu_layers", c.c_int32),
        ("split_mode", c.c_int),
        ("load_mode", c.c_int),
        ("lazy_mode", c.c_int),
        ("main_gpu", c.c_int32),
        ("tensor_split", c.c_void_p),
        ("progress_callback", c.c_void_p),
        ("progress_callback_user_data", c.c_void_p),
        ("kv_overrides", c.c_void_p),
        ("vocab_only", c.c_bool),
        ("check_tensors", c.c_bool),
        ("use_extra_bufts", c.c_bool),
        ("no_host", c.c_bool),
        ("no_alloc", c.c_bool),
        ("load_mtp", c.c_bool),
        _SPARE,
    ]


class ContextParams(c.Structure):
    """`llama_context_params`."""

    _fields_ = [
        ("n_ctx", c.c_uint32),
        ("n_batch", c.c_uint32),
        ("n_ubatch", c.c_uint32),
        ("n_seq_max", c.c_uint32),
        ("n_rs_seq", c.c_uint32),
        ("n_outputs_max", c.c_uint32),
        ("n_outputs_max_per_seq", c.c_uint32),
        ("n_threads", c.c_int32),
        ("n_threads_batch", c.c_int32),
        ("ctx_type", c.c_int),
        ("rope_scaling_type", c.c_int),
        ("pooling_type", c.c_int),
        ("attention_type", c.c_int),
        ("flash_attn_type", c.c_int),
        ("rope_freq_base", c.c_float),
        ("rope_freq_scale", c.c_float),
        ("yarn_ext_factor", c.c_float),
        ("yarn_attn_factor", c.c_float),
        ("yarn_beta_fast", c.c_float),
        ("yarn_beta_slow", c.c_float),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        ("cb_eval", c.c_void_p),
        ("cb_eval_user_data", c.c_void_p),
        ("type_k", c.c_int),
        ("type_v", c.c_int),
        ("moe_cache_size", c.c_size_t),
        ("abort_callback", c.c_void_p),
        ("abort_callback_data", c.c_void_p),
        ("embeddings", c.c_bool),
        ("offload_kqv", c.c_bool),
        ("no_perf", c.c_bool),
        ("op_offload", c.c_bool),
        ("swa_full", c.c_bool),
        ("kv_unified", c.c_bool),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("ctx_other", c.c_void_p),
        _SPARE,
    ]


class Batch(c.Structure):
    """`llama_batch`."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


_ptr, _int, _size = c.c_void_p, c.c_int32, c.c_size_t
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_Log, _ptr]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_ptr, [c.c_char_p, ModelParams]),
    "llama_model_free": (None, [_ptr]),
    "llama_model_get_vocab": (_ptr, [_ptr]),
    "llama_model_n_ctx_train": (_int, [_ptr]),
    "llama_vocab_n_tokens": (_int, [_ptr]),
    "llama_tokenize": (_int, [_ptr, c.c_char_p, _int, c.POINTER(_int), _int, c.c_bool, c.c_bool]),
    "llama_adapter_lora_init": (_ptr, [_ptr, c.c_char_p]),
    "llama_set_adapters_lora": (_int, [_ptr, c.POINTER(_ptr), _size, c.POINTER(c.c_float)]),
    "llama_init_from_model": (_ptr, [_ptr, ContextParams]),
    "llama_free": (None, [_ptr]),
    "llama_n_ctx": (c.c_uint32, [_ptr]),
    "llama_n_seq_max": (c.c_uint32, [_ptr]),
    "llama_n_threads": (_int, [_ptr]),
    "llama_get_memory": (_ptr, [_ptr]),
    "llama_memory_clear": (None, [_ptr, c.c_bool]),
    "llama_memory_seq_rm": (c.c_bool, [_ptr, _int, _int, _int]),
    "llama_memory_seq_cp": (None, [_ptr, _int, _int, _int, _int]),
    "llama_set_abort_callback": (None, [_ptr, Abort, _ptr]),
    "llama_decode": (_int, [_ptr, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [_ptr]),
}


# -- the library ----


@lru_cache(maxsize=1)
def library() -> Any:
    """The shared object with its functions declared, and its log kept off the terminal.

    Raises: UserError where the wheel is missing, or is another version than the layouts here.
    """
    lib = _open(_shared_object())
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_log, None)
    _check_layout(lib)
    lib.llama_backend_init()
    return lib


def _shared_object() -> Path:
    """A build of one's own (for a GPU), one for this very CPU, else the wheel's."""
    own = os.environ.get(OWN_BUILD)
    if own and own != WHEEL:
        return Path(own).expanduser()
    if not own and (built := build.found(VERSION)):
        return built
    spec = importlib.util.find_spec("xllamacpp")  # not imported: its server is not needed
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("xllamacpp.*")):
            if path.suffix in (".so", ".dylib", ".pyd"):
                return path
    raise UserError("xllamacpp is not installed", where="engine llama.cpp", fix=INSTALL)


def _open(path: Path) -> c.CDLL:
    try:
        lib = c.CDLL(str(path))
        missing = [name for name in _FUNCTIONS if not hasattr(lib, name)]
    except OSError as e:
        raise UserError(
            "llama.cpp cannot be loaded: {error}",
            error=e,
            where=str(path),
            fix="On a bare Linux it needs OpenMP's run-time library (package libgomp1).",
        ) from e
    if missing:
        raise other_version(f"it lacks {missing[0]}")
    return lib


def _check_layout(lib: Any) -> None:
    """Compare the defaults with what this version is known to have: a shifted field shows."""
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    seen = {
        "main_gpu": (model.main_gpu, 0),
        "vocab_only": (model.vocab_only, False),
        "use_extra_bufts": (model.use_extra_bufts, True),
        "n_ctx": (context.n_ctx, 512),
        "n_batch": (context.n_batch, 2048),
        "n_ubatch": (context.n_ubatch, 512),
        "n_seq_max": (context.n_seq_max, 1),
        "pooling_type": (context.pooling_type, -1),
        "flash_attn_type": (context.flash_attn_type, _FLASH_AUTO),
        "type_k": (context.type_k, TYPES["f16"]),
        "type_v": (context.type_v, TYPES["f16"]),
        "offload_kqv": (context.offload_kqv, True),
        "no_perf": (context.no_perf, True),
        "swa_full": (context.swa_full, True),
        "kv_unified": (context.kv_unified, False),
        "n_samplers": (context.n_samplers, 0),
    }
    for field, (is_, should) in seen.items():
        if is_ != should:
            raise other_version(f"{field} is {is_} by default, not {should}")


def other_version(why: str) -> UserError:
    """The error of a wheel that is not the one this was written for."""
    return UserError(
        "this version of xllamacpp is not the one that was tested ({why})",
        why=why,
        version=VERSION,
        own_build=OWN_BUILD,
        where="engine llama.cpp",
        fix="pip install 'xllamacpp=={version}' (or unset {own_build}).",
    )


_complaints: deque[str] = deque(maxlen=3)


@_Log
def _log(level: int, text: bytes, _: Any) -> None:
    """Keep the last errors for messages of our own; the rest is of no use to anyone here."""
    if level >= _LOG_ERROR and text:
        _complaints.append(text.decode(errors="replace").strip())


def complaint() -> str:
    """What llama.cpp last complained about, once."""
    words = "; ".join(w for w in _complaints if w)
    _complaints.clear()
    return words or "it gives no reason"
