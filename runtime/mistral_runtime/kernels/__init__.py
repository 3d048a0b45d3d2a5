"""Kernels of our own: C that is compiled where it runs, for what torch has no operator at the memory's speed.

`build` makes the libraries; `rows`, `tiles` and `attention` call them. Whoever uses them must do without where there is
no compiler.
"""
