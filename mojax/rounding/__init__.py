"""Rounding of one matrix against a quadratic error: scales, codes, and both together."""
