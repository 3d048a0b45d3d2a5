"""The `chat` command: a question in, an answer out, until the input ends.

It works in a terminal and in a pipe alike: answers go to stdout, everything else to stderr.
"""
