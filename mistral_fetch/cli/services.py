"""What commands that run for long have in common: the status endpoint and its option."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mistral_fetch.events import Event, Report
    from mistral_fetch.publish.metrics import Metrics
    from mistral_fetch.publish.notify import Supervisor
    from mistral_fetch.sources.base import StopSignal

StatusListen = Annotated[
    str | None,
    typer.Option(
        "--status-listen",
        metavar="[HOST:]PORT",
        help="Serve /status (a page; .json beside it), /metrics (Prometheus) and /ready there.",
    ),
]


@contextmanager
def serving(listen: str | None, metrics: Metrics) -> Iterator[str]:
    """Serve a process's numbers while the block runs; give the endpoint's address, or '' where none was asked for.

    Raises:
        RuntimeMissing: The libraries for it are not installed.
        ListenRefused: The address cannot be had.
    """
    if not listen:
        yield ""
        return
    from mistral_fetch.publish.listen import parse_listen
    from mistral_fetch.publish.status import StatusServer

    with StatusServer(parse_listen(listen, "--status-listen"), metrics) as server:
        yield server.url


def preparing(report: Report, stop: StopSignal, supervisor: Supervisor, name: str) -> Report:
    """Return a report for the hashing before a service starts: it can be stopped, and the supervisor hears of it."""

    def tell(event: Event) -> None:
        stop.check()
        supervisor.starting(f"hashing {name}")
        report(event)

    return tell


@contextmanager
def watched(report: Any, listen: str | None, doing: str) -> Iterator[Any]:
    """Give a report that also keeps the numbers which ``--status-listen`` serves; the same one where it is not set."""
    if not listen:
        yield report
        return
    from mistral_fetch.publish.metrics import Metrics

    metrics = Metrics(doing)

    def tell_both(event: Any) -> None:
        metrics(event)
        report(event)

    with serving(listen, metrics):
        yield tell_both
