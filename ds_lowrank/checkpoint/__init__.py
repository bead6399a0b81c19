"""Checkpoints of every framework: opened, read, checked, listed."""
