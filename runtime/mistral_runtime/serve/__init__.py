"""An OpenAI-compatible server: one process speaks HTTP and text, another computes and speaks token ids.

The first imports no torch, so it answers while the second loads or computes. What they say to each other is
`protocol.py`'s.
"""
