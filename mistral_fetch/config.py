"""Settings: from flags, then the environment, then ``config.toml``, then the default, each with its origin.

Owns every setting's name, unit and default. Hugging Face's own variables (``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HOME``) are read where they are used, with the meaning users expect.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mistral_fetch.digest import Assurance
from mistral_fetch.errors import ConfigError

ENVIRONMENT_PREFIX = "MISTRAL_FETCH_"
VIA_CHOICES = ("auto", "http", "torrent")
ENCRYPTION_CHOICES = ("allow", "require", "off")
MAX_CONFIG_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, with its default.

    The environment variable of a setting is ``MISTRAL_FETCH_`` and the name in capitals; its key in
    ``config.toml`` is the name.
    """

    home: Path
    """The cache's directory."""
    shared_homes: tuple[Path, ...] = ()
    """Caches of others that are only read: what is complete there is used where it lies."""
    offline: bool = False
    """Never open a socket; what is missing is an error."""
    via: str = "auto"
    """Which sources to use: auto (mirrors, then the swarm), http or torrent."""
    min_assurance: Assurance = Assurance.BTV1
    """The weakest proof a file may have. SHA-1 pieces are what the official torrent offers."""
    peers: tuple[str, ...] = ()
    """Torrent peers to connect to, ``host:port``."""
    lock_timeout: float = 600.0
    """Seconds to wait for another process that works on the same model; long enough for a fast pull."""
    connect_timeout: float = 7.0
    """Seconds to wait for a connection to a mirror."""
    read_timeout: float = 7.0
    """Seconds without a byte after which a mirror is asked anew; where nobody else delivers, twice that ends it."""
    connections: int = 16
    """The most connections to mirrors at a time, 1 to 64; how many are opened depends on what they bring."""
    limit: int = 0
    """The most bytes per second to receive, from all sources together; 0 for no limit."""
    proxy: str = ""
    """The proxy (``http://``, ``https://`` or ``socks5://``); empty for what the proxy variables say, which the swarm
    does not heed. With one the swarm goes through it altogether, or not at all where it is ``https://``."""
    ca_bundle: str = ""
    """A PEM file of the certificate authorities to trust instead of the built-in ones; empty for those."""
    peer_timeout: float = 15.0
    """Seconds without any peer that has the data after which the swarm counts as dead."""
    stall_timeout: float = 60.0
    """Seconds without a byte from connected peers after which the swarm counts as stalled."""
    dht: bool = False
    """Look for peers in the public DHT; only torrents that name no peers of their own are looked up."""
    dht_nodes: tuple[str, ...] = ()
    """Nodes to join a DHT by, ``host:port``; empty for libtorrent's own."""
    lsd: bool = False
    """Look for peers on the local network by multicast (BEP 14)."""
    pex: bool = False
    """Take the addresses of further peers from peers (BEP 11)."""
    trackers: bool = True
    """Ask the trackers that a torrent names."""
    encryption: str = "allow"
    """Message stream encryption with peers: allow, require or off."""
    listen: tuple[str, ...] = ()
    """Where peers may connect to us, ``HOST:PORT`` or ``HOST:PORT-PORT``; empty for any free port everywhere."""
    share: bool = False
    """Give verified pieces to other peers while fetching, as the nodes of a fleet do."""
    share_time: float = 300.0
    """Seconds to go on giving after a download is complete, for as long as a connected peer is not."""
    upload_limit: int = 0
    """The most bytes per second to send to peers of a torrent; 0 for no limit."""
    hf_cache: bool = True
    """Adopt what Hugging Face's own cache holds already instead of downloading it."""
    disk_reserve: int = 256 * 1024 * 1024
    """Bytes of free disk a download must leave."""
    cache_quota: int = 0
    """The most bytes the cache may take; 0 for no limit. What is more than that alone is not begun."""
    keep_trash: float = 86400.0
    """Seconds for which what ``prune`` removes can be brought back."""
    catalog: str = ""
    """Path or address (http or https) of another catalog to use instead of the built-in one."""
    trust_keys: tuple[str, ...] = ()
    """PEM files with the public keys that must have signed what is fetched; none for no such demand."""
    python: str = ""
    """The interpreter that has PyTorch; empty to look for one."""


@dataclass(frozen=True)
class LoadedSettings:
    """The settings in force, and where each came from: ``flag``, ``environment``, the file's path or ``default``."""

    values: Settings
    origins: Mapping[str, str]


