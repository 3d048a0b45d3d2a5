"""The cache on disk: verified blobs by digest, partials, snapshots and refs; see ``docs/store-format.md``."""
