"""The program: its commands and its entry point. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mistral_fetch.cli import (
    bundle,
    cache,
    compare,
    completion,
    config,
    demo,
    doctor,
    export,
    fetch,
    lock,
    measure,
    mirror,
    mirror_check,
    pin,
    prune,
    publish,
    quantize,
    repair,
    run,
    seed,
    serve,
    show,
    sign,
    sync,
)
from mistral_fetch.cli.complete import without_help
from mistral_fetch.cli.options import show_error
from mistral_fetch.cli.terminal import open_missing_streams, write_err
from mistral_fetch.errors import ExitCode, UsageError
from mistral_fetch.version import __version__

_EPILOG = "Documentation: docs/ in the source. Exit codes: docs/exit-codes.md."

# Typer brings its own click from 0.26 on and shared one before; this is the UsageError of either.
_ClickUsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Knows commands of two words: ``mirror check URL`` beside ``mirror REF``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        two_words = " ".join(args[:2])
        if len(args) > 1 and two_words in self.commands:
            return two_words, self.commands[two_words], args[2:]
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Offer first words only; the second ones are offered behind them."""
        items = without_help(super().shell_complete(ctx, incomplete))
        return [item for item in items if " " not in item.value]


app = typer.Typer(
    name="mistral-fetch",
    cls=_Commands,
    help="Download, verify, keep, share and run open-weight models, Mistral 7B first.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _show_version(value: bool) -> None:
    if value:
        print(f"mistral-fetch {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Download, verify, keep, share and run open-weight models, Mistral 7B first."""


_GROUPS = (
    run,
    fetch,
    serve,
    lock,
    sync,
    measure,
    quantize,
    cache,
    pin,
    prune,
    repair,
    show,
    compare,
    publish,
    sign,
    seed,
    mirror,
    mirror_check,
    bundle,
    export,
    doctor,
    config,
    completion,
    demo,
)
for group in _GROUPS:
    group.register(app)


def main() -> None:
    """Run the command line; errors in it look like all others, so that scripts need to know one form only."""
    open_missing_streams()
    if "_MISTRAL_FETCH_COMPLETE" in os.environ:
        # The shells' protocols, which no other run needs.
        from typer.completion import completion_init  # type: ignore[attr-defined]

        completion_init()
    try:
        code = app(prog_name="mistral-fetch", standalone_mode=False)
    except _ClickUsageError as error:
        code = int(ExitCode.USAGE)
        if len(sys.argv) == 1:
            write_err(str(error))  # without arguments the "error" is the help text
        else:
            show_error(_usage_error(error), is_json="--json" in sys.argv)
    sys.exit(code)


def _usage_error(error: Any) -> UsageError:
    context = error.ctx
    usage = context.get_usage().removeprefix("Usage: ") if context else "mistral-fetch [OPTIONS] COMMAND"
    command = context.command_path if context else "mistral-fetch"
    return UsageError(
        error.format_message().removesuffix("."), detail=f"expected: {usage}", hint=f"type: {command} --help"
    )


if __name__ == "__main__":
    main()
