"""``sign``: vouch for a catalog or a manifest with a key of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_fetch.cli.options import FrontEnd, command


def register(app: typer.Typer) -> None:
    """Add this group's command."""
    command(app, "sign", epilog="Exit codes: 0 ok, 2 usage or key, 3 not found, 9 disk, 20 malformed.")(sign)


def sign(
    front: FrontEnd,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A catalog (.json) or a manifest (.meta4).")],
    key: Annotated[Path, typer.Option("--key", metavar="KEY", help="An elliptic-curve private key (PEM).")],
) -> int:
    """Sign a catalog or a manifest: FILE.sig, for pulls with the public key as their --trust-key."""
    from mistral_fetch.publish.sign import sign_file, signing_key

    signature = sign_file(file, signing_key(key))
    front.result({"file": str(file), "signature": str(signature)}, str(signature))
    return 0
