"""What every command has in common: its options, its settings, and how its errors end.

A command is a plain function that takes a :class:`FrontEnd` first. ``@command`` adds the shared options to
its signature, builds the front end from them and turns errors into three lines and an exit code.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Annotated, Any

import typer

from mistral_fetch.cli.choices import ProgressMode, Via
from mistral_fetch.config import Settings, load_settings
from mistral_fetch.errors import ExitCode, Interrupted, MistralFetchError

_SHARED = {
    "json": Annotated[bool, typer.Option("--json", help="Print one JSON result on standard output.")],
    "progress": Annotated[ProgressMode, typer.Option("--progress", help="How to show progress, on standard error.")],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result and errors.")],
    "no_color": Annotated[bool, typer.Option("--no-color", help="No colours (also NO_COLOR).")],
    "offline": Annotated[bool | None, typer.Option("--offline", help="Never open a socket.", show_default=False)],
    "home": Annotated[str | None, typer.Option("--home", help="The cache's directory.", metavar="DIR")],
}
_SHARED_DEFAULTS: dict[str, Any] = {
    "json": False,
    "progress": ProgressMode.AUTO,
    "quiet": False,
    "no_color": False,
    "offline": None,
    "home": None,
}
_TRANSFER = {
    "via": Annotated[
        Via | None,
        typer.Option("--via", help="Sources to use: mirrors, the swarm, or what there is.", show_default="auto"),
    ],
    "min_assurance": Annotated[
        str | None,
        typer.Option(
            "--min-assurance",
            help="Weakest proof a file may have: size, md5, btv1, gitsha1, btv2, sha256 or signed.",
            metavar="LEVEL",
            show_default="btv1",
        ),
    ],
    "peers": Annotated[
        list[str] | None, typer.Option("--peer", help="A torrent peer to connect to.", metavar="HOST:PORT")
    ],
    "dht": Annotated[
        bool | None, typer.Option("--dht/--no-dht", help="Look for peers in the public DHT.", show_default="no-dht")
    ],
    "lock_timeout": Annotated[
        float | None,
        typer.Option(
            "--lock-timeout", help="How long to wait for another process.", metavar="SECONDS", show_default="600"
        ),
    ],
}


@dataclass
class FrontEnd:
    """One command's settings and its way of talking."""

    settings: Settings
    origins: Mapping[str, str]
    is_json: bool
    progress: ProgressMode
    is_quiet: bool
    has_color: bool

    def result(self, fields: Mapping[str, Any] | list[Any], text: str) -> None:
        """Print the command's result: JSON when asked for, otherwise ``text``. Nothing else goes to stdout."""
        print(json.dumps(fields, indent=1, ensure_ascii=False) if self.is_json else text, flush=True)

    def note(self, text: str) -> None:
        """Print a line for people on standard error."""
        if not self.is_quiet:
            print(text, file=sys.stderr, flush=True)

    def reporter(self) -> Any:
        """Return a context manager that shows the events it is called with."""
        from mistral_fetch.cli.render import open_reporter

        return open_reporter(self.progress, is_quiet=self.is_quiet, has_color=self.has_color)


def command(
    app: typer.Typer, name: str, *, transfer: bool = False, epilog: str = "", hidden: bool = False
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a function as a command; its first parameter is a :class:`FrontEnd`, its result an exit code."""

    def decorate(function: Callable[..., int | None]) -> Callable[..., None]:
        extra = {**(_TRANSFER if transfer else {}), **_SHARED}

        def run(**given: Any) -> None:
            common = {option: given.pop(option) for option in extra}
            raise typer.Exit(_run_safely(function, common, given))

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        added = [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, default=_SHARED_DEFAULTS.get(option), annotation=annotation
            )
            for option, annotation in extra.items()
        ]
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword_only, *added])  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        app.command(name, epilog=epilog or None, hidden=hidden)(run)
        return run

    return decorate


def _run_safely(function: Callable[..., int | None], common: dict[str, Any], given: dict[str, Any]) -> int:
    is_json = bool(common["json"])
    try:
        return function(_front_end(common), **given) or 0
    except MistralFetchError as error:
        show_error(error, is_json=is_json)
        return int(error.exit_code)
    except KeyboardInterrupt:
        show_error(_INTERRUPTED, is_json=is_json)
        return int(ExitCode.INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:  # noqa: BLE001 - the last line of defence; the traceback is what a bug report needs
        traceback.print_exc()
        print("this is a bug in mistral-fetch: please report it with the lines above", file=sys.stderr)
        return int(ExitCode.BUG)


_INTERRUPTED = Interrupted(
    "interrupted",
    detail="everything verified so far is kept",
    hint="run the same command again to go on",
)


def show_error(error: MistralFetchError, *, is_json: bool) -> None:
    """Print an error: three lines on standard error, or one JSON object on standard output."""
    what, detail, hint = error.lines()
    if is_json:
        fields = {"kind": error.kind, "what": what, "detail": detail, "hint": hint, "exit_code": int(error.exit_code)}
        print(json.dumps({"error": fields}, ensure_ascii=False), flush=True)
        return
    print(f"error: {what}\n  {detail}\n  {hint}", file=sys.stderr, flush=True)


def _front_end(common: dict[str, Any]) -> FrontEnd:
    flags = {name: common.get(name) for name in ("home", "offline", "min_assurance", "dht", "lock_timeout")}
    flags["via"] = common["via"].value if common.get("via") else None
    flags["peers"] = common.get("peers") or None
    loaded = load_settings(flags)
    no_color = bool(common["no_color"]) or bool(os.environ.get("NO_COLOR"))
    return FrontEnd(
        loaded.values,
        loaded.origins,
        is_json=common["json"],
        progress=common["progress"],
        is_quiet=common["quiet"],
        has_color=not no_color,
    )


def stop_on_signals(set_stop: Callable[[], None]) -> Callable[[], None]:
    """Let Ctrl-C and SIGTERM ask for an orderly stop; a second Ctrl-C insists. Return what undoes it."""
    seen = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        set_stop()
        if seen > 1:
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    previous = {number: signal.signal(number, handle) for number in numbers}

    def undo() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    return undo
