"""Moments of features in files, which other programs for the Fréchet distance write and read too."""

import io
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.evaluation.metrics import Moments
from ddpm_hf.files import atomic_file


def read_reference(file: str | Path, dim: int | None = None) -> Moments:
    """The moments in a .npz file of arrays `mu` (d,) and `sigma` (d, d), as pytorch-fid, EDM and guided-diffusion keep them.

    Raises ValueError for a file without such arrays, and for moments that are not finite, of a covariance that is not
    symmetric or has a negative variance, or of another number of features than `dim`.
    """
    path = Path(file).expanduser()
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: arrays[name].astype(np.float64) for name in ("mu", "sigma") if name in arrays}
            names = list(arrays)
    except Exception as error:  # zipfile and its decompressors raise errors of many types
        raise ValueError(f"reference {str(file)!r} cannot be read as a .npz file: {error}") from error
    if len(found) < 2:
        raise ValueError(f"reference {str(file)!r} must hold the arrays 'mu' and 'sigma', got {names}.")
    mean, covariance = found["mu"], found["sigma"]
    accepted = "'mu' (d,) and 'sigma' (d, d)" if dim is None else f"'mu' ({dim},) and 'sigma' ({dim}, {dim})"
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or len(mean) != (dim or len(mean)):
        raise ValueError(f"reference {str(file)!r} must hold {accepted}, got {mean.shape} and {covariance.shape}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"reference {str(file)!r} has NaN or infinite values.")
    # Published covariances are rounded to float32, some of them.
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6) or (covariance.diagonal() < 0).any():
        raise ValueError(
            f"reference {str(file)!r}: 'sigma' is not a covariance: not symmetric, or of negative variance."
        )
    return Moments(torch.from_numpy(mean), torch.from_numpy(covariance))


def write_reference(file: str | Path, moments: Moments) -> None:
    """Write moments for `read_reference`."""
    stream = io.BytesIO()
    np.savez(stream, mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    atomic_file(Path(file).expanduser(), stream.getvalue())
