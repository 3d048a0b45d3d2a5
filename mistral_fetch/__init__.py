"""mistral-fetch: distribute, download, verify, keep and run open-weight models."""

__version__ = "0.1.0"
