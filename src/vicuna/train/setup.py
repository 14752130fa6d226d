"""From settings to a session ready to train: what to resume, data, base, adapter, optimiser.

Everything that can go wrong because of a setting goes wrong here, in the order of what it costs:
settings, run folder, data, and only then the base.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vicuna import config
from vicuna.config import TrainSettings
from vicuna.data import dataset as datasets
from vicuna.data.encode import Encoder
from vicuna.data.template import Renderer, Template, find, from_dict
from vicuna.errors import SettingsError, UserError
from vicuna.model import adapter as adapters
from vicuna.model import dropout, fused, load
from vicuna.model.base import locate
from vicuna.model.vocabulary import load_vocabulary
from vicuna.train import checkpoint as checkpoints
from vicuna.train.checkpoint import State
from vicuna.train.runfolder import RunFolder
from vicuna.train.schedule import Schedule, continued_total, warmup_steps
from vicuna.train.screen import Screen
from vicuna.train.step import Learner

# Settings that decide which weights a run ends with; on resume they must be the checkpoint's.
DECISIVE = (
    "template",
    "cutoff_len",
    "overlong",
    "train_turns",
    "val_size",
    "seed",
    "batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_rslora",
    "precision",
)
SCHEDULE = {"num_train_epochs", "max_steps", "warmup_ratio", "warmup_steps", "batch_size", "data"}
# Rows computed at a time where the user leaves the choice: enough to fill the matrix units.
ROWS = {"cpu": 1024, "cuda": 4096, "mps": 2048}
INITIAL_FP16_SCALE = 4096.0


# Settings that an incremental run does not take over from the run it continues.
_OWN = {
    "dataset",
    "val_dataset",
    "val_size",
    "output_dir",
    "max_samples",
    "max_steps",
    "resume",
    "init_adapter",
    "adapter",
    "continue_from",
    "from_data_beginning",
}


# Settings that are meant for one call of the command and must not come back with config.yaml.
_ONCE = ("resume", "allow_changes", "continue_from", "from_data_beginning")


@dataclass
class Session:
    """All that the training loop works with."""

    settings: TrainSettings
    run: RunFolder
    screen: Screen
    renderer: Renderer
    split: datasets.Split
    learner: Learner
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    state: State
    meta: dict[str, Any]
    resumed: bool
    context: int
    sample_prompts: list[str] = field(default_factory=list)


@dataclass
class Origin:
    """Where a run begins: nowhere, a checkpoint of its own, another run's, or an adapter."""

    kind: str = "new"  # new, resume, continue, adapter
    checkpoint: Path | None = None
    state: State | None = None
    adapter: adapters.AdapterFiles | None = None


def prepare(settings: TrainSettings, given: dict[str, Any], screen: Screen) -> Session:
    """Build a session.

    Args:
        given: what the user said by name; the rest of `settings` are defaults.

    Raises: UserError for everything a user can mend.
    """
    settings, origin = _origin(settings, given, screen)
    _check(settings)
    run = RunFolder(Path(settings.output_dir))
    try:
        return _build(settings, given, origin, run, screen)
    except BaseException:
        run.close()
        raise


