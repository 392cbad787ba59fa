"""Pallas kernels for NVIDIA GPUs (Mosaic GPU), one file per kernel. This package imports nothing."""
