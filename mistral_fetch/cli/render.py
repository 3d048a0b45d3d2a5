"""Drawing events on standard error: bars on a terminal, lines elsewhere, NDJSON for programs. The only user of rich."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, cast

from mistral_fetch.cli.choices import ProgressMode
from mistral_fetch.cli.progress import TransferView
from mistral_fetch.cli.terminal import UnfailingStream, json_line, write_err
from mistral_fetch.errors import kebab_case, printable
from mistral_fetch.events import (
    BytesReceived,
    BytesVerified,
    Event,
    FilesOpened,
    Notice,
    Progress,
    SnapshotReady,
    SourceFailed,
    SourceLied,
    TransferPlanned,
)
from mistral_fetch.units import format_size

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

PLAIN_STEP = 0.05
PLAIN_INTERVAL_SECONDS = 30.0
JSON_INTERVAL_SECONDS = 0.5
BAR_INTERVAL_SECONDS = 0.1
LABEL_WIDTH = 26
MIN_BAR_WIDTH = 12


class Reporter:
    """Shows events; a context manager around the work. May be called from any thread. This one shows nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._view = TransferView()

    def __enter__(self) -> Reporter:
        """Begin."""
        return self

    def __exit__(self, *details: object) -> None:
        """End, leaving the terminal as it was."""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            now = time.monotonic()
            self._view.apply(event, now)
            self._show(event, now)

    def _show(self, event: Event, now: float) -> None:
        """Show one event; the view has it already."""


def open_reporter(mode: ProgressMode, *, is_quiet: bool, has_color: bool) -> Reporter:
    """Return the reporter for a mode; ``auto`` means bars on a terminal and plain lines elsewhere."""
    if mode is ProgressMode.AUTO:
        mode = ProgressMode.RICH if sys.stderr.isatty() else ProgressMode.PLAIN
    if is_quiet or mode is ProgressMode.NONE:
        return Reporter()
    if mode is ProgressMode.JSON:
        return _Lines()
    return _Bars(has_color) if mode is ProgressMode.RICH else _Plain()


class _Lines(Reporter):
    """One JSON object a line. Frequent events are thinned out; the counters in them are totals, so nothing is lost."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[type, float] = {}
        self._has_told_all = False

    def _show(self, event: Event, now: float) -> None:
        if isinstance(event, FilesOpened):
            return
        if isinstance(event, BytesReceived | Progress | BytesVerified) and not self._is_end(event):
            if now - self._last.get(type(event), -JSON_INTERVAL_SECONDS) < JSON_INTERVAL_SECONDS:
                return
            self._last[type(event)] = now
        fields = {"event": kebab_case(type(event).__name__), **asdict(event)}
        if isinstance(event, BytesReceived | Progress):
            fields |= {
                "done_bytes": self._view.shown_bytes,
                "total_bytes": self._view.total_bytes,
                "rate_bytes_per_second": int(self._view.rate(now)),
                "received_by_source": dict(self._view.received_by_source),
            }
        write_err(json_line(fields))

    def _is_end(self, event: Event) -> bool:
        """Return whether this is the event that makes something complete: it is never thinned out."""
        if isinstance(event, BytesVerified):
            return event.verified_bytes == event.total_bytes
        had_told, self._has_told_all = self._has_told_all, self._view.shown_bytes == self._view.total_bytes
        return isinstance(event, Progress) and self._has_told_all and not had_told


def describe_event(event: Event) -> str:
    """Return the one line people are told about an event, or '' for those that only move a bar."""
    if isinstance(event, Notice):
        return event.text
    if isinstance(event, SourceFailed):
        return f"{event.source}: {event.reason}" + ("; trying again" if event.will_retry else "")
    if isinstance(event, SourceLied):
        return (
            f"{event.source} sent wrong bytes for {event.path} ({event.where}) and was dropped:"
            f" expected {event.expected}, got {event.actual}"
        )
    return ""


class _Plain(Reporter):
    """A line at the start, one every 5 % or 30 seconds, one when a file's verification begins."""

    def __init__(self) -> None:
        super().__init__()
        self._next_share = 0.0
        self._next_time = 0.0
        self._verifying = ""

    def _show(self, event: Event, now: float) -> None:
        text = describe_event(event)
        if text:
            _print(text)
        elif isinstance(event, TransferPlanned):
            self._print_line(now)
        elif isinstance(event, BytesVerified):
            self._print_verifying(event.path, now)
        elif isinstance(event, Progress | BytesReceived) and self._is_due(now):
            self._print_line(now)

    def _print_verifying(self, path: str, now: float) -> None:
        if path != self._verifying:
            self._verifying = path
            _print(f"verifying {path}")
        elif now >= self._next_time:
            _print(self._view.verifying_line())
        else:
            return
        self._next_time = now + PLAIN_INTERVAL_SECONDS

    def _is_due(self, now: float) -> bool:
        return bool(self._view.total_bytes) and (self._view.fraction() >= self._next_share or now >= self._next_time)

    def _print_line(self, now: float) -> None:
        _print(self._view.line(now))
        # In whole steps: 0.15 / 0.05 is a little less than 3, and the same line would come twice.
        self._next_share = (int(self._view.fraction() / PLAIN_STEP + 1e-6) + 1) * PLAIN_STEP - 1e-6
        self._next_time = now + PLAIN_INTERVAL_SECONDS


