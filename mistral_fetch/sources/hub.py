"""Hugging Face's API (and its mirrors'): which files a repository has, their digests, and where they lie.

Owns the shape of that API and who may see the token. The bytes themselves come through
:class:`~mistral_fetch.sources.http.HttpSource` like any other mirror's. Every answer is hostile until validated.

One call lists sizes and digests: ``/api/models/{repo}/revision/{rev}?blobs=true``. Large files have a sha256
(git-lfs), small ones their git blob id. A single file is described by ``X-Linked-Etag``, ``X-Linked-Size`` and
``X-Repo-Commit`` of the *first* answer; the content network behind the redirect knows none of them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mistral_fetch.digest import Digest
from mistral_fetch.errors import (
    AccessError,
    MalformedManifest,
    MirrorStatus,
    MistralFetchError,
    NotAuthorised,
    UnknownModel,
)
from mistral_fetch.manifest import (
    MAX_FILE_SIZE,
    MAX_FILES,
    RESERVED_NAMES,
    FileEntry,
    Manifest,
    MirrorUrl,
    ModelInfo,
    validate_path,
)
from mistral_fetch.sources.base import StopSignal
from mistral_fetch.sources.http_client import Answer, HttpClient, HttpSettings, status_error
from mistral_fetch.sources.hub_choice import choose_files, weight_format
from mistral_fetch.sources.urls import origin_of, public_url, redact, without_userinfo
from mistral_fetch.units import MIB

DEFAULT_ENDPOINT = "https://huggingface.co"
# Ten thousand files take about 3 MB; the worst JSON of this size that was tried took 160 MiB to parse.
MAX_LISTING_BYTES = 4 * MIB
_MAX_TOKEN_BYTES = 4096
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SPDX = {"apache-2.0": "Apache-2.0", "mit": "MIT", "bsd-3-clause": "BSD-3-Clause", "cc-by-4.0": "CC-BY-4.0"}


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit. ``size`` and ``digest`` are None where the hub does not say."""

    path: str
    size: int | None
    digest: Digest | None


@dataclass(frozen=True)
class HubListing:
    """What a repository holds at one commit."""

    repository: str
    commit: str
    files: tuple[HubFile, ...]
    licence: str = ""


def hub_endpoint(environment: Mapping[str, str] | None = None) -> str:
    """Return the hub to ask: ``HF_ENDPOINT``, or Hugging Face itself; no slash at its end.

    It comes without credentials: every file's address begins with it, and those are stored and shared.
    :func:`with_hub_token` binds the credentials to the hub instead.
    """
    named = _named_endpoint(environment)
    return public_url(named).rstrip("/") or named


def _named_endpoint(environment: Mapping[str, str] | None) -> str:
    environment = os.environ if environment is None else environment
    return (environment.get("HF_ENDPOINT", "").strip() or DEFAULT_ENDPOINT).rstrip("/")


