"""``python -m mistral_fetch`` is the same program as ``mistral-fetch``."""

from mistral_fetch.cli.app import main

if __name__ == "__main__":
    main()
