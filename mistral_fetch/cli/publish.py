"""``publish``: the publisher's side of the command line."""

from __future__ import annotations

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command
from mistral_fetch.errors import UsageError
from mistral_fetch.units import format_size, parse_utc

if TYPE_CHECKING:
    from mistral_fetch.publish.build import Publication
    from mistral_fetch.signatures import SigningKey


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(app, "publish", epilog="Exit codes: 0 ok, 2 it cannot be published as it is, 3 not found, 9 disk.")(publish)


def publish(
    front: FrontEnd,
    ref: Annotated[
        str, typer.Argument(metavar="DIR|REF", help="A directory of model files, or a complete model of the cache.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="Where to write.")],
    name: Annotated[
        str,
        typer.Option("--name", metavar="NAME", help="The model's name (default: the directory's, or the model's own)."),
    ] = "",
    version: Annotated[str, typer.Option("--model-version", metavar="VERSION", help="The model's version.")] = "",
    mirror: Annotated[
        list[str] | None, typer.Option("--mirror", metavar="URL", help="Where the files will be found.")
    ] = None,
    tracker: Annotated[list[str] | None, typer.Option("--tracker", metavar="URL", help="A tracker.")] = None,
    licence: Annotated[str, typer.Option("--licence", metavar="SPDX", help="The model's licence.")] = "",
    credit: Annotated[str, typer.Option("--credit", metavar="TEXT", help="The credit line to keep.")] = "",
    source_url: Annotated[str, typer.Option("--source-url", metavar="URL", help="Where the model comes from.")] = "",
    chat_template: Annotated[
        str, typer.Option("--chat-template", metavar="NAME", help="v1, v3 or demo; none for a base model.")
    ] = "",
    sign: Annotated[
        Path | None, typer.Option("--sign", metavar="KEY", help="Sign with this elliptic-curve private key (PEM).")
    ] = None,
    expires: Annotated[
        str, typer.Option("--expires", metavar="DATE", help="Last day (UTC) of the manifest, such as 2027-01-31.")
    ] = "",
) -> int:
    """Read a model's files once, write its manifest, torrents and checksums, and read those back."""
    from mistral_fetch.cli.models import find_model
    from mistral_fetch.cli.render import count
    from mistral_fetch.publish.build import publish as publish_model

    _check_names(Path(ref), out)
    _check_options(licence, chat_template, mirror or [])
    model = find_model(front, ref)
    given = {
        "name": name,
        "version": version,
        "licence": licence,
        "credit": credit,
        "source_url": source_url,
        "chat_template": chat_template,
        "expires": _moment(expires),
    }
    # What is known of a cache's model is kept, unless it is said otherwise.
    info = replace(model.info, **{field: text for field, text in given.items() if text})
    key = _ready_key(sign)
    with front.reporter() as report:
        made = publish_model(
            model.directory,
            out,
            name=name or model.name,
            mirrors=mirror or [],
            trackers=tracker or [],
            info=info,
            files=model.files,
            report=report,
        )
    fields = {
        "name": made.name,
        "content_digest": str(made.manifest.content_digest()),
        "manifest": str(made.manifest_path),
        "torrent": str(made.torrent_path),
        "plain_torrent": str(made.plain_torrent_path),
        "checksums": str(made.checksums_path),
        "info_hash_v1": made.info_hash_v1,
        "info_hash_v2": made.info_hash_v2,
        "plain_info_hash": made.plain_info_hash,
        "size": made.size,
    }
    text = [
        f"{made.name}: {count(len(made.manifest.files), 'file')}, {format_size(made.size)}",
        f"  {made.manifest_path}",
        f"  {made.torrent_path} (v1 {made.info_hash_v1}, v2 {made.info_hash_v2})",
        f"  {made.plain_torrent_path} (v1 {made.plain_info_hash}, for clients without v2)",
        f"  {made.checksums_path} (for sha256sum -c in the model's own directory)",
    ]
    if not mirror:
        text.append(f"Serve {out} with the files in {out / made.name} (copied or linked), or give their --mirror")
    if key is not None:
        fields |= _sign(made, key, text)
    front.result(fields, "\n".join(text))
    return 0


def _ready_key(path: Path | None) -> SigningKey | None:
    if path is None:
        return None
    from mistral_fetch.publish.sign import signing_key

    return signing_key(path)


def _sign(made: Publication, key: SigningKey, text: list[str]) -> dict[str, str]:
    from mistral_fetch.publish.sign import sign_publication

    over_manifest, over_files = sign_publication(made.manifest, made.manifest_path, made.name, key)
    text.append(f"  {over_manifest} (for mistral-fetch pull --trust-key)")
    text.append(f"  {over_files} (for model_signing verify key)")
    return {"signature": str(over_manifest), "files_signature": str(over_files)}


def _moment(expires: str) -> str:
    """Return a date as its last second, or the moment itself, as manifests have it."""
    text = f"{expires}T23:59:59Z" if re.fullmatch(r"\d{4}-\d{2}-\d{2}", expires, re.ASCII) else expires
    try:
        if text:
            parse_utc(text)
    except ValueError as error:
        raise UsageError(
            f"--expires cannot be {expires!r}",
            detail=f"expected a date as 2027-01-31, or a moment as 2027-01-31T12:00:00Z, got: {error}",
            hint="mistral-fetch publish --help explains the options",
        ) from error
    return text


def _check_names(*paths: Path) -> None:
    for path in paths:
        try:
            path.stat()
        except OSError as error:
            # That it is not there is for the work itself to say, or no fault at all.
            if error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
                raise UsageError(
                    f"{path} cannot be a directory",
                    detail=f"expected a directory, got: {error.strerror}",
                    hint="mistral-fetch publish --help explains the arguments",
                ) from error


def _check_options(licence: str, chat_template: str, mirrors: list[str]) -> None:
    """Refuse what every user of the manifest would stumble over later."""
    problems = []
    if chat_template not in {"", "none", "v1", "v3", "demo"}:
        problems.append(("--chat-template", chat_template, "v1, v3, demo or none"))
    if licence and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", licence):
        problems.append(("--licence", licence, "an SPDX identifier such as Apache-2.0"))
    addresses = [url for url in mirrors if not re.match(r"https?://[^/\s]+", url)]
    problems += [("--mirror", url, "an http or https address") for url in addresses]
    for option, value, expected in problems:
        raise UsageError(
            f"{option} cannot be {value!r}",
            detail=f"expected {expected}",
            hint="mistral-fetch publish --help explains the options",
        )
