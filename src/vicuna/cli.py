"""The command `vicuna`: one short function a command.

Nothing heavy is imported here: `vicuna --help` must answer at once. A command's settings are the
fields of its class in `config/`; what stands behind the command is parsed there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from typing import Any, NoReturn

import typer

from vicuna import interrupts
from vicuna.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PIPE, UserError, write_error_file
from vicuna.terminal import say, say_traceback

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Fine-tune Llama-family models on Chinese instructions, and talk with the result.\n\n"
    "Each command: vicuna COMMAND [RECIPE.yaml] [--key value | key=value] ...; "
    "vicuna COMMAND --help lists its settings.",
)
data = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at data before training on it."
)
app.add_typer(data, name="data")
export = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Write a model for another program."
)
app.add_typer(export, name="export")
quantize = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Make a model small: 8, 4, 3 or 2 bits."
)
app.add_typer(quantize, name="quantize")
adapter = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at an adapter of any age; renew it."
)
app.add_typer(adapter, name="adapter")

_ANY: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}


def _words(context: typer.Context, settings: str, usage: str) -> list[str]:
    """What stands behind a command; answers --help from the settings themselves."""
    words = context.args
    if "--help" in words or "-h" in words:
        from vicuna import config
        from vicuna.commands.help import show

        show(getattr(config, settings), usage, context.command.help or "")
        raise typer.Exit()
    return words


@app.command(**_ANY)
def train(context: typer.Context) -> None:
    """Train a LoRA adapter on your data."""
    words = _words(context, "TrainSettings", "vicuna train [RECIPE.yaml] --dataset FILE")
    from vicuna.commands.train import run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def plan(context: typer.Context) -> None:
    """Say what memory a run needs, and whether it fits a device; needs no GPU and no weights."""
    words = _words(context, "PlanSettings", "vicuna plan [RECIPE.yaml] [--memory 11GiB]")
    from vicuna.commands.plan import run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def generate(context: typer.Context) -> None:
    """Answer one instruction, or a file of them."""
    words = _words(context, "GenerateSettings", 'vicuna generate --adapter RUN "instruction"')
    from vicuna.commands.generate import generate as run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def chat(context: typer.Context) -> None:
    """Talk in the terminal."""
    words = _words(context, "AnswerSettings", "vicuna chat --adapter RUN")
    from vicuna.commands.generate import chat as run

    raise typer.Exit(run(words))


@app.command("run", **_ANY)
def run_gguf(context: typer.Context) -> None:
    """Talk with a GGUF file on the CPU, computed by llama.cpp."""
    words = _words(context, "RunSettings", "vicuna run FILE.gguf [--adapter RUN]")
    from vicuna.commands.generate import run_file as run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def download(context: typer.Context) -> None:
    """Fetch a model, an adapter or a data set from a hub; goes on where it was interrupted."""
    words = _words(context, "DownloadSettings", "vicuna download OWNER/NAME")
    from vicuna.commands.download import run

    raise typer.Exit(run(words))


@export.command("gguf", **_ANY)
def export_gguf(context: typer.Context) -> None:
    """Write a base, a base with an adapter, or an adapter as a GGUF file for llama.cpp."""
    usage = "vicuna export gguf --model M --adapter RUN --type q4_k_m --output FILE.gguf"
    words = _words(context, "ExportSettings", usage)
    from vicuna.commands.export import run

    raise typer.Exit(run(words))


def _quantize(context: typer.Context, method: str) -> NoReturn:
    usage = f"vicuna quantize {method} --model M [--adapter RUN] --bits 4 --output_dir D"
    words = _words(context, "QuantizeSettings", usage)
    from vicuna.commands.quantize import run

    raise typer.Exit(run(method, words))


@quantize.command(**_ANY)
def gptq(context: typer.Context) -> None:
    """Round a model's weights one after another, each making up for the last (GPTQ)."""
    _quantize(context, "gptq")


@quantize.command(**_ANY)
def awq(context: typer.Context) -> None:
    """Round a model's weights to 4 bits, those with large inputs scaled first (AWQ)."""
    _quantize(context, "awq")


@quantize.command(**_ANY)
def bnb(context: typer.Context) -> None:
    """Write a model in 8 bits or nf4, as bitsandbytes loads it; needs no calibration."""
    _quantize(context, "bnb")


@app.command(**_ANY)
def merge(context: typer.Context) -> None:
    """Add adapters to the weights of their base: one model that needs no adapter."""
    words = _words(context, "MergeSettings", "vicuna merge --adapter RUN --output_dir FOLDER")
    from vicuna.convert.merge import run

    raise typer.Exit(run(words))


@app.command("convert", **_ANY)
def convert_model(context: typer.Context) -> None:
    """Write a model in another layout: Hugging Face's, or Meta's."""
    usage = "vicuna convert --model MODEL --to hf | meta --output_dir FOLDER"
    words = _words(context, "ConvertModelSettings", usage)
    from vicuna.commands.convert import run

    raise typer.Exit(run(words))


@adapter.command(**_ANY)
def inspect(context: typer.Context) -> None:
    """Say what an adapter is, and whether it is sound."""
    words = _words(context, "InspectSettings", "vicuna adapter inspect ADAPTER [--json]")
    from vicuna.commands.adapter import inspect as run

    raise typer.Exit(run(words))