def load_settings(flags: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> LoadedSettings:
    """Return the settings in force.

    Args:
        flags: Settings given on the command line; None means not given.
        environment: Where to look for variables; the process's own by default.

    Raises:
        ConfigError: A value cannot be used, or ``config.toml`` cannot be read.
    """
    environment = os.environ if environment is None else environment
    file, file_values = _load_file(environment)
    chosen: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for field in fields(Settings):
        name, variable = field.name, ENVIRONMENT_PREFIX + field.name.upper()
        if flags.get(name) is not None:
            chosen[name], origins[name] = parse_setting(name, flags[name], flag_of(name)), "flag"
        elif environment.get(variable, "") != "":
            chosen[name], origins[name] = parse_setting(name, environment[variable], variable), "environment"
        elif name in file_values:
            chosen[name], origins[name] = parse_setting(name, file_values[name], f"{name} in {file}"), str(file)
        else:
            origins[name] = "default"
    chosen.setdefault("home", _default_home())
    return LoadedSettings(Settings(**chosen), origins)


def flag_of(name: str) -> str:
    """Return the flag of a setting, where there is one."""
    repeated = {"peers": "--peer", "trust_keys": "--trust-key"}
    return repeated.get(name, f"--{name.replace('_', '-')}")


def _default_home() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("mistral-fetch", appauthor=False)


def config_path(environment: Mapping[str, str] | None = None) -> Path:
    """Return where ``config.toml`` lies, or would."""
    named = (os.environ if environment is None else environment).get(ENVIRONMENT_PREFIX + "CONFIG", "")
    if named:
        return Path(os.path.expanduser(named))  # noqa: PTH111 - pathlib fails on an unknown ~user
    from platformdirs import user_config_path

    return user_config_path("mistral-fetch", appauthor=False) / "config.toml"


def _load_file(environment: Mapping[str, str]) -> tuple[Path, dict[str, Any]]:
    named, path = environment.get(ENVIRONMENT_PREFIX + "CONFIG", ""), config_path(environment)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        text = data.decode()
    except FileNotFoundError:
        if not named:
            return path, {}
        raise ConfigError(
            f"no configuration file at {path}",
            detail=f"expected the file that {ENVIRONMENT_PREFIX}CONFIG names, got none",
            hint=f"create it, or unset {ENVIRONMENT_PREFIX}CONFIG",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_file(path, str(error)) from error
    if len(data) > MAX_CONFIG_BYTES:
        raise _bad_file(path, f"expected at most {MAX_CONFIG_BYTES} bytes, got more")
    values = parse_settings_text(path, text)
    known = sorted(field.name for field in fields(Settings))
    for name in values:
        if name not in known:
            raise _unknown_key(path, name, known)
    return path, values


def _unknown_key(path: Path, name: str, known: list[str]) -> ConfigError:
    import difflib

    near = " or ".join(difflib.get_close_matches(name, known, n=2))
    return ConfigError(
        f"the configuration file {path} cannot be used",
        detail=f"expected one of {', '.join(known)}, got {name!r}",
        hint=f"did you mean {near}? correct or remove {name}" if near else f"remove {name} from it",
    )


def parse_settings_text(path: Path | str, text: str) -> dict[str, Any]:
    """Return what the text of ``config.toml`` says; whether there are such settings is not asked.

    Raises:
        ConfigError: It is not TOML; the error names ``path``.
    """
    from mistral_fetch.strict_json import UnexpectedJson
    from mistral_fetch.strict_toml import decode_toml

    try:
        return decode_toml(text.encode(), MAX_CONFIG_BYTES)
    except UnexpectedJson as error:
        raise _bad_file(path, f"expected {error.expected}, got: {error.actual}") from error


def _bad_file(path: Path | str, detail: str) -> ConfigError:
    return ConfigError(f"the configuration file {path} cannot be used", detail=detail, hint="correct or remove it")


def parse_setting(name: str, value: Any, where: str) -> Any:
    """Return a setting's value as the program uses it.

    Raises:
        ConfigError: It cannot be used; the error names ``where``.
    """
    parser = _PARSERS[name]
    try:
        return parser(value)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"the setting {where} cannot be used",
            detail=str(error),
            hint="mistral-fetch COMMAND --help lists the flags; docs/configuration.md explains the settings",
        ) from error


def _to_home(value: Any) -> Path:
    try:
        home = Path(value).expanduser().absolute()
        home.stat()
    except RuntimeError as error:
        raise ValueError(f"expected a directory, got: {error}") from error
    except OSError as error:
        # Anything else, such as that it is not there yet, is found out by whoever needs the directory.
        if error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
            raise ValueError(f"expected a directory, got: {error.strerror}") from error
    return home


def _to_homes(value: Any) -> tuple[Path, ...]:
    listed = value.split(os.pathsep) if isinstance(value, str) else value
    return tuple(_to_home(path) for path in listed if str(path))


def _to_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in {"1", "true", "yes", "on"}:
        return True
    if text in {"0", "false", "no", "off"}:
        return False
    raise ValueError(f"expected true or false, got {value!r}")


def _to_seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except ValueError:
        raise ValueError(f"expected a number of seconds, got {value!r}") from None
    if not 0 <= seconds <= 10**7:
        raise ValueError(f"expected 0 to 10,000,000 seconds, got {value!r}")
    return seconds


def _to_duration(value: Any) -> float:
    from mistral_fetch.units import parse_duration

    return parse_duration(str(value))


def _to_size(value: Any) -> int:
    from mistral_fetch.units import parse_size

    return parse_size(str(value))


def _to_connections(value: Any) -> int:
    try:
        count = int(str(value))
    except ValueError:
        raise ValueError(f"expected a number of connections, got {value!r}") from None
    if not 1 <= count <= 64:
        raise ValueError(f"expected 1 to 64 connections, got {value!r}")
    return count


def _to_proxy(value: Any) -> str:
    text = str(value)
    if text and not text.startswith(("http://", "https://", "socks5://", "socks5h://")):
        raise ValueError("expected a proxy as http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT")
    return text


def _to_ca_bundle(value: Any) -> str:
    path = Path(str(value)).expanduser()
    if str(value) and not path.is_file():
        raise ValueError(f"expected a PEM file with certificates, got {value!r}")
    return str(path) if str(value) else ""


def _to_via(value: Any) -> str:
    if value not in VIA_CHOICES:
        raise ValueError(f"expected one of {', '.join(VIA_CHOICES)}, got {value!r}")
    return str(value)


def _to_encryption(value: Any) -> str:
    if value not in ENCRYPTION_CHOICES:
        raise ValueError(f"expected one of {', '.join(ENCRYPTION_CHOICES)}, got {value!r}")
    return str(value)


def _to_listen(value: Any) -> tuple[str, ...]:
    listed = _listed(value)
    for address in listed:
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9_.-]{1,64}):(\d{1,5})(?:-(\d{1,5}))?", address)
        first, last = (int(match[2]), int(match[3] or match[2])) if match else (-1, -1)
        if not 0 <= first <= last < 65536 or (last > first == 0):
            raise ValueError(f"expected HOST:PORT or HOST:PORT-PORT, got {address!r}")
    return listed


