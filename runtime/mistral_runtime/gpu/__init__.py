"""Decoding with static shapes, so that a GPU can replay it as a graph. All of it runs on the CPU as well, eagerly."""
