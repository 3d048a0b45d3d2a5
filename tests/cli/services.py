"""Commands that run until they are told to stop: start one, wait for its first line, stop it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Service:
    """A process of the program; its readiness is its first line of output."""

    def __init__(self, environment, *arguments):
        environment.setenv("PYTHONPATH", str(ROOT))
        argv = [sys.executable, "-W", "error", "-m", "mistral_fetch", *map(str, arguments)]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.ready = self.process.stdout.readline()

    def stop(self, number=signal.SIGTERM):
        """Stop it; return exit code, further output and what it told people."""
        self.process.send_signal(number)
        return self.end()

    def end(self):
        """Wait for its end; return exit code, further output and what it told people."""
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err
