"""Kernels, one file per op. This package imports nothing."""
