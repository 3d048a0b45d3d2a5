"""The program: its commands and its entry point. Heavy libraries are imported by the commands that need them."""

from __future__ import annotations

from typing import Annotated

import typer

from mistral_fetch import __version__
from mistral_fetch.cli import cache, demo, doctor, fetch, publish, show

_EPILOG = "Documentation: docs/ in the source. Exit codes: docs/exit-codes.md."

app = typer.Typer(
    name="mistral-fetch",
    help="Download, verify, keep, share and run open-weight models, Mistral 7B first.",
    epilog=_EPILOG,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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


for group in (fetch, cache, show, publish, doctor, demo):
    group.register(app)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
