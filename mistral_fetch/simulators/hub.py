"""Hugging Face on loopback: listings, ``resolve`` addresses with linked headers, gating, a content network. Public.

Only what clients of the hub rely on. A large file's ``resolve`` address redirects to ``/cdn/…`` (on this server, or on
another one given as ``cdn_base_url``), where a token must never arrive; small files are answered at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from mistral_fetch.simulators.mirror import Content, MirrorSimulator, Reply, SeenRequest

_LARGE_BYTES = 4096


@dataclass(frozen=True)
class HubRepository:
    """One repository at one commit."""

    files: Mapping[str, bytes]
    commit: str = "27d67f1b5f57dc0953326b2601d68371d40ea8da"
    branches: tuple[str, ...] = ("main",)
    is_gated: bool = False
    tags: tuple[str, ...] = ("license:apache-2.0",)


@dataclass
class HubAccess:
    """Which tokens exist, and which of them may read gated repositories."""

    known_tokens: set[str] = field(default_factory=set)
    granted_tokens: set[str] = field(default_factory=set)


class HubSimulator(MirrorSimulator):
    """A hub with repositories by name.

    Args:
        repositories: What it holds.
        cdn_base_url: Where large files are said to lie; this server by default.
        moved: Old names of repositories, answered with a relative redirect.
    """

    def __init__(
        self,
        repositories: Mapping[str, HubRepository],
        *,
        cdn_base_url: str = "",
        moved: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__({})
        self.repositories = dict(repositories)
        self.access = HubAccess()
        self.cdn_base_url = cdn_base_url
        self.moved = dict(moved or {})
        self.listing_override: bytes | None = None

    def cdn_files(self) -> dict[str, bytes]:
        """Return what a content network of its own has to serve, by path."""
        return {
            _cdn_path(data): data for repository in self.repositories.values() for data in repository.files.values()
        }

    def answer(self, request: SeenRequest) -> Reply:
        """Answer like the hub."""
        parts = request.path.split("/")
        if parts[0] == "cdn":
            data = self.cdn_files().get(request.path)
            return Reply(404) if data is None else Reply(200, content=Content(data, f'"cdn-{parts[1][:12]}"'))
        if parts[:2] == ["api", "models"] and len(parts) >= 6 and parts[4] == "revision":
            return self._list("/".join(parts[2:4]), unquote("/".join(parts[5:])), request)
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]), request)
        return _error(404, "EntryNotFound")

    def _list(self, name: str, revision: str, request: SeenRequest) -> Reply:
        repository = self.repositories.get(name)
        if repository is None:
            return self._no_repository(request)
        if revision not in {repository.commit, *repository.branches}:
            return _error(404, "RevisionNotFound")
        body = self.listing_override
        if body is None:
            document = {
                "id": name,
                "sha": repository.commit,
                "gated": "auto" if repository.is_gated else False,
                "tags": list(repository.tags),
                "siblings": [_sibling(path, data) for path, data in repository.files.items()],
            }
            body = json.dumps(document).encode()
        return Reply(200, {"Content-Type": "application/json"}, body=body)

    def _resolve(self, name: str, revision: str, path: str, request: SeenRequest) -> Reply:
        if name in self.moved:
            return Reply(307, {"Location": f"/{self.moved[name]}/resolve/{revision}/{quote(path)}"})
        repository = self.repositories.get(name)
        if repository is None:
            return self._no_repository(request)
        token = _token(request)
        if repository.is_gated and token not in self.access.granted_tokens:
            return _error(403 if token in self.access.known_tokens else 401, "GatedRepo")
        if revision not in {repository.commit, *repository.branches}:
            return _error(404, "RevisionNotFound")
        data = repository.files.get(path)
        if data is None:
            return _error(404, "EntryNotFound")
        headers = {"X-Repo-Commit": repository.commit}
        if len(data) < _LARGE_BYTES:
            return Reply(200, headers, Content(data, f'"{_git_blob_id(data)}"'))
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.cdn_base_url or self.base_url}/{_cdn_path(data)}?X-Amz-Signature=secret",
        }
        return Reply(302, headers, body=b"Found. Redirecting.")

    def _no_repository(self, request: SeenRequest) -> Reply:
        # Like the hub: whoever is not logged in is not told whether a private repository exists.
        return _error(404 if _token(request) in self.access.known_tokens else 401, "RepoNotFound")


def _token(request: SeenRequest) -> str:
    return request.headers.get("authorization", "").removeprefix("Bearer ")


def _error(status: int, code: str) -> Reply:
    return Reply(status, {"X-Error-Code": code, "Content-Type": "text/plain"}, body=code.encode())


def _cdn_path(data: bytes) -> str:
    return f"cdn/{hashlib.sha256(data).hexdigest()}"


def _git_blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_blob_id(data)}
    if len(data) >= _LARGE_BYTES:
        sibling["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 135}
    return sibling
