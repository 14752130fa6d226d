"""From settings to a run that is ready to train: data, base, adapter, optimiser.

Everything that can go wrong because of a setting goes wrong here, in the order of what it costs:
settings, run folder, data, and only then the base.
"""

from __future__ import annotations

import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from vicuna.memory.auto_settings import Hardware, defaults_for, plan_hardware
from vicuna.messages import Message
from vicuna.model import adapter as adapters
from vicuna.model import dropout, elementwise, forward_choice, fused_lora, load, lora_targets
from vicuna.model.adapter_files import CONFIG
from vicuna.model.base import locate
from vicuna.model.config_files import read_config
from vicuna.model.trainable import TrainableModel
from vicuna.model.vocabulary import check_embedding_rows, load_vocabulary
from vicuna.paths import shell_word
from vicuna.train import checkpoint as checkpoints
from vicuna.train import optimizer as optimizers
from vicuna.train.checkpoint import State
from vicuna.train.first_state import first_state
from vicuna.train.loop import Training
from vicuna.train.micro_batch import for_run
from vicuna.train.progress import RunConsole
from vicuna.train.resume import RESULT_SETTINGS, StartingPoint, find_start
from vicuna.train.run_folder import RunFolder

if TYPE_CHECKING:
    from vicuna.train.samples import Sampler

# Settings that are meant for one call of the command and must not come back with config.yaml.
CALL_ONLY = ("resume", "allow_changes", "continue_from", "from_data_beginning")
TRACKERS = ("wandb", "swanlab", "tensorboard")


def prepare(settings: TrainSettings, named: dict[str, Any], console: RunConsole) -> Training:
    """Make a run ready to train.

    Args:
        named: the settings that the user named, with their values; the others are defaults.

    Raises: UserError for everything that a user can mend.
    """
    settings, start = find_start(settings, named, console)
    if messages := mistakes(settings):
        raise SettingsError(messages)
    run = RunFolder(Path(settings.output_dir))
    try:
        return _build(settings, named, start, run, console)
    except BaseException:
        run.close()
        raise


def _build(
    settings: TrainSettings,
    named: dict[str, Any],
    start: StartingPoint,
    run: RunFolder,
    console: RunConsole,
) -> Training:
    """The run; nothing of an older run is touched before all checks have passed."""
    if run.used() and start.kind != "resume":
        raise UserError(
            "this folder already holds a run",
            where=str(run.path),
            fix="Add --resume to resume it, or choose another --output_dir.",
        )
    # Missing data is reported before a base of many gigabytes is fetched.
    datasets.check_sources([*settings.dataset, *settings.val_dataset], settings.encoding)
    folder = locate(settings.model)
    vocabulary = load_vocabulary(folder)
    tokenizer = Tokenizer(vocabulary)
    template = _template(settings, named, start, tokenizer)
    template = template.choose(settings.thinking, settings.thinking_loss)
    renderer = Renderer(template, tokenizer)
    check_embedding_rows(renderer, read_config(folder), folder)
    for line in differences(renderer):
        console.say(f"template {template.name}: {line}")
    split = _data(settings, renderer, run, console, keep=start.kind == "resume")
    renderer = Renderer(_inference_template(settings, renderer, split, console), tokenizer)
    longest = _longest(settings, split)
    hardware = _hardware(settings, named, start, folder, longest, console)
    settings, precision = hardware.settings, hardware.precision
    trainable, context = _trainable(hardware, start, folder, longest, console)
    micro_batch = for_run(
        settings,
        named,
        hardware.tokens,
        packs=trainable.way == "packed",
        saved=start.state.micro_batch if start.kind == "resume" and start.state else None,
    )
    state, schedule = first_state(
        settings, start, split, precision.precision, micro_batch, vocabulary
    )
    optimizer = optimizers.build(settings, trainable.parameters, trainable.device)
    if start.checkpoint is not None:
        names = list(trainable.parameters)
        checkpoints.restore_optimizer(start.checkpoint, optimizer, names)
    resumed = start.kind == "resume" and start.state is not None
    _write(settings, start, run, renderer, split, state, precision.precision, console)
    training = Training(
        settings,
        run,
        console,
        trainable,
        optimizer,
        schedule,
        split,
        state,
        renderer.end_id,
        adapter_meta={
            "format": 1,
            "template": renderer.template.to_dict(),
            "base": {"name": _base_name(settings.model), **adapters.identify(folder)},
        },
        sampler=_sampler(settings, trainable, renderer, context, run, console),
        resumed=resumed,
    )
    run.log(
        "start",
        step=state.step,
        total_steps=state.total,
        resumed=resumed,
        examples=split.train_examples,
        validation_examples=len(split.validation),
        precision=precision.precision,
        template=renderer.template.name,
    )
    _announce(training, renderer, precision)
    return training


