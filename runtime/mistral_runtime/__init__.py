"""Run a Mistral-architecture snapshot directory with PyTorch.

This package owns the model, the engine and their command line. It knows nothing of networks, caches or
catalogs: whoever starts it hands over a directory, arguments and standard streams, and reads an exit code.
"""
