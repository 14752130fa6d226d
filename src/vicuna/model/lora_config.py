"""PEFT's settings of an adapter (`adapter_config.json`), each honoured or refused by name.

Every field of PEFT's `LoraConfig` stands in one of three tables; a test walks over the dataclass,
so that a field of tomorrow fails it until somebody has decided. What a newer PEFT writes that
stands in none of them is named: PEFT itself passes over it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vicuna.errors import UserError
from vicuna.messages import Message

CONFIG = "adapter_config.json"
MERGE = Message(
    "Merge it with PEFT: PeftModel.from_pretrained(base, ADAPTER).merge_and_unload() and "
    "save_pretrained(FOLDER); then use --model FOLDER."
)
_PATTERN_SECONDS = 20.0

# Fields that decide what is computed, and are followed: here, or in `adapter_files`.
HONOURED = frozenset(
    {
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "init_lora_weights",
        "bias",
        "fan_in_fan_out",
        "ensure_weight_tying",
    }
)

# Fields that change nothing in what a saved adapter computes, and why.
WITHOUT_EFFECT = {
    "auto_mapping": "which class PEFT loads the base with",
    "peft_version": "who wrote it",
    "inference_mode": "whether it is to be trained",
    "lora_dropout": "of training alone, where --lora_dropout says it",
    "megatron_core": "counts with megatron_config only",
    "loftq_config": "counts with init_lora_weights loftq only",
    "eva_config": "how it was initialised",
    "corda_config": "counts with init_lora_weights corda only",
    "lora_ga_config": "counts with init_lora_weights lora_ga only",
    "qalora_group_size": "counts with use_qalora only",
    "velora_config": "how gradients were kept in training",
    "runtime_config": "where PEFT computes",
}

# Fields that make it more than a LoRA, or another base: refused where they are set.
REFUSED = {
    "use_dora": Message("DoRA, which scales whole columns of the base's weights"),
    "modules_to_save": Message("whole modules trained beside the LoRA"),
    "trainable_token_indices": "rows of the embedding trained beside the LoRA",
    "alora_invocation_tokens": Message(
        "an activated LoRA, which counts only behind its invocation tokens"
    ),
    "layer_replication": "layers of the base repeated",
    "lora_bias": "biases inside the LoRA",
    "target_parameters": "a LoRA of bare parameters, such as the experts of a mixture",
    "megatron_config": "layers of Megatron",
    "use_qalora": "QALoRA, which pools its input",
    "monteclora_config": "MonteCLoRA, which samples around the LoRA",
    "use_bdlora": "BD-LoRA, with block-diagonal matrices",
    "arrow_config": "Arrow, which routes between several adapters",
    "kasa_config": "KaSA, which cuts the base's weights",
}

_UNMERGEABLE = ("alora_invocation_tokens", "arrow_config", "monteclora_config")
_WITH_PEFT = Message("It cannot be merged either; answer with PEFT itself, or train a plain LoRA.")

# Initialisations that leave the base's weights as they are.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal")
_OTHER_TASKS = {
    "SEQ_CLS": "to classify texts",
    "TOKEN_CLS": "to classify tokens",
    "QUESTION_ANS": "to mark answers in a text",
    "SEQ_2_SEQ_LM": "for models with an encoder",
}


def check(config: Mapping[str, Any], where: Path, notes: list[str]) -> None:
    """Refuse what cannot be honoured; note what is passed over.

    Raises: UserError naming the field, what it means, and the way out.
    """
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UserError(
            "only LoRA adapters can be used, this one's peft_type is {type}",
            type=kind,
            way=MERGE,
            where=str(where),
            fix="Its method may be one that can be merged. {way}",
        )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = config.get(name)
        names = value if isinstance(value, list) else [value or ""]
        if not all(isinstance(n, str) for n in names):
            raise UserError(
                "{name} is {value!r}, but must be a pattern or a list of names",
                name=name,
                value=str(value)[:60],
                where=str(where),
                fix="The config is damaged; fetch it again.",
            )
    for name, meaning in REFUSED.items():
        if config.get(name):
            fix = _WITH_PEFT if name in _UNMERGEABLE else MERGE
            raise _refusal(name, config[name], meaning, where, fix)
    task = config.get("task_type")
    if task in _OTHER_TASKS:
        raise UserError(
            "this adapter was made {other_task} (task_type {task}), not to write",
            other_task=_OTHER_TASKS[task],
            task=task,
            where=str(where),
            fix="Use one that was trained on a causal language model (CAUSAL_LM).",
        )
    _check_init(config.get("init_lora_weights", True), where)
    if (revision := config.get("revision")) and revision != "main":
        notes.append(
            Message(
                "it was trained on revision {revision} of its base; from a hub id the "
                "newest is taken",
                revision=revision,
            )
        )
    known = HONOURED | WITHOUT_EFFECT.keys() | REFUSED.keys() | _FORMER
    unknown = sorted(k for k, v in config.items() if k not in known and v)
    if unknown:
        notes.append(
            Message(
                "{config} has settings that are not known here, not used: {unknown}",
                config=CONFIG,
                unknown=_list(unknown),
            )
        )


# Settings of older versions of PEFT that say nothing any more.
_FORMER = frozenset({"merge_weights", "auto_mapping"})


def _check_init(init: Any, where: Path) -> None:
    if isinstance(init, bool) or init is None or str(init).lower() in _PLAIN_INITS:
        return
    meaning = Message(
        "training began by changing the base's weights: the adapter belongs to changed ones"
    )
    if str(init).lower() == "mica":
        meaning = Message("MiCA, whose B is made of the base's weights")
    raise _refusal(
        "init_lora_weights",
        init,
        meaning,
        where,
        Message(
            "Convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion). "
            "Or: {way}",
            way=MERGE,
        ),
    )


def _refusal(name: str, value: Any, meaning: str, where: Path, fix: str) -> UserError:
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= 40 else shown[:37] + "..."
    return UserError(
        "this adapter is more than a LoRA: {name} is {value} ({meaning}), which is not supported",
        name=name,
        value=shown,
        meaning=meaning,
        where=str(where),
        fix=fix,
    )


def _list(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# -- which layers, with which rank ----


def untargeted(config: Mapping[str, Any], modules: Iterable[str], where: Path) -> set[str]:
    """Modules among these that PEFT would leave alone though the weights hold them: those that a
    pattern, `exclude_modules` or `layers_to_transform` leaves out.

    A plain list of names leaves none out: files of 2023 name fewer than they hold.

    Raises: UserError where a pattern is broken.
    """
    modules = list(modules)
    left = _matching(config.get("exclude_modules"), modules, where, "exclude_modules")
    target = config.get("target_modules")
    if target == "all-linear":
        left |= {m for m in modules if m.rsplit(".", 1)[-1] == "lm_head"}
    elif isinstance(target, str):
        left |= set(modules) - _matching(target, modules, where, "target_modules")
    elif (layers := config.get("layers_to_transform")) not in (None, []):
        listed = layers if isinstance(layers, list) else [layers]
        if not all(isinstance(i, int) for i in listed):
            raise UserError(
                "layers_to_transform is {names}, not numbers", names=listed, where=str(where)
            )
        named = _layer_numbers(config.get("layers_pattern"), modules, where)
        left |= {m for m in modules if m not in (target or ()) and named.get(m) not in listed}
    return left


def targeted(config: Mapping[str, Any], modules: Iterable[str], where: Path) -> set[str]:
    """Modules among these that PEFT would give a LoRA."""
    modules = list(modules)
    target = config.get("target_modules")
    wanted = set(modules)
    if not isinstance(target, str):
        wanted = _matching(target, modules, where, "target_modules")
    return wanted - untargeted(config, modules, where)


def patterned(pattern: Any, modules: Iterable[str], where: Path, name: str) -> dict[str, Any]:
    """What `rank_pattern` or `alpha_pattern` says, by module, as PEFT matches it: the first key
    that is the end of the module's name, as a regular expression.

    Raises: UserError where it is no table, or a key is no pattern.
    """
    if not pattern:
        return {}
    if not isinstance(pattern, dict):
        raise UserError("{name} is broken: expected a table", name=name, where=str(where))
    modules = list(modules)
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        for module in _matched(rf"(.*\.)?({key})$", key, modules, where, name):
            found.setdefault(module, value)
    return found


def _matching(given: Any, modules: list[str], where: Path, name: str) -> set[str]:
    """Modules that are named by a list of ends, or by a pattern for the whole name."""
    if not given:
        return set()
    if isinstance(given, str):
        return set(_matched(given, given, modules, where, name, whole=True))
    ends = [str(g) for g in given]
    return {m for m in modules if any(m == e or m.endswith("." + e) for e in ends)}


def _layer_numbers(pattern: Any, modules: list[str], where: Path) -> dict[str, int]:
    """The number of each module's layer, as PEFT finds it."""
    patterns = [pattern] if isinstance(pattern, str) and pattern else list(pattern or ())
    found: dict[str, int] = {}
    for one in patterns:
        inside = _matched(rf"(?:^|.*?\.){one}\.(\d+)\.", one, modules, where, "layers_pattern")
        for module in inside:
            found.setdefault(module, int(inside[module][-1]))
    if not patterns:
        for module in modules:
            if match := re.match(r".*?\.[^.]*\.(\d+)\.", module):
                found[module] = int(match[1])
    return found


