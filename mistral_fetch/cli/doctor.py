"""``doctor``: one paste-able report on this machine. Secrets are taken out; without --network no socket is opened."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from mistral_fetch.cli.doctor_report import FAIL, Finding, Redactor, as_fields, as_text, examine
from mistral_fetch.cli.options import FrontEnd, command


def register(app: typer.Typer) -> None:
    """Add this group's commands."""
    command(
        app, "doctor", transfer=True, epilog="Exit codes: 0 a model can be fetched and run here, 1 something failed."
    )(doctor)


def doctor(
    front: FrontEnd,
    refs: Annotated[
        list[str] | None, typer.Argument(metavar="REF...", help="Also: what would be fetched from where.")
    ] = None,
    network: Annotated[
        bool, typer.Option("--network", help="Also ask the hub, try the ports and join the DHT.")
    ] = False,
) -> int:
    """Report on this machine, fit to be pasted anywhere: no secret, no name; no socket unless asked."""
    redact = Redactor()
    findings = {name: examine(check) for name, check in _checks(front, network=network).items()}
    for text in refs or []:
        findings[text] = examine(partial(_model, front, text, network=network))
    front.result(redact.all(as_fields(findings)), redact(as_text(findings)))
    return 1 if any(found.state == FAIL for found in findings.values()) else 0


def _checks(front: FrontEnd, *, network: bool) -> dict[str, Callable[[], Finding]]:
    from mistral_fetch.cli import doctor_disk, doctor_machine, doctor_network

    settings, home = front.settings, front.settings.home
    runtime, machine = doctor_machine.runtime(settings.python)
    checks: dict[str, Callable[[], Finding]] = {
        "program": doctor_machine.program,
        "cache": lambda: doctor_disk.cache(home),
        "disk": lambda: doctor_disk.disk(home, settings.disk_reserve),
        "writes": lambda: doctor_disk.writes(home),
        "links": lambda: doctor_disk.links(home),
        "locks": lambda: doctor_disk.locks(home),
        "names": lambda: doctor_disk.names(home),
        "clock": lambda: doctor_disk.clock(home),
        "packages": doctor_machine.packages,
        "runtime": lambda: runtime,
        "memory": lambda: doctor_machine.memory(machine),
        "threads": doctor_machine.threads,
        "proxy": lambda: doctor_network.proxy(settings),
        "certificates": lambda: doctor_network.certificates(settings),
        "environment": doctor_machine.environment,
    }
    if network:
        checks |= {
            "hub": lambda: doctor_network.hub(settings),
            "ports": lambda: doctor_network.ports(settings),
            "dht": lambda: doctor_network.dht(settings),
        }
    return checks


def _model(front: FrontEnd, text: str, *, network: bool) -> Finding:
    from mistral_fetch.cli.doctor_plan import model

    return model(front, text, may_ask=network)
