"""Shared prompts: the tree, attention over it, the tiled head, and the families that take them."""
