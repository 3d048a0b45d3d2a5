"""Torrents: metainfo, magnets and the running client. This folder is the only user of libtorrent."""