def _write(
    settings: TrainSettings,
    start: StartingPoint,
    run: RunFolder,
    renderer: Renderer,
    split: datasets.Split,
    state: State,
    precision: str,
    console: RunConsole,
) -> None:
    """Write config.yaml and data.json, and open the log."""
    run.write_json("data.json", datasets.describe(split))
    _set_aside_later(run, state.step, console)
    interrupts.keeps(
        "no step was done, and nothing is lost; start with: "
        f"vicuna train --resume {shell_word(run.path)}"
    )
    run.write_config(
        settings.model_dump(mode="json", exclude=set(CALL_ONLY)),
        {
            "total_steps": state.total,
            "warmup_steps": state.warmup,
            "precision": precision,
            "template": renderer.template.name,
            "micro_batch": state.micro_batch.to_json(),
            "train_examples": split.train_examples,
            "validation_examples": len(split.validation),
            "begins": start.kind,
        },
    )
    # After the config: a folder with a log can always be resumed, whenever it is killed.
    run.open_log(state.step if start.state and start.kind == "resume" else None)


def _set_aside_later(run: RunFolder, step: int, console: RunConsole) -> None:
    """Move checkpoints newer than the resumed one to `abandoned-*/`, so that a later resume cannot
    pick them."""
    later = [p for p in checkpoints.all_of(run.checkpoints) if int(p.name[5:]) > step]
    if later:
        aside = run.checkpoints / time.strftime("abandoned-%Y%m%d-%H%M%S")
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        console.say(f"later checkpoints were moved to {aside}")


# -- checks that need no data --------------------------------------------------------------------


def mistakes(settings: TrainSettings) -> list[str]:
    """What is wrong with settings that are valid one by one."""
    messages: list[str] = []
    if not settings.dataset:
        messages.append(
            Message("dataset is missing: give files, a folder or a hub id (--dataset my.jsonl)")
        )
    if settings.val_size and settings.val_dataset:
        messages.append(Message("val_size and val_dataset exclude each other: give one of them"))
    if settings.early_stopping_patience and not (settings.val_size or settings.val_dataset):
        messages.append(
            Message("early_stopping_patience needs an evaluation: give val_size or val_dataset")
        )
    messages += optimizers.mistakes(settings, load.pick_device())
    messages += [
        Message(
            "report_to is {value}, but must be one of {names}",
            value=w,
            names=", ".join((*TRACKERS, "none")),
        )
        for w in settings.report_to
        if w not in (*TRACKERS, "none")
    ]
    messages += [
        f"report_to: {w} is not installed (pip install {w})"
        for w in settings.report_to
        if w in TRACKERS and find_spec(w) is None
    ]
    allowed = (*RESULT_SETTINGS, "data")
    messages += [
        f"allow_changes: {w} is not among {', '.join(allowed)}"
        for w in settings.allow_changes
        if w not in allowed
    ]
    return messages


