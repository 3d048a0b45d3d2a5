"""The program's version, apart from the package's front door so that every module may read it."""

__version__ = "0.1.0"
