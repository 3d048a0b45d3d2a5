"""Models of the cache laid out as other programs expect them, by links; see ``docs/interop.md``."""
