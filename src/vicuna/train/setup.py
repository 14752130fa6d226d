"""From settings to a session ready to train: data, base, adapter, optimiser.

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

from vicuna import interrupts
from vicuna.config import TrainSettings
from vicuna.data import dataset as datasets
from vicuna.data.templates.base import Template
from vicuna.data.templates.compare_with_original import differences, share_of_thoughts
from vicuna.data.templates.registry import find_template, template_from_dict
from vicuna.data.templates.renderer import Renderer
from vicuna.data.tokenizer import Tokenizer
from vicuna.errors import SettingsError, UserError
from vicuna.json_yaml import read_json
from vicuna.model import adapter as adapters
from vicuna.model import dropout, elementwise, forward_choice, fused, load, lora_targets
from vicuna.model.adapter_files import CONFIG
from vicuna.model.base import locate
from vicuna.model.config_files import read_config
from vicuna.model.trainable import TrainableModel
from vicuna.model.vocabulary import check_embedding_rows, load_vocabulary
from vicuna.paths import shell_word
from vicuna.train import checkpoint as checkpoints
from vicuna.train import optimizer as optimizers
from vicuna.train import resume as origins
from vicuna.train.checkpoint import State
from vicuna.train.hardware import Hardware, by_hand, decide
from vicuna.train.progress import Screen
from vicuna.train.resume import DECISIVE, Origin
from vicuna.train.run_folder import RunFolder
from vicuna.train.schedule import Schedule

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
    trainable: TrainableModel
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    state: State
    meta: dict[str, Any]
    resumed: bool
    context: int
    sample_prompts: list[str] = field(default_factory=list)


def prepare(settings: TrainSettings, given: dict[str, Any], screen: Screen) -> Session:
    """Build a session.

    Args:
        given: what the user said by name; the rest of `settings` are defaults.

    Raises: UserError for everything a user can mend.
    """
    settings, origin = origins.find(settings, given, screen)
    if found := mistakes(settings):
        raise SettingsError(found)
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
    # Data that is not there is told before a base of many gigabytes is fetched.
    datasets.check_sources([*settings.dataset, *settings.val_dataset], settings.encoding)
    folder = locate(settings.model)
    vocabulary = load_vocabulary(folder)
    tokenizer = Tokenizer(vocabulary)
    template = _template(settings, given, origin, tokenizer)
    template = template.choose(settings.thinking, settings.thinking_loss)
    renderer = Renderer(template, tokenizer)
    check_embedding_rows(renderer, read_config(folder), folder)
    for line in differences(renderer):
        screen.say(f"template {template.name}: {line}")
    split = _data(settings, renderer, run, screen, keep=origin.kind == "resume")
    renderer = Renderer(_answering(settings, renderer, split, screen), tokenizer)
    template = renderer.template
    hardware = _hardware(settings, given, origin, folder, split, screen)
    settings, chosen = hardware.settings, hardware.precision
    trainable, context = _trainable(hardware, origin, folder, split, screen)
    names = list(trainable.parameters)
    state, schedule = origins.begin(
        settings, given, origin, split, chosen.precision, hardware.rows, vocabulary
    )
    if trainable.way != "packed":
        # Also where an older checkpoint, or a setting, has it otherwise: it would be wrong.
        state.cut |= {"examples": 1, "share": 0}
    optimizer = optimizers.build(settings, trainable.parameters, trainable.device)
    if origin.checkpoint is not None:
        checkpoints.restore_optimizer(origin.checkpoint, optimizer, names)
    meta = {
        "format": 1,
        "template": template.to_dict(),
        "base": {"name": _base_name(settings.model), **adapters.identify(folder)},
    }
    run.write_json("data.json", datasets.describe(split))
    _set_aside_later(run, state.step, screen)
    interrupts.keeps(
        "no update was done, and nothing is lost; start with: "
        f"vicuna train --resume {shell_word(run.path)}"
    )
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
    # Behind the config: a folder with a log can always be resumed, whenever it is killed.
    run.open_log(state.step if origin.state and origin.kind == "resume" else None)
    session = Session(
        settings, run, screen, renderer, split, trainable, optimizer, schedule, state, meta,
        resumed=origin.kind == "resume" and origin.state is not None, context=context,
    )  # fmt: skip
    session.sample_prompts = _sample_prompts(settings)
    _announce(session, chosen)
    return session


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


def mistakes(settings: TrainSettings) -> list[str]:
    """What is wrong with settings that are good one by one."""
    found = []
    if not settings.dataset:
        found.append("dataset is missing: give files, a folder or a hub id (--dataset my.jsonl)")
    if settings.val_size and settings.val_dataset:
        found.append("val_size and val_dataset exclude each other: give one of them")
    if settings.early_stopping_patience and not (settings.val_size or settings.val_dataset):
        found.append("early_stopping_patience needs an evaluation: give val_size or val_dataset")
    found += optimizers.mistakes(settings, load.pick_device())
    known = ("wandb", "swanlab", "tensorboard", "none")
    found += [
        f"report_to is {w}, but must be one of {', '.join(known)}"
        for w in settings.report_to
        if w not in known
    ]
    found += [
        f"report_to: {w} is not installed (pip install {w})"
        for w in settings.report_to
        if w in known[:3] and find_spec(w) is None
    ]
    allowed = (*DECISIVE, "data")
    found += [
        f"allow_changes: {w} is not among {', '.join(allowed)}"
        for w in settings.allow_changes
        if w not in allowed
    ]
    return found


def _template(
    settings: TrainSettings, given: dict[str, Any], origin: Origin, tokenizer: Tokenizer
) -> Template:
    """The adapter's own template where the run begins from one; else the one asked for."""
    saved = origin.adapter.meta.get("template") if origin.adapter else None
    wanted = None
    if "template" in given or not saved:
        wanted = find_template(settings.template, tokenizer.data)
    if not saved:
        assert wanted is not None
        return wanted
    own = template_from_dict(saved)
    if wanted is not None and wanted.digest != own.digest:
        if "template" in settings.allow_changes:
            return wanted
        raise UserError(
            f"the adapter was trained with template {own.name}, not {wanted.name}",
            where="template",
            fix="Leave out --template, or add --allow_changes template.",
        )
    return own


