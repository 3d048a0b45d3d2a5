"""Finding an interpreter with PyTorch and running the bundled runtime in it."""