class _Bars(Reporter):
    """One bar for the bytes of the model, which says so when it verifies. Drawn once there is something to show."""

    def __init__(self, has_color: bool) -> None:
        super().__init__()
        self._has_color = has_color
        self._bars: Bars | None = None
        self._last = 0.0

    def __exit__(self, *details: object) -> None:
        if self._bars is not None:
            self._update(self._bars, time.monotonic())
            self._bars.stop()

    def _show(self, event: Event, now: float) -> None:
        bars = self._bars or self._open()
        text = describe_event(event)
        if text:
            bars.console.print(printable(text), markup=False)
        must = isinstance(event, TransferPlanned | SnapshotReady)
        if must or (not text and now - self._last >= BAR_INTERVAL_SECONDS):
            self._last = now
            self._update(bars, now)

    def _open(self) -> Bars:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=Console(
                file=cast("IO[str]", UnfailingStream(sys.stderr)),
                no_color=not self._has_color,
                highlight=False,
                soft_wrap=True,
            ),
            refresh_per_second=8,
            expand=True,
        )
        self._bars.add_task("", total=None, numbers="", visible=False)
        self._bars.start()
        return self._bars

    def _update(self, bars: Bars, now: float) -> None:
        view = self._view
        label = _cut(printable(view.label or f"verifying {view.verifying}"), LABEL_WIDTH)
        room = bars.console.width - len(label) - MIN_BAR_WIDTH - len(" 100 %   ")
        total, done = view.total_bytes, view.shown_bytes
        numbers = _fitting(view.numbers(now), room)
        if view.verifying and view.label:
            # The bar is the transfer's, and stays where it is.
            share = view.verified_bytes * 100 // max(view.verify_total, 1)
            numbers = _cut(f"verifying {share} % of {view.verifying}", room)
        elif view.verifying:
            total, done = view.verify_total, view.verified_bytes
            numbers = f"{format_size(done)} of {format_size(total)}"
        bars.update(
            bars.task_ids[0],
            description=label,
            total=max(total, 1),
            completed=done if total else 1,
            numbers=printable(numbers),
            visible=bool(view.label or view.verifying),
        )


def _fitting(parts: list[str], room: int) -> str:
    """Return as many of the parts as fit, at least the first: on a narrow terminal the bar stays."""
    text = parts[0]
    for part in parts[1:]:
        if len(text) + 2 + len(part) > room:
            break
        text += "  " + part
    return text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def _print(text: str) -> None:
    write_err(printable(text))


def count(number: int, noun: str) -> str:
    """Return ``1 file`` or ``2 files``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return rows as aligned columns of plain text."""
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [headings, *rows]
    ]
    return "\n".join(lines)
