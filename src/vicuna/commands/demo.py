"""`vicuna demo`: the whole job in small: train the embedded base on one skill, count right answers.

The base comes with the package, an English model of 135 million parameters. Nothing makes it a
Chinese assistant; but it can learn to find the fields of a short Chinese sentence, and there an
answer is right or wrong. So it answers sentences of the eval set before and after, and the right
answers are counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vicuna import config
from vicuna.data.conversation import Conversation
from vicuna.data.records.formats import parse
from vicuna.data.records.read_file import read
from vicuna.errors import UserError
from vicuna.model.base import EMBEDDED
from vicuna.paths import shell_word
from vicuna.train.progress import RunConsole

if TYPE_CHECKING:
    from vicuna.data.templates.renderer import Renderer
    from vicuna.generate.engines.base import Engine
    from vicuna.train.loop import Outcome

_MARK = ".vicuna-demo"
_TRAINING, _EVAL = "orders_zh.jsonl", "orders_heldout_zh.jsonl"
SHOWN = 3  # questions whose answers are shown
ROWS = 20  # questions answered side by side
ANSWER_TOKENS = 40  # of the longest answer; a right one has about 25
EVAL_RECORDS = 20  # that the eval loss is computed on
QUICK = 6  # questions of the short form
QUICK_STEPS = 4

_WHAT = """\
The embedded base (SmolLM2-135M-Instruct) learned English. It is now taught one narrow skill: to
extract who, what and how many from a Chinese sentence, as JSON. First it answers untrained."""

_LEARNED = """
This is a small English model that learned one narrow skill from {records} examples. The
sentences above are not among them. It is not a Chinese assistant and cannot become one;
for that take your own data and a base of today:

  vicuna train --model Qwen/Qwen3-4B --dataset my.jsonl --output_dir runs/mine

Ask what was trained here yourself:

  vicuna generate --adapter {folder} "{ask}" --input_text "奶奶昨天买了三斤橘子。"
