"""The publisher's side: a directory of weights to a manifest, torrents and checksums."""
