"""A place where recipes for whole machines run as they are written, without being root, without a network.

Absolute paths of the recipe become paths below the sandbox. ``python3 -m venv`` and ``pip`` are small scripts which do
the same without a network: the wheel is really installed, and its dependencies are borrowed from this environment.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
# What recipes call a model, a wheel; the test's own takes their place.
MODELS = ("mistral-7b-instruct@v0.3", "http://origin:8080/my-model.meta4")
WHEEL = re.compile(r"https://files\.example/[\w.-]+\.whl")
MACHINE = re.compile(r"(?<![\w./~-])/(?=(?:opt|etc/mistral-fetch|var/lib|models|cache|src|wheels|key|secret)\b)")

_PYTHON = """\
#!/bin/sh
test "$1 $2" = "-m venv" || exec {python} "$@"
{python} -m venv --without-pip "$3"
cp {pip} "$3/bin/pip"
"""
_PIP = """\
#!/bin/sh
folder=$(dirname "$0")
test -x "$folder/mistral-fetch" && exit  # as pip does where a requirement is satisfied
for last; do :; done
case $last in *.whl*) {python} -m pip --python "$folder/python" "$@" --no-deps --no-index;; esac
for packages in "$folder"/../lib/python*/site-packages; do printf '%s' '{borrowed}' >"$packages/borrowed.pth"; done
"""


@dataclass
class Sandbox:
    """A machine's directories below ``root``, and the commands of recipes run in it."""

    root: Path
    model: str
    wheel: Path
    tool: Path = Path()  # an environment that was made before, for recipes that begin with an image
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tools = self.root / "tools"
        tools.mkdir(parents=True)
        (self.root / "home").mkdir()
        borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        self._script("pip", _PIP.format(python=sys.executable, borrowed="\n".join(borrowed) + "\n"))
        self._script("python3", _PYTHON.format(python=sys.executable, pip=tools / "pip"))
        self._script("useradd", "#!/bin/sh\n")
        self.environment = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(self.root / "home"),
            "MISTRAL_FETCH_DISK_RESERVE": "0",
            "TMPDIR": str(self.root),
            # A new home has no compiled kernels; that they can be built is another test's concern, and takes its time.
            "MISTRAL_RUNTIME_KERNELS": "off",
        }

    def _script(self, name: str, text: str) -> None:
        path = self.root / "tools" / name
        path.write_text(text)
        path.chmod(0o755)

    def translate(self, text: str) -> str:
        """Return a recipe's text with this sandbox's paths, model and wheel."""
        for name in MODELS:
            text = text.replace(name, self.model)
        text = WHEEL.sub(self.wheel.as_uri(), text)
        return MACHINE.sub(f"{self.root}/", text)

    def path(self, place: str) -> Path:
        """Return where a path of the machine is; its parent is made."""
        found = self.root / place.lstrip("/")
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def run(self, command: str | list[str], **variables: str) -> str:
        """Run a shell's text, or a list as it is; return its standard output. What fails, fails the test."""
        argv = ["sh", "-ec", command] if isinstance(command, str) else command
        environment = {**self.environment, **{name: self.translate(value) for name, value in variables.items()}}
        argv = [self.translate(word) for word in argv]
        done = subprocess.run(
            argv, cwd=self.root, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{shlex.join(argv)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def use(self, prefix: str) -> None:
        """Let an environment's programs be found by name, as an image does."""
        self.environment["PATH"] = f"{self.root / prefix.lstrip('/')}/bin{os.pathsep}{self.environment['PATH']}"