def _to_assurance(value: Any) -> Assurance:
    return value if isinstance(value, Assurance) else Assurance.parse(str(value))


def _to_peers(value: Any) -> tuple[str, ...]:
    listed = _listed(value)
    for peer in listed:
        host, _, port = peer.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"expected host:port, got {peer!r}")
    return listed


def _listed(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value.replace(",", " ").split() if isinstance(value, str) else value))


def _to_catalog(value: Any) -> str:
    text = str(value)
    if "://" in text and not re.match(r"https?://[^/\s]", text):
        raise ValueError("expected a path, or an address as https://HOST/catalog.json")
    return text


def _to_trust_keys(value: Any) -> tuple[str, ...]:
    listed = value.split(os.pathsep) if isinstance(value, str) else [str(path) for path in value]
    if listed == ["none"]:
        return ()  # so that a command line can take back what the file says
    paths = [Path(os.path.expanduser(path)).absolute() for path in listed]  # noqa: PTH111 - as above
    for path in paths:
        if not path.is_file():  # asked at once: a key that is gone must not mean that none is demanded
            raise ValueError(f"expected PEM files with public keys, or none, got {str(path)!r}")
    return tuple(map(str, paths))


_PARSERS: dict[str, Callable[[Any], Any]] = {
    "home": _to_home,
    "shared_homes": _to_homes,
    "offline": _to_bool,
    "via": _to_via,
    "min_assurance": _to_assurance,
    "peers": _to_peers,
    "lock_timeout": _to_seconds,
    "connect_timeout": _to_seconds,
    "read_timeout": _to_seconds,
    "connections": _to_connections,
    "limit": _to_size,
    "proxy": _to_proxy,
    "ca_bundle": _to_ca_bundle,
    "peer_timeout": _to_seconds,
    "stall_timeout": _to_seconds,
    "dht": _to_bool,
    "dht_nodes": _to_peers,
    "lsd": _to_bool,
    "pex": _to_bool,
    "trackers": _to_bool,
    "encryption": _to_encryption,
    "listen": _to_listen,
    "share": _to_bool,
    "share_time": _to_seconds,
    "upload_limit": _to_size,
    "hf_cache": _to_bool,
    "disk_reserve": _to_size,
    "cache_quota": _to_size,
    "keep_trash": _to_duration,
    "catalog": _to_catalog,
    "trust_keys": _to_trust_keys,
    "python": str,
}