def _template(
    settings: TrainSettings, named: dict[str, Any], start: StartingPoint, tokenizer: Tokenizer
) -> Template:
    """The adapter's template if the run starts from one; else the one of the settings."""
    saved = start.adapter.meta.get("template") if start.adapter else None
    if not saved:
        return find_template(settings.template, tokenizer.data)
    of_adapter = template_from_dict(saved)
    if "template" not in named:
        return of_adapter
    of_settings = find_template(settings.template, tokenizer.data)
    if of_settings.digest == of_adapter.digest:
        return of_adapter
    if "template" in settings.allow_changes:
        return of_settings
    raise UserError(
        "the adapter was trained with template {name}, not {asked}",
        name=of_adapter.name,
        asked=of_settings.name,
        where="template",
        fix="Leave out --template, or add --allow_changes template.",
    )


def _inference_template(
    settings: TrainSettings, renderer: Renderer, split: datasets.Split, console: RunConsole
) -> Template:
    """The template that inference will use: with thoughts if most records have one."""
    template = renderer.template
    if template.date:
        console.say(f"template {template.name} states the date {template.date}, in inference too")
    if settings.thinking != "auto":
        return template
    count = len(split.dataset)
    sampled = range(0, count, max(1, count // 256))
    share = share_of_thoughts((split.dataset[i] for i in sampled), renderer)
    if share:
        for line in differences(renderer, thoughts=True):
            console.say(f"template {template.name}: {line}")
        console.say(
            f"thinking: {share:.0%} of the records have a thought; the adapter answers "
            f"{'with' if share > 0.5 else 'without'} one unless --thinking says otherwise"
        )
    return template.choose("on" if share > 0.5 else "off", settings.thinking_loss)


def _data(
    settings: TrainSettings, renderer: Renderer, run: RunFolder, console: RunConsole, keep: bool
) -> datasets.Split:
    """The data; its report is written before anything can go wrong, unless `keep`."""
    with console.working("reading data") as say:
        dataset, report = datasets.load(settings.dataset, settings, renderer, say)
        val_dataset = None
        if settings.val_dataset:
            val_dataset, val_report = datasets.load(settings.val_dataset, settings, renderer, say)
            report.files += val_report.files
    console.print(report.rich_table())
    if not keep:
        run.write_json("data.json", report.to_json())
    split = datasets.split(
        dataset, report, settings.dataset, settings.val_size, settings.batch_size, settings.seed,
        val_dataset,
    )  # fmt: skip
    for note in split.notes:
        console.say(note)
    return split


def _hardware(
    settings: TrainSettings,
    named: dict[str, Any],
    start: StartingPoint,
    folder: Path,
    longest: int,
    console: RunConsole,
) -> Hardware:
    """A resumed run goes on as it was: its checkpoint has its micro-batch."""
    device = load.pick_device()
    if start.kind == "resume" and start.state is not None:
        return defaults_for(settings, device)
    return plan_hardware(settings, named, folder, longest, device, console.say, console.warn)


def _longest(settings: TrainSettings, split: datasets.Split) -> int:
    """Tokens of the longest example."""
    longest = int(split.dataset.column("length").clip(max=settings.cutoff_len).max())
    return max([longest, *(len(e.ids) for e in split.validation)])


def _trainable(
    hardware: Hardware, start: StartingPoint, folder: Path, longest: int, console: RunConsole
) -> tuple[TrainableModel, int]:
    settings, device, chosen = hardware.settings, hardware.device, hardware.precision
    if start.adapter is not None:
        for note in adapters.check_belongs(start.adapter, folder, settings.allow_other_base):
            console.warn(note)
    with console.working("loading the base"):
        model = load.load_base(folder, chosen, device)
        context = load.context_length(model)
        if longest > context:
            raise UserError(
                "examples have up to {longest} tokens, but the base's context length is {context}",
                longest=longest,
                context=context,
                where="cutoff_len",
                fix="Use --cutoff_len {context}.",
            )
        lora = adapters.LoraSettings(
            settings.lora_rank,
            settings.lora_alpha,
            settings.lora_dropout,
            tuple(settings.lora_target),
            settings.use_rslora,
        )
        if start.adapter is not None:
            peft = adapters.attach_saved(model, start.adapter, settings.lora_dropout)
            if start.kind == "resume" and start.state is not None:
                _name_alike(peft, start.adapter)
        else:
            peft = adapters.attach(model, lora, settings.seed, _base_name(settings.model, folder))
            if lora.target == ("all",) and (layers := lora_targets.words(peft.get_base_model())):
                console.say(f"lora_target all: {layers}")
        peft.peft_config["default"].base_model_name_or_path = _base_name(settings.model, folder)
        peft.to(device)
    inner = int(getattr(model.config, "intermediate_size", 0) or 4096)
    if reason := elementwise.choose(settings.kernels, device, chosen.dtype, inner):
        console.say(f"kernels: {reason}")
    trainable = TrainableModel(
        peft, device, checkpointing=settings.gradient_checkpointing, longest=longest
    )
    trainable.dropout.seed = settings.seed
    with console.working("trying the base on a few tokens"):
        for line in forward_choice.settle(trainable):
            console.say(line)
    if trainable.llama is None:
        fused_lora.install(peft)
    if settings.lora_dropout:
        dropout.install(peft, settings.lora_dropout, trainable.dropout)
    trainable.packed_attention()
    peft.train()
    return trainable, context


def _name_alike(peft: Any, saved: adapters.AdapterFiles) -> None:
    """Name the adapted layers as the checkpoint does: in full if the run was started with `all`,
    so that a resumed run's adapter_config.json has the bytes of one that was never stopped."""
    noted = read_json(saved.path / CONFIG).get("target_modules")
    if isinstance(noted, list):
        peft.peft_config["default"].target_modules = set(noted)


def _base_name(model: str, folder: Path | None = None) -> str:
    """The base's name in an adapter: one that plain PEFT finds, if there is one."""
    path = Path(model)
    if path.exists():
        return str(path.resolve())
    return str(folder) if folder is not None and "/" not in model else model


def _sampler(
    settings: TrainSettings,
    trainable: TrainableModel,
    renderer: Renderer,
    context: int,
    run: RunFolder,
    console: RunConsole,
) -> Sampler | None:
    """What answers the sample prompts; None if there are none."""
    prompts = _sample_prompts(settings)
    if not prompts:
        return None
    from vicuna.train.samples import Sampler

    return Sampler(prompts, settings, trainable, renderer, context, run, console)


def _sample_prompts(settings: TrainSettings) -> list[str]:
    """The sample prompts themselves; a .txt file has one a line."""
    prompts: list[str] = []
    for prompt in settings.sample_prompts:
        path = Path(prompt)
        if len(prompt) < 240 and path.suffix == ".txt" and path.is_file():
            prompts += [p for p in path.read_text(encoding="utf-8").splitlines() if p.strip()]
        else:
            prompts.append(prompt)
    return prompts


def _announce(training: Training, renderer: Renderer, precision: load.Chosen) -> None:
    """Print what is about to be trained."""
    state, settings, say = training.state, training.settings, training.console.say
    parameters = sum(p.numel() for p in training.parameters.values())
    say(
        f"base {settings.model} in {precision.precision} on {training.trainable.device}: "
        f"{precision.reason}"
    )
    say(
        f"template {renderer.template.name}, answers end with "
        f"{renderer.tokenizer.token(renderer.end_id)}; {parameters:,} trainable parameters"
    )
    say(
        f"{training.split.train_examples:,} examples, {settings.batch_size} in a step: "
        f"{state.total - state.step:,} steps, {state.warmup} of them warm-up"
    )
    few = state.total < 20 and not settings.max_steps and settings.batch_size > 4
    if few and not training.resumed:
        smaller = max(1, settings.batch_size * state.total // 60)
        training.console.warn(
            Message(
                "only {total} steps: little will be learned; --batch_size {smaller} or "
                "more --num_train_epochs make more of the same data",
                total=state.total,
                smaller=smaller,
            )
        )
    if training.resumed:
        say(f"resumed after step {state.step}")