def _build(
    settings: TrainSettings, given: dict[str, Any], origin: Origin, run: RunFolder, screen: Screen
) -> Session:
    """The session; nothing of an older run is touched before all checks are passed."""
    if run.used() and origin.kind != "resume":
        raise UserError(
            "this folder already holds a run",
            where=str(run.path),
            fix="Add --resume to go on with it, or choose another --output_dir.",
        )
    folder = locate(settings.model)
    vocabulary = load_vocabulary(folder)
    encoder = Encoder(vocabulary)
    template = _template(settings, given, origin, encoder)
    renderer = Renderer(template, encoder)
    split = _data(settings, renderer, run, screen, keep=origin.kind == "resume")
    learner, context = _learner(settings, origin, folder, split, screen)
    chosen = load.choose(settings.precision, learner.device)
    names = list(learner.parameters)
    state, schedule = _state(settings, given, origin, split, chosen.precision, learner.device)
    optimizer = torch.optim.AdamW(
        list(learner.parameters.values()),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
    )
    if origin.checkpoint is not None:
        checkpoints.restore_optimizer(origin.checkpoint, optimizer, names)
    meta = {
        "format": 1,
        "template": template.to_dict(),
        "base": {"name": _base_name(settings.model), **adapters.identify(folder)},
    }
    run.write_json("data.json", datasets.describe(split))
    _set_aside_later(run, state.step, screen)
    run.open_log(state.step if origin.state and origin.kind == "resume" else None)
    run.write_config(
        settings.model_dump(mode="json", exclude=set(_ONCE)),
        {
            "total_steps": state.total,
            "warmup_steps": state.warmup,
            "precision": chosen.precision,
            "template": template.name,
            "micro_batch": state.cut,
            "train_examples": split.train_examples,
            "validation_examples": len(split.validation),
            "begins": origin.kind,
        },
    )
    session = Session(
        settings, run, screen, renderer, split, learner, optimizer, schedule, state, meta,
        resumed=origin.kind == "resume" and origin.state is not None, context=context,
    )  # fmt: skip
    session.sample_prompts = _sample_prompts(settings)
    _announce(session, chosen)
    return session


# -- where to begin ------------------------------------------------------------------------------


def _origin(
    settings: TrainSettings, given: dict[str, Any], screen: Screen
) -> tuple[TrainSettings, Origin]:
    """Find what to begin from, and fill in what the older run had set."""
    if settings.adapter and settings.init_adapter:
        raise SettingsError(["adapter and init_adapter are the same setting: give one of them"])
    ways = [
        w for w in ("resume", "init_adapter", "adapter", "continue_from") if getattr(settings, w)
    ]
    if len(ways) > 1:
        raise SettingsError([f"{' and '.join(ways)} exclude each other: give one of them"])
    if settings.resume:
        return _resume(settings, given, screen)
    if not settings.output_dir:
        settings = settings.model_copy(update={"output_dir": time.strftime("runs/%Y%m%d-%H%M%S")})
    if settings.continue_from:
        run, checkpoint = _run_and_checkpoint(settings.continue_from)
        state = checkpoints.read_state(checkpoint)
        old = {k: v for k, v in _old_settings(run).items() if k not in _OWN}
        merged = {**settings.model_dump(include=_OWN), **old, **given}
        settings = config.build(TrainSettings, merged)
        return settings, Origin("continue", checkpoint, state, _adapter_of(checkpoint))
    start = settings.init_adapter or settings.adapter
    if start:
        files = adapters.read_adapter(start)
        lora = files.lora
        named = {"lora_rank": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.rslora}
        wrong = [
            f"{k} is {getattr(settings, k)}, but the adapter {start} has {v}"
            for k, v in named.items()
            if k in given and getattr(settings, k) != v
        ]
        if wrong:
            raise SettingsError(wrong)
        settings = settings.model_copy(update={**named, "lora_target": list(lora.target)})
        for note in files.notes:
            screen.warn(note)
        name = files.meta.get("base", {}).get("name") or files.base_name
        if "model" not in given and name:
            settings = settings.model_copy(update={"model": name})
        return settings, Origin("adapter", adapter=files)
    return settings, Origin()


