"""Models from Python: make one complete, say where it is, prove it again. ``docs/fetch-api.md`` shows how to use it.

Nothing here prints, handles a signal or changes the process. Settings come from where the command line has them:
an argument, then the environment, then ``config.toml``, then the default. Every function may be called from any
number of threads; callbacks of one call come one at a time, from whichever thread has something to tell.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistral_fetch.config import Settings, load_settings
from mistral_fetch.errors import MistralFetchError as MistralFetchError
from mistral_fetch.events import Event, Notice, Progress, TransferPlanned
from mistral_fetch.ref import parse_ref
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.store.layout import Layout
from mistral_fetch.store.verify import FileVerdict as FileVerdict

if TYPE_CHECKING:
    from mistral_fetch.transfer.channels import PullResult

Stop = StopSignal
OnProgress = Callable[[int, int], None]
OnEvent = Callable[[Event], None]


@dataclass(frozen=True)
class Model:
    """A complete, verified model in the cache.

    ``ref`` is its full name there (``mistral-7b@v0.3``), ``content_digest`` the sha256 over what it consists of,
    ``assurance`` the weakest proof that any of its files has, ``channel`` how it came.
    """

    directory: Path
    ref: str
    content_digest: str
    assurance: str
    channel: str
    was_complete: bool
    received_bytes: int


@dataclass(frozen=True)
class Verification:
    """What a full hash of a model found, file by file."""

    directory: Path
    ref: str
    files: tuple[FileVerdict, ...]

    @property
    def is_good(self) -> bool:
        """Return whether every byte of every file is right."""
        return all(file.is_good for file in self.files)


def ensure(
    ref: str,
    *,
    home: str | os.PathLike[str] | None = None,
    offline: bool | None = None,
    min_assurance: str | None = None,
    via: str | None = None,
    catalog: str | None = None,
    trust_keys: Sequence[str] | None = None,
    adopt_from: Sequence[str | os.PathLike[str]] = (),
    refresh: bool = False,
    progress: OnProgress | None = None,
    on_event: OnEvent | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> Model:
    """Make a model complete in the cache and return where it is; a complete one is neither read nor asked for.

    Args:
        ref: ``name[@version]``, ``hf:org/repo[@revision]``, a ``.meta4`` or ``.torrent`` by path or address, or a
            magnet link.
        home: The cache's directory.
        offline: Never open a socket.
        min_assurance: The weakest proof a file may have: size, md5, btv1, gitsha1, btv2, sha256 or signed.
        via: Which sources to use: auto, http or torrent.
        catalog: Path or address of another catalog.
        trust_keys: PEM files with the public keys one of which must have signed it.
        adopt_from: Directories whose files are taken where they are the right ones.
        refresh: Look at the source again even if the model is complete.
        progress: Called with the verified and the total bytes whenever they change.
        on_event: Called with every event (:mod:`mistral_fetch.events`).
        stop: Its ``set()``, from any thread, ends the call in ``Interrupted``; what is verified is kept.
        settings: Any other setting by its name in ``docs/configuration.md``, such as ``limit="10MB/s"``.

    Raises:
        MistralFetchError: See ``docs/exit-codes.md``. What a callback raises sets ``stop`` and is raised again.
        TypeError: There is no setting of such a name.
    """
    from mistral_fetch.transfer.pull import pull

    common = {"offline": offline, "min_assurance": min_assurance, "via": via, "catalog": catalog}
    chosen = _settings(home=home, trust_keys=trust_keys, **common, **settings)
    listener = _Listener(progress, on_event, stop or Stop())
    folders = [Path(folder).expanduser() for folder in adopt_from]
    with listener:
        result = pull(parse_ref(ref), chosen, listener, listener.stop, refresh=refresh, adopt_from=folders)
    return _model(result)


def path(ref: str, *, home: str | os.PathLike[str] | None = None, **settings: Any) -> Path:
    """Return the directory of a model that is complete in the cache. Nothing is fetched or hashed.

    Raises:
        NotInCache: It is not (completely) there.
        UnknownModel, UsageError: There is no such model.
    """
    from mistral_fetch.transfer.local import require_local

    chosen = _settings(home=home, **settings)
    return require_local(Layout(chosen.home), ref, chosen).directory


def verify(
    ref: str,
    *,
    home: str | os.PathLike[str] | None = None,
    on_event: OnEvent | None = None,
    stop: Stop | None = None,
    **settings: Any,
) -> Verification:
    """Hash every byte of a model in the cache again, offline; wrong bytes are in the result, not raised.

    Raises:
        NotInCache: It is not (completely) there.
        UnknownModel, UsageError: There is no such model.
        Interrupted: ``stop`` was set.
    """
    from mistral_fetch.store.verify import verify_snapshot
    from mistral_fetch.transfer.local import require_local

    chosen = _settings(home=home, **settings)
    local = require_local(Layout(chosen.home), ref, chosen)
    listener = _Listener(None, on_event, stop or Stop())
    with listener:
        _, verdicts = verify_snapshot(local.directory, listener, listener.stop.check)
    return Verification(local.directory, local.record.key, tuple(verdicts))


def _settings(*, home: str | os.PathLike[str] | None, **given: Any) -> Settings:
    unknown = sorted(given.keys() - Settings.__dataclass_fields__.keys())
    if unknown:
        raise TypeError(f"there is no setting called {unknown[0]!r}; docs/configuration.md lists them")
    return load_settings({"home": None if home is None else os.fspath(home), **given}).values


def _model(result: PullResult) -> Model:
    return Model(
        directory=result.directory,
        ref=result.key,
        content_digest=result.content_digest,
        assurance=result.assurance,
        channel=result.channel,
        was_complete=result.was_complete,
        received_bytes=result.received_bytes,
    )


class _Listener:
    """Tells the caller's callbacks one thing at a time, and carries what they raise out of the transfer's threads."""

    def __init__(self, progress: OnProgress | None, on_event: OnEvent | None, stop: Stop) -> None:
        self.stop = stop
        self._progress, self._on_event = progress, on_event
        self._lock = threading.RLock()
        self._failure: BaseException | None = None
        self._present: dict[str, int] = {}
        self._done = self._total = 0
        self._told = (-1, -1)

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, *_details: object) -> None:
        if self._failure is not None:
            raise self._failure from None

    def __call__(self, event: Event) -> None:
        """Pass one event on."""
        with self._lock:
            if self._failure is not None:
                return
            try:
                self._tell(event)
            except BaseException as error:  # noqa: BLE001 - the caller's own; it must not die in one of our threads
                self._failure = error
                self.stop.set()

    def _tell(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)
        if self._progress is None or isinstance(event, Notice):
            return
        if isinstance(event, TransferPlanned):
            self._present.clear()
            self._done, self._total = event.present_bytes, event.total_bytes
        elif isinstance(event, Progress):
            self._present[event.path] = event.present_bytes
        # What has to be fetched again does not make it go back.
        self._done = min(max(self._done, sum(self._present.values())), self._total)
        now = (self._done, self._total)
        if now != self._told and self._total:
            self._told = now
            self._progress(*now)
