"""What a person should know about the swarm's surroundings: one sentence each, once, and the transfer goes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from mistral_fetch.bittorrent.alerts import Alert, DhtCounted, DhtFailed, ListenFailed
from mistral_fetch.bittorrent.listen import missing_interfaces
from mistral_fetch.bittorrent.metainfo import Metainfo
from mistral_fetch.bittorrent.peers import needs_lookup
from mistral_fetch.bittorrent.settings import SwarmSettings
from mistral_fetch.events import Notice, Report


@dataclass
class Remarks:
    """Says what is left out or does not work, each thing once; ``settings`` are the ones the user chose."""

    settings: SwarmSettings
    report: Report
    _said: set[str] = field(default_factory=set)

    def begin(self, metainfo: Metainfo) -> None:
        """Say what this torrent or the proxy keeps from being used, and which interfaces are not there."""
        settings = self.settings
        if metainfo.is_private and (settings.dht or settings.lsd or settings.pex):
            self._say("the torrent is private: its peers come from its trackers alone, not from DHT, LSD or PEX")
        if settings.proxy:
            self._begin_behind_proxy(metainfo)
            return
        for name in missing_interfaces(settings.listen_interfaces):
            self._say(f"there is no network interface {name}: peers cannot connect to this machine there")

    def handle(self, alert: Alert) -> None:
        """Say what an alert tells of the surroundings, if it does."""
        if isinstance(alert, ListenFailed):
            if not self.settings.proxy:
                self._say(f"cannot listen on {alert.address} ({alert.reason}): peers cannot connect to us there")
        elif isinstance(alert, DhtFailed):
            self._say(f"the DHT cannot be joined ({alert.reason}): peers are looked for elsewhere")
        elif isinstance(alert, DhtCounted) and alert.nodes == 0:
            self._say("nobody in the DHT answers: peers are looked for elsewhere")

    def _begin_behind_proxy(self, metainfo: Metainfo) -> None:
        settings = self.settings
        if settings.dht or settings.lsd:
            self._say("DHT and local discovery would go around the proxy: both are left out")
        if settings.use_trackers and len(settings.usable_trackers(metainfo.trackers)) < len(metainfo.trackers):
            self._say("udp trackers would go around the proxy: they are left out")
        named = [peer for peer in settings.peers if needs_lookup(peer)]
        if named:
            self._say(f"names would be looked up around the proxy: left out {', '.join(named[:3])}; give addresses")

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self.report(Notice(text))
