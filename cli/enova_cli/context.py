"""What every command shares: the options of the group, a client, and errors turned into exit codes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import click

from enova_cli.client import Client
from enova_cli.output import Format, print_error
from enova_common.errors import EnovaError, NotFound, TimedOut, Unavailable
from enova_common.settings import TlsSettings

T = TypeVar("T")

EXIT_ERROR = 1
EXIT_USAGE = 2  # click's own
EXIT_UNREACHABLE = 3
EXIT_NOT_FOUND = 4
EXIT_TIMED_OUT = 5
EXIT_INTERRUPTED = 130


@dataclass(slots=True)
class Context:
    """The options of the group: where the coordinators are, how to trust them, what to print."""

    endpoints: list[str]
    tls: TlsSettings | None
    form: Format = Format.TABLE

    def run(self, action: Callable[[Client], Awaitable[T]]) -> T:
        """Run a command's coroutine with a client."""

        async def with_client() -> T:
            async with Client(self.endpoints, self.tls) as client:
                return await action(client)

        return run(with_client(), self.form)


def run(action: Coroutine[Any, Any, T], form: Format) -> T:
    """Run a coroutine; an EnovaError is printed and becomes the exit code that its kind stands for."""
    try:
        return asyncio.run(action)
    except EnovaError as error:
        fail(error, form)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe (head, less) left: nobody is there to be told.
        sys.stderr.close()
        sys.exit(EXIT_ERROR)


def fail(error: EnovaError, form: Format) -> NoReturn:
    """Print the error and exit."""
    print_error(error, form)
    sys.exit(exit_code(error))


def exit_code(error: EnovaError) -> int:
    """The exit code of an error, by its kind."""
    match error:
        case TimedOut():
            return EXIT_TIMED_OUT
        case Unavailable():
            return EXIT_UNREACHABLE
        case NotFound():
            return EXIT_NOT_FOUND
        case _:
            return EXIT_ERROR


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`-o table|json|yaml` on a command; overrides the group's."""

    def store(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
        if value is not None:
            ctx.find_object(Context).form = Format(value)  # type: ignore[union-attr]

    return click.option(
        "-o",
        "--output",
        type=click.Choice([form.value for form in Format]),
        callback=store,
        expose_value=False,
        is_eager=True,
        help="What to print (table).",
    )(command)


pass_context = click.make_pass_decorator(Context)
