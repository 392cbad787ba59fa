"""A tensor times an orthogonal matrix along one of its axes: float32 on the host, a piece at a time."""

from __future__ import annotations

import numpy as np

from mojax.kernels.hadamard_matrices import dividing, factors

PIECE = 2**23  # elements turned at a time


def turn(
    w: np.ndarray, axis: int, matrix: np.ndarray | None, size: int, gain: np.ndarray | None = None
) -> np.ndarray:
    """`(w * gain) Q` along an axis, float32, in blocks of `size`.

    Args:
      axis: counted from the last.
      matrix: Q `[size, size]`, or signs `[size]` of a random Hadamard matrix; None: not turned.
      gain: `[n]` of that axis.
    """
    if w.ndim > 2:
        return np.stack([turn(part, axis, matrix, size, gain) for part in w])
    rows = np.moveaxis(w.reshape(1, -1) if w.ndim == 1 else w, axis, -1)
    out = np.empty(rows.shape, np.float32)
    step = max(1, PIECE // rows.shape[1])
    for i in range(0, len(rows), step):
        x = np.ascontiguousarray(rows[i : i + step], np.float32)
        x = x if gain is None else x * gain[None, :]
        out[i : i + step] = x if matrix is None else _times(x.reshape(-1, size), matrix).reshape(x.shape)
    return np.moveaxis(out, -1, axis).reshape(w.shape)


def _times(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """`x [rows, size]` times the matrix, float32."""
    if matrix.ndim == 2:
        return x @ matrix.astype(np.float32)
    n = dividing(len(matrix))
    x = (x * matrix.astype(np.float32)[None, :]).reshape(-1, n)
    found = factors(n)
    assert found is not None
    for h in found:  # symmetric: the first axis of those left is summed over, its results become the last
        m = len(h)
        x = np.matmul(x.reshape(-1, m, n // m).transpose(0, 2, 1), h.astype(np.float32)).reshape(-1, n)
    return (x * np.float32(n**-0.5)).reshape(-1, len(matrix))


def dense(matrix: np.ndarray) -> np.ndarray:
    """The orthogonal matrix float32 `[size, size]` that signs `[size]` stand for."""
    return _times(np.eye(len(matrix), dtype=np.float32), matrix)
