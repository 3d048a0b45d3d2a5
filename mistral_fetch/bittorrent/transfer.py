"""One run of one download that fills files: told in events, proved on the disk, resumed by the next run.

How peers are dealt with is :mod:`.conduct`'s business, and what is fetched, and whether it is the right torrent, that
of :mod:`mistral_fetch.sources.swarm`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mistral_fetch.bittorrent.alerts import Alert, Finished
from mistral_fetch.bittorrent.client import DownloadStatus
from mistral_fetch.bittorrent.conduct import Clocks, Conduct
from mistral_fetch.bittorrent.readback import Proof, ReadBack
from mistral_fetch.errors import StoreError
from mistral_fetch.events import BytesDropped, BytesReceived, Notice, Progress

POLL_SECONDS = 0.1
REPORT_SECONDS = 0.25
# How often finished files may turn out wrong on the disk before the disk is blamed.
MAX_PROOFS = 3


@dataclass
class Transfer(Conduct):
    """One run of one download; see :class:`~.conduct.Conduct`.

    ``read_back`` proves on the disk what was verified in memory. ``proves_files`` is set when nothing but the torrent
    vouches for a file: what could not be read back while it came is then checked once more at the end. ``on_change``
    is called when a file turned out not to be what was written to it.
    """

    read_back: ReadBack = field(kw_only=True)
    on_change: Callable[[], None] = field(kw_only=True)
    proves_files: bool = field(default=False, kw_only=True)
    received: dict[int, int] = field(default_factory=dict)
    verified: dict[int, int] = field(default_factory=dict)
    has_finished: bool = False
    failed_bytes: int = 0

    def run(self) -> None:
        """Fetch everything, or raise what made that impossible; either way keep what was received."""
        self._start()
        try:
            self._wait_until_checked()
            self._begin_reading_back()
            self._wait_until_finished()
            self._prove()
        except StoreError:
            raise  # nothing more can be written; the next run checks what is there
        except BaseException:
            self.read_back.close()
            self.download.stop()
            raise
        finally:
            self.read_back.close()
        self._settle()

    def _settle(self) -> None:
        """Make what was received durable, and end."""
        self.download.stop()
        self._tell_uploads()

    def _begin_reading_back(self) -> None:
        self.read_back.begin()
        for piece in self.download.verified_pieces():
            self.read_back.piece_passed(piece)

    def _prove(self) -> None:
        """Prove that every byte on the disk is right, as far as nobody else will."""
        is_flushed = self.download.flush()
        self._handle(self.download.poll(0))
        proof = self.read_back.finish(self.check_stop) if is_flushed else Proof.PARTIAL
        if proof is Proof.CHANGED:
            self.report(Notice("another program changed the files while they came, or the disk lost some of it"))
            self.on_change()
        if proof is Proof.CHANGED or (proof is Proof.PARTIAL and self.proves_files):
            self._check_again()

    def _check_again(self) -> None:
        """Read the finished files until every byte on the disk is right; what is not is fetched anew."""
        for _attempt in range(MAX_PROOFS):
            self.report(Notice("reading the finished files back to check them against the torrent"))
            self.has_finished = False
            self.download.recheck()
            self._wait_until_checked()
            if self.download.status().is_finished:
                return
            self._wait_until_finished()
        raise StoreError(
            f"the disk does not keep what was written to it: {self.label}",
            detail=f"expected finished files to stay right, got other bytes {MAX_PROOFS} times",
            hint="check the disk and the memory of this machine, then run it again",
        )

    def _wait_until_checked(self) -> None:
        began = time.monotonic()
        told = False
        status = self.download.status()
        while status.is_checking:
            self.check_stop()
            if not told and time.monotonic() - began > 1:
                told = True
                self.report(Notice("checking what an earlier run left on the disk"))
            self._handle(self.download.poll(POLL_SECONDS))
            status = self.download.status()
        self.received = dict(status.file_bytes)
        for index, present in status.verified_bytes.items():
            self.verified[index] = present
            self.report(Progress(self.paths[index], present))

    def _wait_until_finished(self) -> None:
        now = time.monotonic()
        clocks = Clocks(last_peer=now, last_byte=now)
        while True:
            self.check_stop()
            self._handle(self.download.poll(POLL_SECONDS))
            now = time.monotonic()
            if now - clocks.last_report < REPORT_SECONDS and not self.has_finished:
                continue
            clocks.last_report = now
            status = self.download.status()
            has_bytes = self._tell_progress(status)
            if has_bytes:
                clocks.last_byte = now
            self._tell_peers(len(status.peers), has_bytes)
            if status.is_finished:
                return
            if status.peers:
                clocks.last_peer = now
            self._look_for_peers(status, clocks, now)
            self._give_up_in_time(status, clocks, now)

    def _handle(self, alerts: list[Alert]) -> None:
        super()._handle(alerts)
        self.has_finished |= any(isinstance(alert, Finished) for alert in alerts)

    def _piece_passed(self, piece: int) -> None:
        super()._piece_passed(piece)
        self.read_back.piece_passed(piece)

    def _tell_progress(self, status: DownloadStatus) -> bool:
        """Report what changed; return whether bytes came in."""
        failed = max(status.failed_bytes - self.failed_bytes, 0)
        self.failed_bytes = status.failed_bytes
        came = False
        for index, total in status.file_bytes.items():
            path = self.paths[index]
            # A piece that failed came and went between two looks: the file's own count does not show it.
            in_vain = failed if path == self.failed_path else 0
            difference = total - self.received.get(index, 0) + in_vain
            self.received[index] = total
            if difference > 0:
                came = True
                self.report(BytesReceived(self.label, path, difference))
            if in_vain:
                self.report(BytesDropped(self.label, path, in_vain, "a piece did not match its hash"))
            elif difference < 0:
                self.report(BytesDropped(self.label, path, -difference, "a block was cut short"))
        for index, present in status.verified_bytes.items():
            if present != self.verified.get(index):
                self.verified[index] = present
                self.report(Progress(self.paths[index], present))
        return came

    def _tell_uploads(self) -> None:
        uploaded = self.download.status().uploaded_bytes
        if uploaded:
            self.report(Notice(f"{uploaded} bytes were uploaded to other peers"))