def _matched(
    pattern: str, given: str, modules: list[str], where: Path, name: str, whole: bool = False
) -> dict[str, tuple[str, ...]]:
    """The groups of a pattern by the modules whose names begin with it, or are it as a whole.

    A pattern that is more than a name is somebody else's program: it runs in a process of its own,
    which can be ended.
    """
    try:
        if re.fullmatch(r"\^?(?:[\w-]|\\?\.)*\$?", given):
            match = re.fullmatch if whole else re.match
            return {m: hit.groups("") for m in modules if (hit := match(pattern, m))}
        re.compile(pattern)
        done = subprocess.run(
            [sys.executable, "-I", "-c", _PROGRAM],
            input=json.dumps([pattern, modules, whole]),
            capture_output=True,
            text=True,
            timeout=_PATTERN_SECONDS,
            check=True,
        )
        return {m: tuple(groups) for m, groups in json.loads(done.stdout).items()}
    except (re.error, RecursionError, OverflowError) as e:
        raise UserError(
            "{name} has no valid pattern: {value!r} ({error})",
            name=name,
            value=given,
            error=e,
            where=str(where),
        ) from e
    except (subprocess.SubprocessError, OSError, ValueError) as e:
        raise UserError(
            "{name} has a pattern that cannot be computed in time: {value!r}",
            name=name,
            value=given[:60],
            where=str(where),
            fix="Name the layers in a list instead.",
        ) from e


_PROGRAM = """
import json, re, sys
pattern, modules, whole = json.load(sys.stdin)
match = re.fullmatch if whole else re.match
found = {m: hit.groups("") for m in modules if (hit := match(pattern, m))}
json.dump(found, sys.stdout)
"""
