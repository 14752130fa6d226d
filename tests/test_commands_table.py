"""The table of commands: every function and settings class in it exists; help names every setting."""

from __future__ import annotations

import pytest

from vicuna import cli, config
from vicuna.errors import UserError


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: c.name)
def test_what_a_row_names_exists(command: cli.Command) -> None:
    assert callable(command.load())
    assert issubclass(getattr(config, command.settings), config.Settings)
    group, _, name = command.name.partition(" ")
    assert (group in cli.GROUPS) == bool(name)


def test_a_command_has_one_row() -> None:
    names = [command.name for command in cli.COMMANDS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_the_overview_has_every_command_and_group(argv: list[str], capsys) -> None:
    assert cli.route(argv) == 0
    shown = capsys.readouterr().out
    for name in [c.name for c in cli.COMMANDS if " " not in c.name] + list(cli.GROUPS):
        assert f"\n  {name} " in shown


def test_without_a_command_the_overview_is_an_error(capsys) -> None:
    assert cli.route([]) == 2
    assert cli.route(["data"]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert "data preview" in told.err


@pytest.mark.parametrize(
    "argv", [["help", "data", "check"], ["data", "check", "--help"], ["help", "train"]]
)
def test_help_of_a_command_lists_its_settings(argv: list[str], capsys) -> None:
    assert cli.route(argv) == 0
    assert "--cutoff_len" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "near"),
    [("trian", "train"), ("data chek", "data check"), ("gguf", "export gguf"), ("exprt", "export")],
)
def test_an_unknown_command_gets_the_nearest_names(argv: str, near: str) -> None:
    with pytest.raises(UserError, match="no such command") as error:
        cli.route(argv.split())
    assert near in error.value.fix


def test_the_version_is_printed(capsys) -> None:
    for argv in (["--version"], ["version"]):
        assert cli.route(argv) == 0
    assert capsys.readouterr().out.count("chinese-vicuna ") == 2
