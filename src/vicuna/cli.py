"""The command `vicuna`: a table of its commands, routing, help, and exit codes.

Nothing heavy is imported here, so that `vicuna --help` answers immediately. The settings of a
command are the fields of its class in `config/`; the command itself parses its arguments.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from vicuna import interrupts
from vicuna.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, EXIT_PIPE, UserError, write_error_file
from vicuna.terminal import say, say_traceback


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: one word, or two: a group and the command in it.
        function: `module:function` below `vicuna`; takes argv, returns the exit code.
        settings: the class in `vicuna.config` that lists its settings.
        usage: an example of a call, without `vicuna` and the name.
        help: one line.
    """

    name: str
    function: str
    settings: str
    usage: str
    help: str

    def run(self, argv: list[str]) -> int:
        """Run it, or show its help if that is asked for."""
        if "--help" in argv or "-h" in argv:
            from vicuna.commands.help import show

            settings = getattr(import_module("vicuna.config"), self.settings)
            show(settings, f"vicuna {self.name} {self.usage}".rstrip(), self.help)
            return 0
        return self.load()(argv)

    def load(self) -> Callable[[list[str]], int]:
        """The function itself."""
        module, function = self.function.split(":")
        return getattr(import_module(f"vicuna.{module}"), function)


GROUPS = {
    "data": "Check data before training on it.",
    "export": "Write a model for another program.",
    "quantize": "Quantize a model to 8, 4, 3 or 2 bits.",
    "adapter": "Inspect an adapter, or convert an old one to today's PEFT format.",
}
# fmt: off
COMMANDS = [
    Command("train", "commands.train:run", "TrainSettings",
            "[RECIPE.yaml] --dataset FILE",
            "Train a LoRA adapter on your data."),
    Command("plan", "commands.plan:run", "PlanSettings",
            "[RECIPE.yaml] [--memory 11GiB]",
            "Estimate the memory a run needs, and whether it fits; needs no GPU and no weights."),
    Command("generate", "commands.generate:generate", "GenerateSettings",
            '--adapter RUN "instruction"',
            "Answer one instruction, or a file of them."),
    Command("chat", "commands.generate:chat", "AnswerSettings",
            "--adapter RUN",
            "Chat in the terminal."),
    Command("run", "commands.generate:run_file", "RunSettings",
            "FILE.gguf [--adapter RUN]",
            "Chat with a GGUF file on the CPU, through llama.cpp."),
    Command("web", "web.command:run", "WebSettings",
            "[--adapter RUN]",
            "Open the web page: chat, try adapters, check data, train."),
    Command("download", "commands.download:run", "DownloadSettings",
            "OWNER/NAME",
            "Download a model, an adapter or a data set from a hub; resumes if interrupted."),
    Command("merge", "commands.merge:run", "MergeSettings",
            "--adapter RUN --output_dir FOLDER",
            "Merge adapters into their base: one model that needs no adapter."),
    Command("convert", "commands.convert:run", "ConvertSettings",
            "--model MODEL --to hf | meta --output_dir FOLDER",
            "Convert a model to Hugging Face's format, or to Meta's original checkpoint format."),
    Command("demo", "commands.demo:run", "DemoSettings",
            "",
            "Train the embedded base on the sample data and show what it learned."),
    Command("doctor", "commands.doctor:run", "DoctorSettings",
            "MODEL",
            "Check a model's tokenizer and template, and what this machine has."),
    Command("data check", "commands.data:check", "DataCheckSettings",
            "FILE ... [--json]",
            "Read files and report what is wrong with which record."),
    Command("data stats", "commands.data:stats", "DataCheckSettings",
            "FILE ... [--json]",
            "Token lengths, and what each cutoff_len would lose."),
    Command("data preview", "commands.data:preview", "DataPreviewSettings",
            "FILE [--number 3]",
            "Show examples as the model will see them, with trained tokens in colour."),
    Command("data convert", "commands.data_convert:convert", "DataConvertSettings",
            "FILE --to messages --output F",
            "Convert any data format to another."),
    Command("export gguf", "commands.export:run", "ExportSettings",
            "--model M --adapter RUN --type q4_k_m --output FILE.gguf",
            "Write a base, a base with an adapter, or an adapter as a GGUF file for llama.cpp."),
    Command("quantize gptq", "commands.quantize:gptq", "QuantizeSettings",
            "--model M [--adapter RUN] --bits 4 --output_dir D",
            "Quantize with GPTQ (calibrated, error-compensating)."),
    Command("quantize awq", "commands.quantize:awq", "QuantizeSettings",
            "--model M [--adapter RUN] --bits 4 --output_dir D",
            "Quantize with AWQ (calibrated, channels with large activations scaled first)."),
    Command("quantize bnb", "commands.quantize:bnb", "QuantizeSettings",
            "--model M [--adapter RUN] --bits 4 --output_dir D",
            "Quantize to int8 or nf4 for bitsandbytes; needs no calibration."),
    Command("adapter inspect", "commands.adapter:inspect", "AdapterInspectSettings",
            "ADAPTER [--json]",
            "Describe an adapter, and check that it is sound."),
    Command("adapter upgrade", "commands.adapter:upgrade", "AdapterUpgradeSettings",
            "ADAPTER --output_dir FOLDER",
            "Convert an adapter of any age to today's PEFT format; the original stays as it is."),
]
# fmt: on


