"""`vicuna demo`: the main job, small: train the embedded base and show what changed.

It shows that the whole way works, on a model that everybody has. It does not show a good Chinese
assistant: 135 million parameters that learned English cannot become one.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from vicuna import config
from vicuna.errors import UserError
from vicuna.train.screen import Screen

_MARK = ".vicuna-demo"
QUESTIONS = 3
ANSWER_TOKENS = 40


def run(words: Sequence[str]) -> int:
    """Train, compare, and say how to go on; returns the exit code."""
    settings, _ = config.parse(config.DemoSettings, words)
    screen = Screen()
    folder = Path(settings.output_dir)
    _make_room(folder)
    samples = Path(str(resources.files("vicuna.samples")))
    recipe = config.read_recipe(config.builtin_recipes()["tiny"])
    recipe |= {
        "dataset": [str(samples / "instruct_zh.jsonl"), str(samples / "chat_zh.jsonl")],
        "val_dataset": [str(samples / "heldout_zh.jsonl")],
        "output_dir": str(folder),
        "seed": settings.seed,
    }
    if settings.quick:
        few = {"path": str(samples / "heldout_zh.jsonl"), "max_samples": 8}
        recipe |= {"max_steps": 3, "eval_steps": 3, "val_dataset": [few]}
    training = config.build(config.TrainSettings, recipe)
    screen.say("Training the embedded base (SmolLM2-135M-Instruct, English) on the sample data.\n")
    from vicuna.train.loop import Training
    from vicuna.train.setup import prepare

    session = prepare(training, recipe, screen)
    (folder / _MARK).touch()
    try:
        loop = Training(session)
        outcome = loop.run()
        if outcome.finished:
            tokens = 12 if settings.quick else ANSWER_TOKENS
            _compare(session, screen, samples / "heldout_zh.jsonl", tokens)
    finally:
        session.run.close()
    if not outcome.finished:
        screen.say(f"stopped; go on with:  vicuna train --resume {folder}")
        return 130
    before, after = outcome.first_eval, outcome.best_eval
    assert before is not None
    assert after is not None
    screen.say(f"\nheld-out loss: {before:.4f} before, {after:.4f} after {outcome.step} updates")
    screen.say(f"adapter:       {session.run.adapter}")
    screen.say(f"loss plot:     {folder / 'loss.png'}")
    screen.say(
        "\nWhat this shows: data, training, checkpoints and answers work on this machine, and the"
        "\nloss on questions the model never saw goes down. What it does not show: good Chinese; a"
        "\n135M English model does not become a Chinese assistant. For that take a 7B base:"
        "\n\n  vicuna train instruct-7b --dataset my.jsonl --output_dir runs/mine"
        f"\n\nTalk with the demo's result:\n\n  vicuna chat --adapter {folder}"
    )
    return 0 if after < before else 1


def _make_room(folder: Path) -> None:
    """Remove an older demo; never anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / _MARK).exists():
        raise UserError(
            "this folder is not empty and does not hold a demo",
            where=str(folder),
            fix="Choose another --output_dir.",
        )
    from vicuna.train.runfolder import RunFolder

    RunFolder(folder).close()  # raises where a demo is running in it
    shutil.rmtree(folder)


def _compare(session: Any, screen: Screen, held_out: Path, tokens: int) -> None:
    """Held-out questions answered by the base and by the adapter, side by side."""
    from rich.table import Table

    from vicuna.data.formats import parse
    from vicuna.data.read import read
    from vicuna.generate.decode import complete
    from vicuna.generate.engines.torch import open_engine
    from vicuna.generate.settings import Settings

    records = [parse(raw).conversation for raw, _ in zip(read(held_out, []), range(QUESTIONS))]
    choice = Settings(max_new_tokens=tokens, repetition_penalty=1.1)
    table = Table(title="questions held out from training", show_lines=True, title_justify="left")
    for title in ("question", "base", "with the adapter", "written by people"):
        table.add_column(title, ratio=1)
    learner = session.learner
    learner.plain_attention()
    for record in records:
        assert record is not None
        question = record.turns[:-1]
        answers = []
        for with_adapter in (False, True):
            engine = open_engine(learner.model, session.context)
            ids = session.renderer.prompt(question)
            if with_adapter:
                answers.append(complete(engine, ids, choice, session.renderer).text)
            else:
                with learner.model.disable_adapter():
                    answers.append(complete(engine, ids, choice, session.renderer).text)
        table.add_row(question[-1].text, *answers, record.turns[-1].text)
    screen.console.print()
    screen.console.print(table, soft_wrap=False)
