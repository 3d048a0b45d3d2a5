"""What ``lock`` and ``sync`` share: reading the two files, and the settings that a model is fetched with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mistral_fetch.cli.options import FrontEnd
from mistral_fetch.cli.paths import local_directory
from mistral_fetch.config import Settings
from mistral_fetch.errors import ConfigError, Conflict, MistralFetchError, NotFoundError
from mistral_fetch.lock_file import LOCK_NAME, MAX_LOCK_BYTES, LockedModel, LockFile, parse_lock
from mistral_fetch.provision import MAX_PROVISION_BYTES, PROVISION_NAME, Policy, Provision, WantedModel, parse_provision


@dataclass(frozen=True)
class Provisioning:
    """A ``mistral-fetch.toml`` with its lock file; ``lock_bytes`` is None where there is none."""

    path: Path
    wanted: Provision
    lock: LockFile
    lock_bytes: bytes | None

    @property
    def base(self) -> Path:
        """Return where relative paths in the files begin."""
        return self.path.parent

    @property
    def lock_path(self) -> Path:
        """Return where the lock file lies, or will."""
        return lock_path_of(self.path)

    def locked(self, wanted: WantedModel) -> LockedModel | None:
        """Return a model's entry in the lock file, unless it was locked under other rules."""
        entry = self.lock.find(wanted.ref)
        if entry is None or wanted.channel not in {"", entry.channel}:
            return None
        floors = [level for level in (wanted.min_assurance, self.wanted.policy.min_assurance) if level is not None]
        return entry if entry.assurance >= max(floors, default=entry.assurance) else None

    def differences(self) -> list[str]:
        """Return in words where the lock file is not what ``mistral-fetch.toml`` asks for."""
        wanted = {model.ref for model in self.wanted.models}
        missing = [f"{model.ref} is not locked so" for model in self.wanted.models if self.locked(model) is None]
        return missing + [f"{entry.ref} is not asked for" for entry in self.lock.models if entry.ref not in wanted]


def lock_path_of(path: Path) -> Path:
    """Return the lock file that goes with a file of wishes: ``x.toml`` has ``x.lock``."""
    return path.with_name(LOCK_NAME if path.name == PROVISION_NAME else f"{path.name.removesuffix('.toml')}.lock")


def load_provisioning(path: Path, *, ignore_lock: bool = False) -> Provisioning:
    """Read both files.

    Raises:
        NotFoundError: There is no such file.
        ConfigError, MalformedManifest: One of them cannot be used.
    """
    path = path.expanduser().absolute()
    data = _read(path, MAX_PROVISION_BYTES)
    if data is None:
        raise NotFoundError(
            f"there is no {path}",
            detail="expected a file that lists models, got none",
            hint='write one: [[model]] and below it ref = "mistral-7b"; docs/provisioning.md has the rest',
        )
    wanted = parse_provision(data, str(path))
    lock_bytes = None if ignore_lock else _read(lock_path_of(path), MAX_LOCK_BYTES)
    lock = LockFile(()) if lock_bytes is None else parse_lock(lock_bytes, str(lock_path_of(path)))
    return Provisioning(path, wanted, lock, lock_bytes)


def _read(path: Path, limit_bytes: int) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}", detail=f"expected a readable file, got: {error.strerror}", hint="check the path"
        ) from error


def require_current_lock(provisioning: Provisioning) -> None:
    """Refuse a lock file that is not what is asked for.

    Raises:
        NotFoundError: There is none.
        Conflict: It is of something else.
    """
    if provisioning.lock_bytes is None:
        raise NotFoundError(
            f"there is no {provisioning.lock_path}",
            detail=f"expected the lock file of {provisioning.path}, got none",
            hint="write it with: mistral-fetch lock",
        )
    if differences := provisioning.differences():
        raise Conflict(
            f"{provisioning.lock_path} does not match {provisioning.path}",
            detail=f"expected the same models under the same rules, got: {'; '.join(differences[:5])}",
            hint="bring it up to date with: mistral-fetch lock",
        )


def settings_for(front: FrontEnd, provisioning: Provisioning, wanted: WantedModel) -> Settings:
    """Return the settings for one model: the files raise the floor, never lower it, and pin keys.

    Raises:
        ConfigError: A pinned key is not there.
    """
    policy = provisioning.wanted.policy
    floors = [level for level in (policy.min_assurance, wanted.min_assurance) if level is not None]
    floor = max([front.settings.min_assurance, *floors])
    return replace(front.settings, min_assurance=floor, trust_keys=_trust_keys(front, policy, provisioning.base))


def _trust_keys(front: FrontEnd, policy: Policy, base: Path) -> tuple[str, ...]:
    if not policy.trust_keys or front.origins["trust_keys"] == "flag":
        return front.settings.trust_keys
    paths = [base / Path(text).expanduser() for text in policy.trust_keys]
    for path in paths:
        if not path.is_file():
            raise ConfigError(
                f"the pinned key {path} is not there",
                detail="expected a PEM file with a public key, got none",
                hint="correct trust-keys in [policy], or put the key there",
            )
    return tuple(map(str, paths))


def adopt_directories(front: FrontEnd, provisioning: Provisioning) -> tuple[Path, ...]:
    """Return the directories to adopt files from: the command line's, then the policy's.

    Raises:
        NotFoundError: One of them is not there.
    """
    named = [str(provisioning.base / Path(text).expanduser()) for text in provisioning.wanted.policy.adopt_from]
    return (*front.adopt_from, *map(local_directory, named))


def error_fields(error: MistralFetchError) -> dict[str, object]:
    """Return an error as ``--json`` prints it."""
    what, detail, hint = error.lines()
    return {"kind": error.kind, "what": what, "detail": detail, "hint": hint, "exit_code": int(error.exit_code)}