def route(argv: Sequence[str]) -> int:
    """Run the command that argv names, or show help.

    Raises: UserError if there is no such command.
    """
    words = list(argv)
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if words[:1] in (["version"], ["--version"], ["-V"]):
        from vicuna import __version__

        say(f"chinese-vicuna {__version__}")
        return 0
    if not words or words[0] in ("--help", "-h"):
        say(overview(), error=not words)
        return 0 if words else EXIT_MISTAKE
    name, *rest = words
    if name in GROUPS:
        if not rest or rest[0] in ("--help", "-h"):
            say(overview(name), error=not rest)
            return 0 if rest else EXIT_MISTAKE
        name, rest = f"{name} {rest[0]}", rest[1:]
    command = next((c for c in COMMANDS if c.name == name), None)
    if command is None:
        raise _no_such_command(name)
    return command.run(rest)


def _no_such_command(name: str) -> UserError:
    import difflib

    # `gguf` alone is near `export gguf`, too.
    names = {c.name.split()[-1]: c.name for c in COMMANDS}
    names |= {n: n for n in [*GROUPS, *(c.name for c in COMMANDS)]}
    near = " or ".join(names[n] for n in difflib.get_close_matches(name, names, n=2))
    fix = "Did you mean {near}?" if near else "vicuna --help lists the commands."
    return UserError("no such command: {name}", name=name, near=near, fix=fix)


def overview(group: str = "") -> str:
    """The help of `vicuna`, or of a group of commands."""
    rows = [(c.name, c.help) for c in COMMANDS if c.name.partition(" ")[0] == group]
    if not group:
        rows = [(c.name, c.help) for c in COMMANDS if " " not in c.name]
        rows += [*GROUPS.items(), ("version", "Print the version."), ("help", "Show this.")]
    width = max(len(name) for name, _ in rows) + 2
    about = GROUPS.get(group) or (
        "Fine-tune Llama-family models on Chinese instructions, and chat with the result."
    )
    usage = f"vicuna {group or 'COMMAND'} {'COMMAND ' if group else ''}[RECIPE.yaml]"
    return "\n".join(
        [
            about,
            "",
            f"{usage} [--key value | key=value] ...",
            "",
            *(f"  {name:{width}}{text}" for name, text in rows),
            "",
            f"vicuna {group + ' ' if group else ''}COMMAND --help lists the settings of a command; "
            "--debug shows tracebacks.",
        ]
    )


def main() -> NoReturn:
    """Run a command; a user's mistake becomes a message and exit code 2, never a traceback."""
    argv = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(argv) < len(sys.argv) - 1 or bool(os.environ.get("VICUNA_DEBUG"))
    sys.argv[1:] = argv
    _silence(debug)
    interrupts.catch()
    try:
        code = route(argv)
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else EXIT_MISTAKE
    except BaseException as e:
        code = _failed(e, debug)
    sys.exit(_flushed(code, debug))


def _failed(error: BaseException, debug: bool) -> int:
    """Say what went wrong; the exit code that says it to other programs."""
    if isinstance(error, KeyboardInterrupt):
        return _interrupted(debug, error)
    if interrupts.caught() and not isinstance(error, UserError):
        return _interrupted(debug, error)  # some libraries turn a Ctrl-C into another error
    if isinstance(error, BrokenPipeError):
        return EXIT_PIPE  # `| head` has read enough, and nobody else would read a message
    if debug:
        say_traceback(error)
    from vicuna.system_errors import explain

    mistake = explain(error)
    if mistake is not None:
        write_error_file(mistake)
        return _say_error(f"error: {mistake}", EXIT_MISTAKE)
    return _say_error(
        f"internal error: {type(error).__name__}: {error}\n"
        "Please report it; --debug shows the traceback.",
        1,
    )


def _interrupted(debug: bool, error: BaseException) -> int:
    interrupts.leave_at_once()
    if debug:
        say_traceback(error)
    return _say_error(interrupts.line(), EXIT_INTERRUPTED)


def _say_error(text: str, code: int) -> int:
    """The exit code; if nothing can be printed any more, it is the whole message."""
    with contextlib.suppress(OSError):
        say(text, error=True)
    return code


def _flushed(code: int, debug: bool) -> int:
    """The exit code once all output has been written: a full disk behind `>` may refuse it."""
    try:
        sys.stdout.flush()
    except OSError as e:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or _failed(e, debug)
    return code


def _silence(debug: bool = False) -> None:
    """Keep libraries from writing between this program's lines, and from sending telemetry."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # Bytes from a pipe that are not UTF-8 pass through; what a terminal cannot show is replaced.
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
    if debug:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # A logger without a handler of its own writes to the terminal, unless the root has one.
    logging.getLogger().addHandler(logging.NullHandler())
    if not sys.warnoptions:
        # Deprecations inside libraries do not concern the user; some libraries re-enable them.
        warnings.simplefilter("ignore")
        warnings.showwarning = _ignore_warning


def _ignore_warning(*_: Any, **__: Any) -> None:
    """Show nothing."""


if __name__ == "__main__":
    main()