def _resume(
    settings: TrainSettings, given: dict[str, Any], screen: Screen
) -> tuple[TrainSettings, Origin]:
    named = Path(settings.resume)
    if settings.resume == "last" or (named / "config.yaml").is_file():
        if settings.resume == "last" and not settings.output_dir:
            raise SettingsError(["resume: which run? Give --output_dir RUN, or --resume RUN"])
        run = Path(settings.output_dir) if settings.resume == "last" else named
        _must_be_run(run)
        if not checkpoints.all_of(run / "checkpoints"):
            screen.warn("no checkpoint in this run yet: it starts from its beginning")
            merged = {**_old_settings(run), **given, "output_dir": str(run)}
            return config.build(TrainSettings, merged), Origin("resume")
        checkpoint, state, warnings = checkpoints.last_whole(run)
        for words in warnings:
            screen.warn(words)
    else:
        run, checkpoint = _run_and_checkpoint(settings.resume)
        state = checkpoints.read_state(checkpoint)
        if not Path(settings.resume).exists() and not settings.output_dir:
            raise SettingsError(["resume from the hub needs a place to go on: give --output_dir"])
    merged = {**_old_settings(run), "from_data_beginning": None, **given}
    # A checkpoint of another place (a copy, the hub) goes on in the folder that was asked for.
    merged["output_dir"] = given.get("output_dir") or str(run)
    merged["resume"] = str(checkpoint)
    return (
        config.build(TrainSettings, merged),
        Origin("resume", checkpoint, state, _adapter_of(checkpoint)),
    )


def _adapter_of(checkpoint: Path) -> adapters.AdapterFiles:
    return adapters.read_adapter(str(checkpoint / "adapter"))


def _must_be_run(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise UserError(
            "no run in this folder to resume",
            where=str(run),
            fix="Check --output_dir, or start the run without --resume.",
        )


def _run_and_checkpoint(place: str) -> tuple[Path, Path]:
    """(run, checkpoint) of a run folder, a checkpoint folder, or a hub id that holds a run."""
    path = Path(place)
    if not path.exists() and place.count("/") == 1 and not path.parent.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(place))
        except Exception as e:  # network, name, login
            raise UserError(
                f"neither a folder nor reachable on the hub ({type(e).__name__})",
                where=f"resume {place}",
                fix="Give a run folder or one of its checkpoints.",
            ) from e
    if (path / "state.json").is_file():
        run = path.resolve().parent.parent
        _must_be_run(run)
        return run, path
    _must_be_run(path)
    return path, checkpoints.last_whole(path)[0]


def _old_settings(run: Path) -> dict[str, Any]:
    recipe = config.read_recipe(run / "config.yaml")
    return {k: v for k, v in recipe.items() if k in TrainSettings.model_fields}


def _set_aside_later(run: RunFolder, step: int, screen: Screen) -> None:
    """Checkpoints beyond the one that is resumed belong to a branch that is given up: keep them,
    but where no later resume takes them for this run's."""
    later = [p for p in checkpoints.all_of(run.checkpoints) if int(p.name[5:]) > step]
    if later:
        aside = run.checkpoints / time.strftime("abandoned-%Y%m%d-%H%M%S")
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        screen.say(f"later checkpoints were moved to {aside}")


# -- checks that need no data --------------------------------------------------------------------


def _check(settings: TrainSettings) -> None:
    mistakes = []
    if not settings.dataset:
        mistakes.append("dataset is missing: give files, a folder or a hub id (--dataset my.jsonl)")
    if settings.val_size and settings.val_dataset:
        mistakes.append("val_size and val_dataset exclude each other: give one of them")
    if settings.early_stopping_patience and not (settings.val_size or settings.val_dataset):
        mistakes.append("early_stopping_patience needs an evaluation: give val_size or val_dataset")
    known = ("wandb", "swanlab", "tensorboard", "none")
    mistakes += [
        f"report_to is {w}, but must be one of {', '.join(known)}"
        for w in settings.report_to
        if w not in known
    ]
    mistakes += [
        f"report_to: {w} is not installed (pip install {w})"
        for w in settings.report_to
        if w in known[:3] and find_spec(w) is None
    ]
    allowed = (*DECISIVE, "data")
    mistakes += [
        f"allow_changes: {w} is not among {', '.join(allowed)}"
        for w in settings.allow_changes
        if w not in allowed
    ]
    if mistakes:
        raise SettingsError(mistakes)


