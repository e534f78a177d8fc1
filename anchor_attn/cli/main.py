"""`anchor-attn`: its commands, and what becomes of their errors."""

import os
import sys
from importlib.metadata import version
from typing import Any

import typer

from anchor_attn.cli.bench import bench_command
from anchor_attn.cli.compare import compare_command
from anchor_attn.cli.drift import drift_command
from anchor_attn.cli.mask import mask_command
from anchor_attn.cli.plan import plan_command
from anchor_attn.cli.probe import probe_command
from anchor_attn.cli.rope import rope_app
from anchor_attn.cli.train import train_command
from anchor_attn.results import CheckError

# Newer releases of typer carry a click of their own, older ones import it: the class is found, not imported.
UsageError: type[Any] = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

INTERRUPTED = 130

app = typer.Typer(
    name="anchor-attn",
    help="AnchorAttention for packed long-context training.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("compare")(compare_command)
app.command("drift")(drift_command)
app.command("probe")(probe_command)
app.command("bench")(bench_command)
app.command("mask")(mask_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.add_typer(rope_app, name="rope")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"anchor-attn {version('anchor-attn')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def show_help(
    context: typer.Context,
    show_version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_show_version
    ),
) -> None:
    """AnchorAttention for packed long-context training."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run a command: exit code 0, 1 when a check failed, 2 for bad input with one line on stderr.

    With ANCHOR_ATTN_TRACEBACK set, bad input shows its traceback too.
    """
    try:
        code = app(standalone_mode=False) or 0
    except UsageError as error:
        _fail(error.format_message(), 2)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except CheckError as error:
        _fail(str(error), 1)
    except (ValueError, TypeError, ImportError, OSError) as error:
        if os.environ.get("ANCHOR_ATTN_TRACEBACK"):
            raise
        _fail(str(error), 2)
    if code == INTERRUPTED:  # typer turns the exception into this code
        _fail("interrupted", INTERRUPTED)
    sys.exit(code)


def _fail(message: str, code: int) -> None:
    print(f"anchor-attn: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)