def _answering(
    settings: TrainSettings, renderer: Renderer, split: datasets.Split, screen: Screen
) -> Template:
    """The template as the adapter will be asked with: with thoughts, if most records have one."""
    template = renderer.template
    if template.date:
        screen.say(f"template {template.name} tells the day: {template.date}, in answers too")
    if settings.thinking != "auto":
        return template
    count = len(split.dataset)
    some = range(0, count, max(1, count // 256))
    share = share_of_thoughts((split.dataset[i] for i in some), renderer)
    if share:
        for line in differences(renderer, thoughts=True):
            screen.say(f"template {template.name}: {line}")
        screen.say(
            f"thinking: {share:.0%} of the records have a thought; the adapter answers "
            f"{'with' if share > 0.5 else 'without'} one unless --thinking says otherwise"
        )
    return template.choose("on" if share > 0.5 else "off", settings.thinking_loss)


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


def _hardware(
    settings: TrainSettings,
    given: dict[str, Any],
    origin: Origin,
    folder: Path,
    split: datasets.Split,
    screen: Screen,
) -> Hardware:
    """A resumed run goes on as it was: its checkpoint says how steps are cut."""
    device = load.pick_device()
    if origin.kind == "resume" and origin.state is not None:
        return by_hand(settings, device)
    return decide(settings, given, folder, _longest(settings, split), device, screen)


def _longest(settings: TrainSettings, split: datasets.Split) -> int:
    """Tokens of the longest example."""
    longest = int(split.dataset.column("length").clip(max=settings.cutoff_len).max())
    return max([longest, *(len(e.ids) for e in split.validation)])


def _trainable(
    hardware: Hardware, origin: Origin, folder: Path, split: datasets.Split, screen: Screen
) -> tuple[TrainableModel, int]:
    settings, device, chosen = hardware.settings, hardware.device, hardware.precision
    if origin.adapter is not None:
        for note in adapters.check_belongs(origin.adapter, folder, settings.allow_other_base):
            screen.warn(note)
    with screen.working("loading the base"):
        model = load.load_base(folder, chosen, device)
        context = load.context_length(model)
        longest = _longest(settings, split)
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
            if origin.kind == "resume" and origin.state is not None:
                _name_alike(peft, origin.adapter)
        else:
            peft = adapters.attach(model, lora, settings.seed, _base_name(settings.model, folder))
            if lora.target == ("all",) and (words := lora_targets.words(peft.get_base_model())):
                screen.say(f"lora_target all: {words}")
        peft.peft_config["default"].base_model_name_or_path = _base_name(settings.model, folder)
        peft.to(device)
    inner = int(getattr(model.config, "intermediate_size", 0) or 4096)
    if reason := elementwise.choose(settings.kernels, device, chosen.dtype, inner):
        screen.say(f"kernels: {reason}")
    trainable = TrainableModel(
        peft, device, checkpointing=settings.gradient_checkpointing, longest=longest
    )
    trainable.dropout.seed = settings.seed
    with screen.working("trying the base on a few tokens"):
        for line in forward_choice.settle(trainable):
            screen.say(line)
    if trainable.llama is None:
        fused.install(peft)
    if settings.lora_dropout:
        dropout.install(peft, settings.lora_dropout, trainable.dropout)
    trainable.packed_attention()
    peft.train()
    return trainable, context


def _name_alike(peft: Any, saved: adapters.AdapterFiles) -> None:
    """Name the adapted layers as the checkpoint does: in full where the run was begun with `all`,
    so that a resumed run's adapter_config.json has the bytes of one that was never stopped."""
    noted = read_json(saved.path / CONFIG).get("target_modules")
    if isinstance(noted, list):
        peft.peft_config["default"].target_modules = set(noted)


def _base_name(model: str, folder: Path | None = None) -> str:
    """How the base is named in an adapter: so that plain PEFT finds it where that is possible."""
    path = Path(model)
    if path.exists():
        return str(path.resolve())
    return str(folder) if folder is not None and "/" not in model else model


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
    trained = sum(p.numel() for p in session.trainable.parameters.values())
    say = session.screen.say
    device = session.trainable.device
    say(f"base {settings.model} in {chosen.precision} on {device}: {chosen.reason}")
    say(
        f"template {session.renderer.template.name}, answers end with "
        f"{session.renderer.tokenizer.token(session.renderer.end_id)}; "
        f"{trained:,} trained parameters"
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
