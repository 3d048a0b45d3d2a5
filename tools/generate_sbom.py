"""Print a software bill of materials of the base program: CycloneDX 1.6 JSON, from what is installed here.

    python tools/generate_sbom.py                  the base program and everything it needs
    python tools/generate_sbom.py --extra serve    with an extra; may be repeated

Nothing is looked up anywhere, and neither date nor random number is in it: the same versions give the same bytes.
Requirements are those that hold on this machine (PEP 508 markers).
"""

from __future__ import annotations

import argparse
import json
import sys
import uuid
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = "mistral-fetch"
SPEC_VERSION = "1.6"


def generate(extras: Iterable[str] = ()) -> str:
    """Return the document.

    Raises:
        PackageNotFoundError: A requirement is not installed, so that its version is not known.
    """
    found = collect(ROOT, frozenset(extras))
    graph = {name: needs for name, (_, needs) in found.items()}
    components = [component(found[name][0]) for name in sorted(found) if name != ROOT]
    root = {**component(found[ROOT][0]), "type": "application"}
    document: dict[str, Any] = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC_VERSION}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC_VERSION,
        "version": 1,
        "metadata": {"component": root},
        "components": components,
        "dependencies": [
            {"ref": reference(found[name][0]), "dependsOn": sorted(reference(found[one][0]) for one in graph[name])}
            for name in sorted(graph)
        ],
    }
    # A serial number has to be a UUID: here one that follows from everything else.
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(document, sort_keys=True))
    return json.dumps({**document, "serialNumber": f"urn:uuid:{serial}"}, indent=1, sort_keys=True) + "\n"


def collect(root: str, extras: frozenset[str]) -> dict[str, tuple[Distribution, set[str]]]:
    """Return each package that is reached from ``root``, with the names of those it needs itself."""
    found: dict[str, tuple[Distribution, set[str]]] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(root, extras)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        package, needs = found.setdefault(name, (distribution(name), set()))
        for requirement in requirements(package, wanted):
            needed = canonicalize_name(requirement.name)
            if needed != name:  # an extra may name its own package
                needs.add(needed)
            waiting.append((needed, frozenset(requirement.extras)))
    return found


def requirements(package: Distribution, extras: frozenset[str]) -> list[Requirement]:
    """Return what a package needs on this machine, with these extras."""
    told = [Requirement(text) for text in package.requires or ()]
    return [one for one in told if one.marker is None or any(one.marker.evaluate({"extra": e}) for e in {"", *extras})]


def component(package: Distribution) -> dict[str, Any]:
    """Return one entry: name, version, address (purl) and licence, where the package says one."""
    entry: dict[str, Any] = {
        "type": "library",
        "bom-ref": reference(package),
        "name": canonicalize_name(package.metadata["Name"]),
        "version": package.version,
        "purl": reference(package),
    }
    expression = package.metadata.get("License-Expression")
    classified = [
        line.rpartition(" :: ")[2]
        for line in package.metadata.get_all("Classifier") or ()
        if line.startswith("License :: ") and line != "License :: OSI Approved"
    ]
    if expression:
        entry["licenses"] = [{"expression": expression}]
    elif classified:
        entry["licenses"] = [{"license": {"name": name}} for name in sorted(classified)]
    return entry


def reference(package: Distribution) -> str:
    """Return the package's address as the purl specification writes it."""
    return f"pkg:pypi/{canonicalize_name(package.metadata['Name'])}@{package.version.replace('+', '%2B')}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the document; 1 where something is not installed."""
    parser = argparse.ArgumentParser(description="Print a software bill of materials (CycloneDX).")
    parser.add_argument("--extra", action="append", default=[], help="also what this extra needs; may be repeated")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(generate(options.extra))
    except PackageNotFoundError as missing:
        print(f"{missing.name} is not installed, so its version is not known", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