def load_hub_token(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the user's token: ``HF_TOKEN``, else the file ``HF_TOKEN_PATH``, else ``$HF_HOME/token``.

    Raises:
        NotAuthorised: It cannot be a token; the message never holds it.
    """
    environment = os.environ if environment is None else environment
    token = environment.get("HF_TOKEN", "").strip()
    origin = "HF_TOKEN"
    if not token:
        try:
            file = _token_path(environment)
            origin = str(file)
            with file.open("rb") as opened:
                token = opened.read(_MAX_TOKEN_BYTES).decode("ascii", "replace").strip()
        except (OSError, RuntimeError):  # RuntimeError: ~somebody who is not known here
            return None  # no token stored, or none that we may read: ask without
    if not token:
        return None
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise NotAuthorised(
            f"{origin} does not hold a token",
            detail="expected one word of plain characters, such as hf_…, got something else",
            hint="make a token at https://huggingface.co/settings/tokens, then export HF_TOKEN=hf_…",
        )
    return token


def _token_path(environment: Mapping[str, str]) -> Path:
    if named := environment.get("HF_TOKEN_PATH", ""):
        return Path(named).expanduser()
    if home := environment.get("HF_HOME", ""):
        return Path(home).expanduser() / "token"
    cache = environment.get("XDG_CACHE_HOME", "") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "token"


def with_hub_token(settings: HttpSettings, environment: Mapping[str, str] | None = None) -> HttpSettings:
    """Return the settings with the user's credentials for the hub bound to its own origin, if there are any.

    A name and a password in ``HF_ENDPOINT`` are the hub's own access and go before the token.

    Raises:
        MirrorUnreachable: ``HF_ENDPOINT`` is no address.
        NotAuthorised: The token cannot be one.
    """
    token = load_hub_token(environment)
    named = _named_endpoint(environment)
    basic = without_userinfo(named)[1] if "@" in named else None
    authorization = basic or (f"Bearer {token}" if token else None)
    if authorization is None:
        return settings
    return replace(settings, authorizations={**settings.authorizations, origin_of(named): authorization})


class HubClient:
    """Asks one hub.

    Args:
        client: The door to the web; its settings hold the token (:func:`with_hub_token`).
        endpoint: The hub's address.
        stop: Ends every wait for the hub when it is set.
    """

    def __init__(self, client: HttpClient, endpoint: str = DEFAULT_ENDPOINT, stop: StopSignal | None = None) -> None:
        self._client = client
        self._stop = stop
        self.endpoint = endpoint.rstrip("/")

    def list_files(self, repository: str, revision: str = "main") -> HubListing:
        """Return what a repository holds at a revision, pinned to its commit.

        Raises:
            UnknownModel: There is no such repository or revision.
            AccessError: It is private or gated.
            MalformedManifest: The answer is not a listing.
            UnsafePath: A file's name would leave its directory or cannot be printed.
            MirrorError, OfflineRefused: The hub cannot be asked.
            Interrupted: The stop signal was set.
        """
        _validate_name(repository)
        url = f"{self.endpoint}/api/models/{repository}/revision/{quote(revision, safe='')}?blobs=true"
        try:
            body = self._client.get_bytes(url, MAX_LISTING_BYTES, stop=self._stop)
        except MirrorStatus as error:
            raise _explain(error, f"{repository}@{revision}", self.endpoint) from error
        return parse_listing(body, repository)

    def resolve_file(self, repository: str, revision: str, path: str) -> HubFile:
        """Return one file's size and digest from its headers, for hubs without a listing.

        Raises:
            UnknownModel, AccessError, MirrorError, OfflineRefused: See :meth:`list_files`.
        """
        _validate_name(repository)
        answer = self._client.head(self.file_url(repository, revision, path), only_relative=True, stop=self._stop)
        if answer.status >= 400:
            error = status_error(answer)
            if isinstance(error, AccessError):
                raise error
            raise _explain(error, f"{path} in {repository}@{revision}", self.endpoint) from error
        return HubFile(path, _linked_size(answer), _digest_of_etag(answer))

    def file_url(self, repository: str, revision: str, path: str) -> str:
        """Return the address of a file; ``revision`` is best a commit, which cannot move."""
        return f"{self.endpoint}/{repository}/resolve/{quote(revision, safe='')}/{quote(path)}"


def hub_manifest(
    hub: HubClient,
    repository: str,
    revision: str = "main",
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Manifest:
    """Return the files a runtime needs of a repository, with digests and addresses, pinned to a commit.

    Args:
        hub: Whom to ask.
        repository: ``org/name``.
        revision: A branch, tag or commit.
        include: Shell patterns that replace our own choice of files.
        exclude: Shell patterns of files to leave out.

    Raises:
        UnsupportedFormat: No weights, or nothing that matches the patterns.
        UnsafePath: A file's name would leave its directory or cannot be printed.
        UnknownModel, AccessError, MalformedManifest, MirrorError, OfflineRefused: See :meth:`HubClient.list_files`.
    """
    listing = hub.list_files(repository, revision)
    chosen = set(choose_files([file.path for file in listing.files], include=include, exclude=exclude))
    entries = tuple(_entry(hub, listing, file) for file in listing.files if file.path in chosen)
    info = ModelInfo(
        name=repository,
        version=listing.commit,
        licence=listing.licence,
        source_url=f"{public_url(hub.endpoint)}/{repository}",
        weight_format=weight_format(chosen),
    )
    return Manifest(entries, info)


def _entry(hub: HubClient, listing: HubListing, file: HubFile) -> FileEntry:
    if file.size is None or file.digest is None:
        headers = hub.resolve_file(listing.repository, listing.commit, file.path)
        size = headers.size if file.size is None else file.size
        file = HubFile(file.path, size, file.digest or headers.digest)
    digests = (file.digest,) if file.digest else ()
    url = hub.file_url(listing.repository, listing.commit, file.path)
    return FileEntry(file.path, file.size, digests, mirrors=(MirrorUrl(url),))


def parse_listing(body: bytes, repository: str) -> HubListing:
    """Return the listing in an answer of ``/api/models/{repo}/revision/{rev}?blobs=true``.

    Raises:
        MalformedManifest: It is none.
        UnsafePath: A file's name would leave its directory or cannot be printed.
    """
    try:
        document = json.loads(body)
        commit, siblings = document["sha"], document["siblings"]
        if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise ValueError(f"the commit is {str(commit)[:80]!r}")
        if not isinstance(siblings, list) or len(siblings) > MAX_FILES:
            raise ValueError(f"the files are no list of at most {MAX_FILES}")
        files = tuple(_parse_sibling(sibling) for sibling in siblings)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise MalformedManifest(
            f"the listing of {repository} cannot be read",
            detail=f"expected Hugging Face's JSON with sha and siblings, got {reason}",
            hint="check HF_ENDPOINT; this may not be a hub, or not one that lists digests",
        ) from error
    return HubListing(repository, commit, files, _licence(document))


def _parse_sibling(sibling: Any) -> HubFile:
    path, size, lfs = sibling["rfilename"], sibling.get("size"), sibling.get("lfs")
    if not isinstance(path, str):
        raise TypeError("a file name is no text")
    if path not in RESERVED_NAMES:  # a publisher's own manifest may well lie there; it is never chosen
        validate_path(path)  # before anything is printed of it or encoded into an address
    if size is not None and (type(size) is not int or not 0 <= size <= MAX_FILE_SIZE):
        raise ValueError(f"the size of {path[:80]!r} is {str(size)[:40]}")
    if isinstance(lfs, dict) and lfs.get("sha256"):
        if lfs.get("size", size) != size:
            raise ValueError(f"{path[:80]!r} has two sizes")
        return HubFile(path, size, Digest("sha256", str(lfs["sha256"])))
    blob_id = sibling.get("blobId")
    return HubFile(path, size, Digest("gitsha1", str(blob_id)) if blob_id else None)


def _licence(document: Mapping[str, Any]) -> str:
    tags = document.get("tags")
    for tag in tags if isinstance(tags, list) else []:
        if isinstance(tag, str) and tag.startswith("license:"):
            return _SPDX.get(tag.partition(":")[2].lower(), "")
    return ""


def _linked_size(answer: Answer) -> int | None:
    for name in ("x-linked-size", "content-length"):
        value = answer.headers.get(name, "")
        # The length of a redirect's own body is not the file's.
        if re.fullmatch(r"[0-9]{1,19}", value) and (name == "x-linked-size" or answer.status == 200):
            return int(value)
    return None


def _digest_of_etag(answer: Answer) -> Digest | None:
    etag = answer.headers.get("x-linked-etag") or answer.headers.get("etag", "")
    value = etag.strip().removeprefix("W/").strip('"')
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return Digest("sha256", value)
    return Digest("gitsha1", value) if re.fullmatch(r"[0-9a-f]{40}", value) else None


def _validate_name(repository: str) -> None:
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise UnknownModel(
            f"{repository[:120]!r} is not the name of a repository",
            detail="expected org/name in letters, digits, dots, dashes and underscores",
            hint="such as hf:mistralai/Mistral-7B-v0.1",
        )


def _explain(error: MirrorStatus, thing: str, endpoint: str) -> MistralFetchError:
    if error.status != 404:
        return error
    return UnknownModel(
        f"{redact(endpoint)} has no {thing}",
        detail=error.detail,
        hint="check the spelling and the revision; a private repository needs: export HF_TOKEN=hf_…",
    )
