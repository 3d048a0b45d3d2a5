"""``config``: which settings are in force, where each came from, what it means; and changing the file."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.config import ENVIRONMENT_PREFIX, Settings, config_path, flag_of
from mistral_fetch.digest import Assurance

_EPILOG = "Exit codes: 0 ok, 2 usage, or the file or a value cannot be used."
_WRITING = "Exit codes: 0 ok, 2 usage, or the file or a value cannot be used, 9 it cannot be written."
Name = Annotated[str, typer.Argument(metavar="NAME", help="A setting, such as home or min_assurance.")]


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "config", epilog=_EPILOG)(show_all)
    command(app, "config path", epilog=_EPILOG)(show_path)
    command(app, "config get", epilog=_EPILOG)(get)
    command(app, "config set", epilog=_WRITING)(set_value)
    command(app, "config unset", epilog=_WRITING)(unset)
    command(app, "config explain", epilog=_EPILOG)(explain)


def show_all(front: FrontEnd) -> int:
    """Show every setting in force, where it came from, and what it means; passwords are not shown."""
    from mistral_fetch.cli.render import table
    from mistral_fetch.settings_file import first_sentence

    names = [field.name for field in fields(Settings)]
    rows = [[name, _shown(front, name), _origin(front, name), first_sentence(name)] for name in names]
    listed = {name: _fields(front, name) for name in names}
    path = config_path()
    state = "" if path.exists() else " (not there yet)"
    text = f"{table(['SETTING', 'VALUE', 'FROM', 'MEANING'], rows)}\n\nfile: {path}{state}"
    front.result({"file": str(path), "settings": listed}, text)
    return 0


def show_path(front: FrontEnd) -> int:
    """Print where config.toml lies, or would."""
    path = config_path()
    front.result({"file": str(path), "exists": path.exists()}, str(path))
    return 0


def get(front: FrontEnd, name: Name) -> int:
    """Print the value of one setting that is in force, as it is."""
    from mistral_fetch.settings_file import known_setting

    name = known_setting(name)
    front.result({**_fields(front, name), "value": _plain(front, name)}, _text(_plain(front, name)))
    return 0


def explain(front: FrontEnd, name: Name) -> int:
    """Say what one setting means, its default, and every place it can be set in."""
    from mistral_fetch.settings_file import known_setting

    name = known_setting(name)
    told = _fields(front, name)
    lines = [
        f"{name}: {told['meaning']}",
        f"  now          {_shown(front, name)} (from {_origin(front, name)})",
        f"  default      {_text(told['default']) or 'none'}",
        f"  environment  {told['variable']}",
        f"  file         {name} = ... in {config_path()}",
    ]
    if told["flag"]:
        lines.append(f"  flag         {told['flag']}")
    front.result(told, "\n".join(lines))
    return 0


def set_value(
    front: FrontEnd,
    name: Name,
    value: Annotated[str, typer.Argument(metavar="VALUE", help="As in the environment; lists with commas.")],
) -> int:
    """Write one setting to config.toml; every other line of the file, comments too, stays as it is."""
    from mistral_fetch.settings_file import as_toml, known_setting

    name = known_setting(name)
    _write(name, as_toml(name, value))
    if front.origins[name] in {"flag", "environment"}:
        front.note(f"{_origin(front, name)} says otherwise, and wins over the file")
    front.result({"name": name, "file": str(config_path())}, str(config_path()))
    return 0


def unset(front: FrontEnd, name: Name) -> int:
    """Take one setting out of config.toml; without it there nothing happens."""
    from mistral_fetch.settings_file import known_setting

    name = known_setting(name)
    if config_path().exists():
        _write(name, None)
    front.result({"name": name, "file": str(config_path())}, str(config_path()))
    return 0


def _write(name: str, toml: str | None) -> None:
    from mistral_fetch.settings_file import changed
    from mistral_fetch.store.durable import disk_errors, write_durably

    path = config_path()
    target = path.resolve()  # a link into somebody's collection of settings stays a link
    with disk_errors("changing the settings", path):
        text = target.read_text("utf-8") if target.exists() else ""
        new = changed(text, name, toml, str(path))
        if new != text:
            # It may hold a proxy's password; what the owner opened to others stays open.
            write_durably(target, new.encode(), target.stat().st_mode & 0o777 if target.exists() else 0o600)


def _fields(front: FrontEnd, name: str) -> dict[str, Any]:
    from mistral_fetch.settings_file import meanings

    default = None if name == "home" else _jsonable(getattr(Settings(home=Path()), name))
    return {
        "name": name,
        "value": _without_password(_plain(front, name)),
        "origin": front.origins[name],
        "default": default,
        "meaning": meanings()[name],
        "variable": ENVIRONMENT_PREFIX + name.upper(),
        "flag": _flag(name),
    }


def _flag(name: str) -> str:
    from mistral_fetch.cli.options import FLAGS

    return flag_of(name) if name in FLAGS else ""


def _origin(front: FrontEnd, name: str) -> str:
    """Return the place that a person would look at."""
    origin = front.origins[name]
    named = {"flag": _flag(name), "environment": ENVIRONMENT_PREFIX + name.upper(), str(config_path()): "file"}
    return named.get(origin, origin)


def _plain(front: FrontEnd, name: str) -> Any:
    return _jsonable(getattr(front.settings, name))


def _jsonable(value: Any) -> Any:
    if isinstance(value, Assurance):
        return value.label
    return str(value) if isinstance(value, Path) else list(map(str, value)) if isinstance(value, tuple) else value


def _shown(front: FrontEnd, name: str) -> str:
    return _text(_without_password(_plain(front, name))) or "-"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(value) if isinstance(value, list) else str(value if value is not None else "")


def _without_password(value: Any) -> Any:
    return re.sub(r"(?<=://)[^/\s]*@", "***@", value) if isinstance(value, str) else value
