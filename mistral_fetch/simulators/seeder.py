"""A seeder as a process of its own, for tests, the demo and trials on one machine.

``python -m mistral_fetch.simulators.seeder --torrent F --dir D`` prints one JSON line with its port when it is
ready, and ends on SIGTERM, SIGINT or the end of its standard input; so it never outlives whoever started it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

from mistral_fetch.bittorrent.metainfo import parse_metainfo
from mistral_fetch.bittorrent.seed import Seeder
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.errors import MistralFetchError


def main(arguments: list[str] | None = None) -> int:
    """Seed until told to stop; return the exit code."""
    options = _parse(arguments)
    done = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        done.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        metainfo = parse_metainfo(options.torrent.read_bytes())
        seeder = Seeder(
            metainfo,
            options.dir.resolve(),
            SwarmSettings(listen_interfaces=options.listen, use_trackers=False, uploads=True),
            rate_bytes_per_second=options.rate,
            skips_checks=options.lie,
        )
        seeder.wait_until_seeding()
    except MistralFetchError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        return int(error.exit_code)
    ready = {"port": seeder.port, "info_hash": metainfo.info_hash, "info_hash_v2": metainfo.info_hash_v2}
    print(json.dumps(ready), flush=True)
    threading.Thread(target=_wait_for_end_of_input, args=(done,), daemon=True).start()
    while not done.wait(0.5):
        pass  # in slices, so that signals are handled between them
    seeder.close()
    return 0


def _wait_for_end_of_input(done: threading.Event) -> None:
    while sys.stdin.readline():
        pass
    done.set()


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torrent", type=Path, required=True, help="the .torrent file")
    parser.add_argument("--dir", type=Path, required=True, help="where its files lie under their own names")
    parser.add_argument("--listen", default="127.0.0.1:0", help="address and port; port 0 takes a free one")
    parser.add_argument("--rate", type=int, help="bytes per second to send at most")
    parser.add_argument("--lie", action="store_true", help="claim to have everything, and send what is there unchecked")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
