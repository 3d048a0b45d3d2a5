"""Kernels of our own: C that is compiled where it runs, for what torch has no operator at the memory's speed.

`build` makes the library, `rows` calls it. Whoever uses them must do without where there is no compiler.
"""
