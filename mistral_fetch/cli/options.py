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
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from mistral_fetch.cli.choices import ProgressMode, Via
from mistral_fetch.cli.complete import Command, complete_ref
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.cli.terminal import json_line, printable_lines, silence, write_err
from mistral_fetch.config import Settings, load_settings
from mistral_fetch.errors import ExitCode, Interrupted, MistralFetchError, StoreNotWritable, printable

SHARED_OPTIONS = {
    "json": Annotated[bool, typer.Option("--json", help="Print one JSON result on standard output.")],
    "progress": Annotated[
        ProgressMode,
        typer.Option(
            "--progress",
            help="How to show progress, on standard error (default: auto).",
            metavar="auto|rich|plain|json|none",
            show_default=False,
        ),
    ],
    "quiet": Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the result and errors.")],
    "no_color": Annotated[bool, typer.Option("--no-color", help="No colours (also NO_COLOR).")],
    "offline": Annotated[bool | None, typer.Option("--offline", help="Never open a socket.")],
    "home": Annotated[str | None, typer.Option("--home", help="The cache's directory.", metavar="DIR")],
}
# Settings that a flag of the same name sets as it is.
_FLAGS = (
    "home",
    "offline",
    "min_assurance",
    "dht",
    "lsd",
    "share",
    "encryption",
    "lock_timeout",
    "limit",
    "connections",
    "proxy",
    "ca_bundle",
    "catalog",
)
_SHARED_DEFAULTS: dict[str, Any] = {
    "json": False,
    "progress": ProgressMode.AUTO,
    "quiet": False,
    "no_color": False,
    "offline": None,
    "home": None,
}
_TRUST = {
    "trust_keys": Annotated[
        list[str] | None,
        typer.Option(
            "--trust-key",
            help="A public key (PEM) that must have signed it; may be repeated. none: no key, whatever is configured.",
            metavar="FILE",
        ),
    ],
}
_TRANSFER = {
    **_TRUST,
    "via": Annotated[
        Via | None,
        typer.Option(
            "--via",
            help="Sources to use: mirrors, the swarm, or what there is (default: auto).",
            metavar="auto|http|torrent",
        ),
    ],
    "min_assurance": Annotated[
        str | None,
        typer.Option(
            "--min-assurance",
            help="Weakest proof a file may have: size, md5, btv1, gitsha1, btv2, sha256 or signed (default: btv1).",
            metavar="LEVEL",
        ),
    ],
    "peers": Annotated[
        list[str] | None,
        typer.Option("--peer", help="A torrent peer to connect to; may be repeated.", metavar="HOST:PORT"),
    ],
    "dht": Annotated[
        bool | None, typer.Option("--dht/--no-dht", help="Look for peers in the public DHT (default: --no-dht).")
    ],
    "lsd": Annotated[
        bool | None, typer.Option("--lsd/--no-lsd", help="Look for peers on the local network (default: --no-lsd).")
    ],
    "listen": Annotated[
        list[str] | None,
        typer.Option("--listen", help="Where peers may connect to us; may be repeated.", metavar="HOST:PORT[-PORT]"),
    ],
    "share": Annotated[
        bool | None,
        typer.Option("--share/--no-share", help="Give pieces to other peers while fetching (default: --no-share)."),
    ],
    "encryption": Annotated[
        str | None,
        typer.Option("--encryption", help="Of connections to peers (default: allow).", metavar="allow|require|off"),
    ],
    "limit": Annotated[
        str | None,
        typer.Option(
            "--limit",
            help="The most to receive, all sources together, such as 10MB/s (default: all there is).",
            metavar="RATE",
        ),
    ],
    "connections": Annotated[
        int | None,
        typer.Option("--connections", help="The most connections to mirrors at a time (default: 16).", metavar="N"),
    ],
    "proxy": Annotated[
        str | None,
        typer.Option(
            "--proxy", help="A proxy for mirrors and peers (default: for mirrors, the proxy variables).", metavar="URL"
        ),
    ],
    "ca_bundle": Annotated[
        str | None,
        typer.Option("--ca-bundle", help="Certificate authorities to trust, as PEM.", metavar="FILE"),
    ],
    "from_directories": Annotated[
        list[str] | None,
        typer.Option(
            "--from",
            help="Adopt files that are the right ones from here instead of downloading them; may be repeated.",
            metavar="DIR",
        ),
    ],
    "catalog": Annotated[
        str | None,
        typer.Option("--catalog", help="Another catalog, by path or address (default: built in).", metavar="CATALOG"),
    ],
    "lock_timeout": Annotated[
        float | None,
        typer.Option("--lock-timeout", help="How long to wait for another process (default: 600).", metavar="SECONDS"),
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
    adopt_from: tuple[Path, ...] = ()

    @property
    def wants_no_text(self) -> bool:
        """Return whether lines for people on standard error are unwelcome: asked for quiet, or for NDJSON."""
        return self.is_quiet or self.progress is ProgressMode.JSON

    def result(self, fields: Mapping[str, Any] | list[Any], text: str) -> None:
        """Print the command's result: JSON when asked for, otherwise ``text``. Nothing else goes to stdout."""
        if self.is_json:
            text = json.dumps(fields, indent=1, ensure_ascii=False)
        elif sys.stdout.isatty():
            text = printable_lines(text)  # a program that reads a path wants it as it is
        write_out(text)

    def note(self, text: str) -> None:
        """Print a line for people on standard error."""
        if self.is_quiet:
            return
        if self.progress is ProgressMode.JSON:
            write_err(json_line({"event": "notice", "text": text}))
        else:
            write_err(printable(text))

    def reporter(self) -> Any:
        """Return a context manager that shows the events it is called with."""
        from mistral_fetch.cli.render import open_reporter

        return open_reporter(self.progress, is_quiet=self.is_quiet, has_color=self.has_color)


def command(
    app: typer.Typer,
    name: str,
    *,
    transfer: bool = False,
    trust: bool = False,
    epilog: str = "",
    hidden: bool = False,
) -> Callable[[Callable[..., int | None]], Callable[..., None]]:
    """Register a function as a command; its first parameter is a :class:`FrontEnd`, its result an exit code."""

    def decorate(function: Callable[..., int | None]) -> Callable[..., None]:
        extra = {**(_TRANSFER if transfer else _TRUST if trust else {}), **SHARED_OPTIONS}

        def run(**given: Any) -> None:
            common = {option: given.pop(option) for option in extra}
            raise typer.Exit(_run_safely(function, common, given))

        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        _offer_refs(own)
        added = [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, default=_SHARED_DEFAULTS.get(option), annotation=annotation
            )
            for option, annotation in extra.items()
        ]
        keyword_only = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        run.__signature__ = inspect.Signature([*keyword_only, *added])  # type: ignore[attr-defined]
        run.__doc__ = function.__doc__
        # Without a short help of its own, a command's line in the list would be cut in the middle of a sentence.
        app.command(name, cls=Command, short_help=run.__doc__, epilog=epilog or None, hidden=hidden)(run)
        return run

    return decorate


def _offer_refs(parameters: list[inspect.Parameter]) -> None:
    """Let the shell complete every argument that is shown as REF, whichever command it is of."""
    for parameter in parameters:
        for told in getattr(parameter.annotation, "__metadata__", ()):
            if (getattr(told, "metavar", None) or "").startswith("REF"):
                told.autocompletion = complete_ref


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
    except Exception as error:  # noqa: BLE001 - the last line of defence; the traceback is what a bug report needs
        write_err(traceback.format_exc().rstrip())
        show_error(_bug(error), is_json=is_json)
        return int(ExitCode.BUG)


class Bug(MistralFetchError):
    """Something that nobody foresaw."""


def _bug(error: Exception) -> Bug:
    return Bug(
        "this is a bug in mistral-fetch",
        detail=f"{type(error).__name__}: {error}",
        hint="please report it with the traceback",
    )


_INTERRUPTED = Interrupted(
    "interrupted",
    detail="everything verified so far is kept",
    hint="run the same command again to go on",
)


def write_out(text: str) -> None:
    """Print to standard output. A reader that has gone (``| head -1``) is no failure: there is nobody to tell.

    Raises:
        StoreNotWritable: Standard output is a file that cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python would complain once more while flushing at exit.
        silence(sys.stdout)
    except OSError as error:
        silence(sys.stdout)
        raise StoreNotWritable(
            "the result could not be written to standard output",
            detail=f"expected room for it, got: {error.strerror}",
            hint="the work itself is done; print it elsewhere",
        ) from error


def show_error(error: MistralFetchError, *, is_json: bool) -> None:
    """Print an error: three lines on standard error, or one JSON object on standard output."""
    what, detail, hint = error.lines()
    if is_json:
        fields = {"kind": error.kind, "what": what, "detail": detail, "hint": hint, "exit_code": int(error.exit_code)}
        write_out(json.dumps({"error": fields}, ensure_ascii=False))
        return
    write_err(f"error: {what}\n  {detail}\n  {hint}")


# Every setting that some command has a flag for.
FLAGS = frozenset({*_FLAGS, "via", "peers", "trust_keys", "listen"})


def _front_end(common: dict[str, Any]) -> FrontEnd:
    flags = {name: common.get(name) for name in _FLAGS}
    flags["via"] = common["via"].value if common.get("via") else None
    flags["peers"] = common.get("peers") or None
    flags["trust_keys"] = common.get("trust_keys") or None
    flags["listen"] = common.get("listen") or None
    loaded = load_settings(flags)
    no_color = bool(common["no_color"]) or bool(os.environ.get("NO_COLOR"))
    return FrontEnd(
        loaded.values,
        loaded.origins,
        is_json=common["json"],
        progress=common["progress"],
        is_quiet=common["quiet"],
        has_color=not no_color,
        adopt_from=tuple(local_directory(text) for text in common.get("from_directories") or ()),
    )


def stop_on_signals(set_stop: Callable[[], None]) -> Callable[[], None]:
    """Let Ctrl-C and SIGTERM ask for an orderly stop; a second Ctrl-C insists. Return what undoes it.

    A signal that whoever started us had us ignore (the shell does, for jobs in the background) stays ignored.
    """
    seen = 0

    def handle(_number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        set_stop()
        if seen > 1:
            raise KeyboardInterrupt

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}

    def undo() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    return undo
