"""Algorithms, one file each: pure functions from parameters to parameters."""
