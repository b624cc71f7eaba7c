"""The command line. Heavy imports happen inside the commands: help, lists and mistakes answer at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from bench import __version__
from bench.commands import agree, costs, evaluate, images, run, search, store, tables
from bench.errors import BenchError, UsageError, did_you_mean, printable
from bench.runtime import failures, processes


class Commands(click.Group):
    """Lists commands in the order they are used, and knows what a mistyped one was meant to be."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            raise UsageError(f"unknown command '{args[0]}'{did_you_mean(args[0], known)}; commands: {', '.join(known)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:  # click takes it for the end of its terminal; here it is a file that is cut short
            raise BenchError(f"EOFError: {error} (BENCH_DEBUG=1 shows where)") from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="bench")
def cli() -> None:
    """Train, sample, score and compare alignment methods for text-to-image diffusion models."""


for command in (
    run.run,
    evaluate.evaluate,
    tables.report,
    tables.table,
    images.score,
    tables.list_command,
    images.export,
    images.sample,
    agree.agree,
    store.verify,
    costs.plan,
    costs.perf,
    costs.doctor,
    search.search,
):
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a mistake or a failure is one line on stderr, with BENCH_DEBUG=1 the whole trace."""
    if os.environ.get("BENCH_DEBUG"):
        cli.main(arguments, prog_name="bench")
    try:
        with failures.stopping_in_order():
            sys.exit(cli.main(arguments, prog_name="bench", standalone_mode=False) or 0)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(2)
    except click.ClickException as error:
        hint = f"; see {error.ctx.command_path} --help" if getattr(error, "ctx", None) else ""
        _fail(error.format_message().rstrip(".") + hint, error.exit_code)
    except BenchError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:
        _fail(failures.stopped(error), 130)
    except BrokenPipeError:
        # The reader has gone, as in `bench table | head`; nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(failures.explained(error) or f"{type(error).__name__}: {error} (BENCH_DEBUG=1 shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    processes.fail(printable(f"bench: {' '.join(message.split())}"), code)


if __name__ == "__main__":
    main()