@adapter.command(**_ANY)
def upgrade(context: typer.Context) -> None:
    """Write an adapter of any age as PEFT writes it today; the old one stays as it is."""
    words = _words(context, "UpgradeSettings", "vicuna adapter upgrade ADAPTER --output_dir FOLDER")
    from vicuna.commands.adapter import upgrade as run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def web(context: typer.Context) -> None:
    """Open the web page: chat, try adapters, look at data, train."""
    words = _words(context, "WebSettings", "vicuna web [--adapter RUN]")
    from vicuna.web.command import run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def demo(context: typer.Context) -> None:
    """Train the embedded base on the sample data and show what it learned."""
    words = _words(context, "DemoSettings", "vicuna demo")
    from vicuna.commands.demo import run

    raise typer.Exit(run(words))


@app.command(**_ANY)
def doctor(context: typer.Context) -> None:
    """Check a model's tokenizer and template, and what this machine has."""
    words = _words(context, "DoctorSettings", "vicuna doctor MODEL")
    from vicuna.commands.doctor import run

    raise typer.Exit(run(words))


@data.command(**_ANY)
def check(context: typer.Context) -> None:
    """Read files and say what is wrong with which record."""
    words = _words(context, "DataCommandSettings", "vicuna data check FILE ... [--json]")
    from vicuna.commands.data import check as run

    raise typer.Exit(run(words))


@data.command(**_ANY)
def stats(context: typer.Context) -> None:
    """Token lengths, and what each cutoff_len would lose."""
    words = _words(context, "DataCommandSettings", "vicuna data stats FILE ... [--json]")
    from vicuna.commands.data import stats as run

    raise typer.Exit(run(words))


@data.command(**_ANY)
def preview(context: typer.Context) -> None:
    """Show examples as the model will see them, trained tokens coloured."""
    words = _words(context, "PreviewSettings", "vicuna data preview FILE [--number 3]")
    from vicuna.commands.data import preview as run

    raise typer.Exit(run(words))


@data.command(**_ANY)
def convert(context: typer.Context) -> None:
    """Write any data format as another."""
    words = _words(context, "ConvertSettings", "vicuna data convert FILE --to messages --output F")
    from vicuna.commands.data_convert import convert as run

    raise typer.Exit(run(words))


@app.command()
def version() -> None:
    """Print the version."""
    from vicuna import __version__

    say(f"chinese-vicuna {__version__}")


def main() -> NoReturn:
    """Run a command; a user's mistake becomes a message and exit code 2, never a traceback."""
    debug = "--debug" in sys.argv or bool(os.environ.get("VICUNA_DEBUG"))
    sys.argv = [word for word in sys.argv if word != "--debug"]
    _quiet(debug)
    interrupts.catch()
    streams = sys.stdout, sys.stderr
    try:
        # Outside standalone mode typer hands the exit code of a command back.
        result = app(standalone_mode=False)
        code = result if isinstance(result, int) else 0
        if code == EXIT_INTERRUPTED and interrupts.caught():
            code = _interrupted(debug, None)  # typer has made an exit code of it
    except typer.Exit as e:
        code = e.exit_code
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else EXIT_MISTAKE
        if isinstance(e.__context__, BrokenPipeError):
            # Typer has made exit code 1 of it, and of the streams some that hide the next one.
            sys.stdout, sys.stderr = streams
            code = _failed(e.__context__, debug)
    except BaseException as e:
        code = _failed(e, debug)
    sys.exit(_flushed(code, debug))


def _failed(error: BaseException, debug: bool) -> int:
    """Say what went wrong; the exit code that says it to other programs."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return _interrupted(debug, error)
    if interrupts.caught() and not isinstance(error, UserError):
        return _interrupted(debug, error)  # libraries make other errors of it now and then
    if isinstance(error, BrokenPipeError):
        return EXIT_PIPE  # `| head` has read enough: nobody is left to be told
    if type(error).__name__ == "NoArgsIsHelpError":
        return _told(str(error), EXIT_MISTAKE)
    if debug:
        say_traceback(error)
    if hasattr(error, "format_message"):  # typer's own: an unknown command
        return _told(f"error: {error.format_message()}", EXIT_MISTAKE)
    from vicuna.system_errors import explain

    mistake = explain(error)
    if mistake is not None:
        write_error_file(mistake)
        return _told(f"error: {mistake}", EXIT_MISTAKE)
    return _told(
        f"error: this should not have happened: {type(error).__name__}: {error}\n"
        "Run it again with --debug",
        1,
    )


def _interrupted(debug: bool, error: BaseException | None) -> int:
    interrupts.leave_at_once()
    if debug and error is not None:
        say_traceback(error)
    return _told(interrupts.line(), EXIT_INTERRUPTED)


def _told(text: str, code: int) -> int:
    """The exit code; where nothing can be printed any more, it is all that is said."""
    with contextlib.suppress(OSError):
        say(text, error=True)
    return code


def _flushed(code: int, debug: bool) -> int:
    """The exit code after all that was printed has left: a full disk behind `>` may refuse it."""
    try:
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _failed(e, debug)
    return code


def _quiet(debug: bool = False) -> None:
    """Keep libraries from writing over what is said here, and from reporting anything anywhere."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Text of a pipe that is not UTF-8 arrives, and text that a terminal cannot show is replaced.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    if debug:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A logger without a handler of its own writes to the terminal, unless the root has one.
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        # Deprecations inside libraries are not the user's business; some turn them on again.
        warnings.simplefilter("ignore")
        warnings.showwarning = _unseen


def _unseen(*_: Any, **__: Any) -> None:
    """A warning that is not shown."""


if __name__ == "__main__":
    main()
