"""Checkpoint dialects, one file each."""
