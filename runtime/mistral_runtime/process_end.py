"""The end of the process while a thread still works on something that cannot be stopped.

Python's own end waits for nothing and tears down what such a thread stands on, which in native code ends in a hang or a
crash. So then the process ends without it: nothing that such a thread does is to be kept.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from typing import NoReturn

_left: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def left_to_run(thread: threading.Thread) -> None:
    """Remember a thread that nobody will wait for."""
    _left.add(thread)


def end_process(code: int) -> NoReturn:
    """End with an exit code, at once if a thread that was left to run still does."""
    if not any(thread.is_alive() for thread in _left):
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
