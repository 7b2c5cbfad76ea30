"""The application that verbs are registered with, and what every verb does: errors, JSON."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import typer

from headway.errors import HeadwayError, Interrupted

__all__ = ["app", "group", "print_json", "verb"]

app = typer.Typer(
    name="headway",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Plans, predicts, simulates, runs and shares distributed deep-learning training.",
)


def group(name: str, text: str) -> typer.Typer:
    """Verbs of two words, like `simulate collective`: what their first word is registered as."""
    verbs = typer.Typer(no_args_is_help=True, help=text)
    app.add_typer(verbs, name=name)
    return verbs


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Errors of ours become a message and an exit code; a broken pipe is not an error."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        from headway.report.terminal import Terminal

        try:
            return function(*arguments, **keywords)
        except HeadwayError as error:
            Terminal().error(error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            Terminal().error(Interrupted("stopped by Ctrl-C"))
            raise typer.Exit(Interrupted.exit_code) from None
        except BrokenPipeError:
            # Whoever read our output has seen enough (`headway plan | head`).
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None

    return wrapped


def print_json(value: Any) -> None:
    """The answer for machines, on standard output."""
    data = msgspec.json.encode(value)
    sys.stdout.write(msgspec.json.format(data, indent=2).decode() + "\n")