"""

_SHORT = """
This was the short form, to see that everything works: {steps} steps teach little.
The whole demo takes a few minutes:  vicuna demo
"""


class Answers(NamedTuple):
    """How many questions were answered exactly right, and the first answers as they came."""

    right: int
    shown: list[str]


def run(argv: Sequence[str]) -> int:
    """Ask, train, ask again, and say how to go on; returns the exit code."""
    settings, _ = config.parse(config.DemoSettings, argv)
    console = RunConsole()
    folder = Path(settings.output_dir)
    _make_room(folder)
    samples = Path(str(resources.files("vicuna.samples")))
    asked = _conversations(samples / _EVAL)[: QUICK if settings.quick else None]
    console.say(_WHAT)
    with console.working("the base answers"):
        before = answers(asked)
    console.say(f"exactly right before training: {before.right} of {len(asked)}\n")
    outcome = _train(settings, samples, console)
    if not outcome.finished:
        console.say(f"stopped; resume with:  vicuna train --resume {shell_word(folder)}")
        return 130
    with console.working("the trained model answers"):
        after = answers(asked, adapter=str(folder))
    _show(console, asked, before, after)
    ask = asked[0].turns[-2].text
    records = sum(1 for _ in read(samples / _TRAINING, []))
    closing = _SHORT if settings.quick else _LEARNED
    console.say(
        closing.format(records=records, folder=shell_word(folder), ask=ask, steps=outcome.step)
    )
    first, last = outcome.first_eval, outcome.best_eval
    assert first is not None
    assert last is not None
    console.say(f"eval loss: {first:.4f} before, {last:.4f} after {outcome.step} steps")
    console.say(
        f"eval answers exactly right: {before.right} of {len(asked)} before, "
        f"{after.right} of {len(asked)} after"
    )
    if last >= first:
        raise UserError(
            "the held-out loss did not fall: on this machine training does not work as it should",
            where=str(folder),
            fix="vicuna doctor says what this machine has; --debug shows what libraries say.",
        )
    return 0


def answers(asked: Sequence[Conversation], adapter: str = "") -> Answers:
    """What the embedded base answers, with an adapter or as it is: greedily, as `vicuna generate
    --max_new_tokens 40` does.

    Args:
        asked: conversations that end with the right answer.
        adapter: a run's folder; "": the base alone.
    """
    from vicuna.generate.decode import complete
    from vicuna.generate.load import open_model
    from vicuna.generate.settings import Settings

    given = {"model": EMBEDDED, "adapter": adapter}
    loaded = open_model(config.build(config.AnswerSettings, given))
    engine, renderer = loaded.engine, loaded.renderer
    prompts = [renderer.prompt(conversation.turns[:-1]) for conversation in asked]
    right = [conversation.turns[-1].text for conversation in asked]

    right_ones = sum(
        _right(engine, renderer, prompts[at : at + ROWS], right[at : at + ROWS])
        for at in range(0, len(asked), ROWS)
    )
    greedy = Settings(max_new_tokens=ANSWER_TOKENS)
    shown = [complete(engine, prompt, greedy, renderer).text for prompt in prompts[:SHOWN]]
    return Answers(right_ones, shown)


def _right(
    engine: Engine, renderer: Renderer, prompts: Sequence[Sequence[int]], right: Sequence[str]
) -> int:
    """How many of these prompts are answered exactly right."""
    from vicuna.generate.batched_greedy import answer_together

    def right_so_far(number: int, text: str) -> bool:
        # A wrong answer is known by its first wrong character: the rest need not be computed.
        return right[number].startswith(text)

    found = answer_together(engine, prompts, ANSWER_TOKENS, renderer, go_on=right_so_far)
    return sum(answer.text == wanted for answer, wanted in zip(found, right))


def _train(settings: config.DemoSettings, samples: Path, console: RunConsole) -> Outcome:
    """The run: the recipe `demo` on the package's records."""
    from vicuna.train.setup import prepare

    eval_set = {"path": str(samples / _EVAL), "max_samples": EVAL_RECORDS}
    recipe = config.read_recipe(config.builtin_recipes()["demo"])
    recipe |= {
        "dataset": [str(samples / _TRAINING)],
        "val_dataset": [eval_set],
        "output_dir": settings.output_dir,
        "seed": settings.seed,
    }
    if settings.quick:
        recipe |= {"max_steps": QUICK_STEPS, "val_dataset": [{**eval_set, "max_samples": QUICK}]}
    training = prepare(config.build(config.TrainSettings, recipe), recipe, console)
    try:
        return training.run()
    finally:
        training.close()


def _conversations(path: Path) -> list[Conversation]:
    """The records of a file of the package."""
    found = [parse(raw).conversation for raw in read(path, [])]
    return [conversation for conversation in found if conversation is not None]


def _make_room(folder: Path) -> None:
    """Make the folder, and remove an older demo; never anything else."""
    from vicuna.train.run_folder import RunFolder

    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _MARK).exists():
            raise UserError(
                "this folder is not empty and does not hold a demo",
                where=str(folder),
                fix="Choose another --output_dir.",
            )
        RunFolder(folder).close()  # raises where a demo is running in it
        shutil.rmtree(folder)
    RunFolder(folder).close()
    (folder / _MARK).touch()


def _show(
    console: RunConsole, asked: Sequence[Conversation], before: Answers, after: Answers
) -> None:
    """The first questions and their answers, side by side."""
    from rich.markup import escape
    from rich.table import Table

    ask = asked[0].turns[-2].text
    table = Table(title=f"{ask}\nnot in the training data:", show_lines=True, title_justify="left")
    for title in ("sentence", "base", "with the adapter", "right answer"):
        table.add_column(title, ratio=1, overflow="fold")
    for conversation, *texts in zip(asked, before.shown, after.shown):
        question, answer = conversation.turns[-2:]
        table.add_row(*map(escape, (question.input, *texts, answer.text)))
    console.print()
    console.print(table, soft_wrap=False)