def _template(
    settings: TrainSettings, given: dict[str, Any], origin: Origin, encoder: Encoder
) -> Template:
    """The adapter's own template where the run begins from one; else the one asked for."""
    saved = origin.adapter.meta.get("template") if origin.adapter else None
    wanted = None
    if "template" in given or not saved:
        wanted = find(settings.template, encoder.vocabulary)
    if not saved:
        assert wanted is not None
        return wanted
    own = from_dict(saved)
    if wanted is not None and wanted.digest != own.digest:
        if "template" in settings.allow_changes:
            return wanted
        raise UserError(
            f"the adapter was trained with template {own.name}, not {wanted.name}",
            where="template",
            fix="Leave out --template, or add --allow_changes template.",
        )
    return own


def _data(
    settings: TrainSettings, renderer: Renderer, run: RunFolder, screen: Screen, keep: bool
) -> datasets.Split:
    """The data; its report is written before anything can go wrong with it, unless `keep`."""
    with screen.working("reading data") as say:
        found, report = datasets.load(settings.dataset, settings, renderer, say)
        held_out = None
        if settings.val_dataset:
            held_out, val_report = datasets.load(settings.val_dataset, settings, renderer, say)
            report.files += val_report.files
    screen.report(report)
    if not keep:
        run.write_json("data.json", report.to_json())
    split = datasets.split(
        found, report, settings.dataset, settings.val_size, settings.batch_size, settings.seed,
        held_out,
    )  # fmt: skip
    for note in split.notes:
        screen.say(note)
    return split


def _learner(
    settings: TrainSettings, origin: Origin, folder: Path, split: datasets.Split, screen: Screen
) -> tuple[Learner, int]:
    device = load.pick_device()
    chosen = load.choose(settings.precision, device)
    base = adapters.identify(folder)
    if origin.adapter is not None:
        warning = adapters.check_base(origin.adapter, base, settings.allow_other_base)
        if warning:
            screen.warn(warning)
    with screen.working("loading the base"):
        model = load.load_base(folder, chosen, device)
        context = load.context_length(model)
        longest = int(split.dataset.column("length").clip(max=settings.cutoff_len).max())
        longest = max([longest, *(len(e.ids) for e in split.validation)])
        if longest > context:
            raise UserError(
                f"examples of up to {longest} tokens, but the base was made for {context}",
                where="cutoff_len",
                fix=f"Use --cutoff_len {context}.",
            )
        lora = adapters.LoraSettings(
            settings.lora_rank,
            settings.lora_alpha,
            settings.lora_dropout,
            tuple(settings.lora_target),
            settings.use_rslora,
        )
        if origin.adapter is not None:
            peft = adapters.attach_saved(model, origin.adapter, settings.lora_dropout)
        else:
            peft = adapters.attach(model, lora, settings.seed, _base_name(settings.model, folder))
        peft.peft_config["default"].base_model_name_or_path = _base_name(settings.model, folder)
        peft.to(device)
    if settings.gradient_checkpointing:
        peft.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    learner = Learner(peft, device)
    learner.dropout.seed = settings.seed
    fused.install(peft)
    if settings.lora_dropout:
        dropout.install(peft, settings.lora_dropout, learner.dropout)
    learner.packed_attention()
    peft.train()
    return learner, context


def _base_name(model: str, folder: Path | None = None) -> str:
    """How the base is named in an adapter: so that plain PEFT finds it where that is possible."""
    path = Path(model)
    if path.exists():
        return str(path.resolve())
    return str(folder) if folder is not None and "/" not in model else model


def _state(
    settings: TrainSettings,
    given: dict[str, Any],
    origin: Origin,
    split: datasets.Split,
    precision: str,
    device: Any,
) -> tuple[State, Schedule]:
    wanted = settings.model_dump(include=set(DECISIVE), mode="json") | {"precision": precision}
    own_steps = settings.max_steps or split.order.steps(settings.num_train_epochs)
    cut = {
        "tokens": settings.micro_batch_tokens or ROWS[device.type],
        "examples": settings.micro_batch_size,
        "share": int(settings.share_prefixes),
    }
    old = origin.state
    if origin.kind == "resume" and old is not None:
        changed = _refuse_changes(settings, wanted, old, split.digest)
        state = State(**{**old.__dict__, "settings": wanted, "data": split.digest})
        if changed & SCHEDULE:
            state.total = own_steps
            state.warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        if settings.from_data_beginning:
            state.data_offset = state.step
        if {"micro_batch_tokens", "micro_batch_size", "share_prefixes"} & set(given):
            state.cut = cut
    elif origin.kind == "continue" and old is not None:
        total = continued_total(old.total, old.step, own_steps)
        offset = 0 if settings.from_data_beginning is False else old.step
        state = State(step=old.step, total=total, warmup=old.warmup, data_offset=offset, cut=cut)
        state.loss_scale = old.loss_scale
    else:
        warmup = warmup_steps(own_steps, settings.warmup_ratio, settings.warmup_steps)
        state = State(total=own_steps, warmup=warmup, cut=cut)
        # nf4 and int8 compute in fp16, too, where the chip has no bf16 (Turing, Volta).
        fp16 = load.Chosen(precision, "").dtype is torch.float16
        state.loss_scale = INITIAL_FP16_SCALE if fp16 else 1.0
    state.settings, state.data = wanted, split.digest
    schedule = Schedule(
        settings.lr_scheduler_type, settings.learning_rate, state.total, state.warmup
    )
    return state, schedule


def _refuse_changes(
    settings: TrainSettings, wanted: dict[str, Any], old: State, digest: str
) -> set[str]:
    """What differs from the checkpoint, all of it allowed.

    Raises: SettingsError that lists what is not.
    """
    differs = {k: (old.settings.get(k), v) for k, v in wanted.items() if old.settings.get(k) != v}
    if old.data != digest:
        differs["data"] = ("the checkpoint's records", "others")
    refused = [k for k in differs if k not in settings.allow_changes]
    if refused:
        raise SettingsError(
            [
                f"{k} was {differs[k][0]} in the checkpoint and is now {differs[k][1]}"
                for k in refused
            ]
            + [
                "give the old values, allow them by name (--allow_changes "
                f"{','.join(refused)}), or begin a new run from the weights (--init_adapter)"
            ]
        )
    return set(differs)


def _sample_prompts(settings: TrainSettings) -> list[str]:
    """Questions to answer during training: given, or read from a file with one a line."""
    prompts: list[str] = []
    for prompt in settings.sample_prompts:
        path = Path(prompt)
        if len(prompt) < 240 and path.suffix == ".txt" and path.is_file():
            prompts += [p for p in path.read_text(encoding="utf-8").splitlines() if p.strip()]
        else:
            prompts.append(prompt)
    return prompts


def _announce(session: Session, chosen: load.Chosen) -> None:
    state, settings = session.state, session.settings
    trained = sum(p.numel() for p in session.learner.parameters.values())
    say = session.screen.say
    say(f"base {settings.model} in {chosen.precision} on {session.learner.device}: {chosen.reason}")
    say(
        f"template {session.renderer.template.name}, answers end with "
        f"{session.renderer.encoder.token(session.renderer.end_id)}; {trained:,} trained parameters"
    )
    say(
        f"{session.split.train_examples:,} examples in updates of {settings.batch_size}: "
        f"{state.total - state.step:,} updates, {state.warmup} of them warming up"
    )
    few = state.total < 20 and not settings.max_steps and settings.batch_size > 4
    if few and not session.resumed:
        smaller = max(1, settings.batch_size * state.total // 60)
        session.screen.warn(
            f"only {state.total} updates: little will be learned; --batch_size {smaller} or more "
            "--num_train_epochs make more of the same data"
        )
    if session.resumed:
        say(f"resumed after update {state.step}")
