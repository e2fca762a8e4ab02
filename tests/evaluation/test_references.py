"""Moments in files are those that other programs write and read."""

import numpy as np
import pytest
import torch

from ddpm_hf.evaluation.metrics import frechet_distance, moments
from ddpm_hf.evaluation.references import read_reference, write_reference


@pytest.fixture
def features():
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7)) + 3


def test_written_moments_are_mu_and_sigma_of_numpy_and_read_back_exactly(features, tmp_path):
    own = moments(features)
    write_reference(tmp_path / "reference.npz", own)
    with np.load(tmp_path / "reference.npz") as arrays:  # as pytorch-fid reads it
        assert set(arrays) == {"mu", "sigma"}
        np.testing.assert_allclose(arrays["mu"], features.double().numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(arrays["sigma"], np.cov(features.double().numpy(), rowvar=False), rtol=1e-12)
    read = read_reference(tmp_path / "reference.npz", 6)
    assert read.mean.equal(own.mean) and read.covariance.equal(own.covariance)


def test_float32_moments_beside_other_arrays_are_read_as_float64(features, tmp_path):
    x = features.double().numpy()
    others = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), "mu_s": np.zeros(3), "sigma_s": np.zeros((3, 3))}
    moments32 = {"mu": x.mean(0).astype(np.float32), "sigma": np.cov(x, rowvar=False).astype(np.float32)}
    np.savez(tmp_path / "adm.npz", **others, **moments32)  # as the reference batches of guided-diffusion
    read = read_reference(tmp_path / "adm.npz")
    assert read.covariance.dtype == torch.float64 and frechet_distance(read, moments(features)) < 1e-5


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": np.zeros((3, 3))}, r"must hold the arrays 'mu' and 'sigma', got \['arr_0'\]"),
        (
            {"mu": np.zeros(5), "sigma": np.eye(5)},
            r"must hold 'mu' \(6,\) and 'sigma' \(6, 6\), got \(5,\) and \(5, 5\)",
        ),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"got \(6,\) and \(5, 5\)"),
        ({"mu": np.zeros((1, 6)), "sigma": np.eye(6)}, r"got \(1, 6\)"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, "NaN or infinite"),
        ({"mu": np.zeros(6), "sigma": np.triu(np.ones((6, 6)))}, "not a covariance"),
        ({"mu": np.zeros(6), "sigma": -np.eye(6)}, "not a covariance"),
        ({"mu": np.array(["a"] * 6), "sigma": np.eye(6)}, "cannot be read"),
        ({"mu": np.array([None] * 6), "sigma": np.eye(6)}, "cannot be read as a .npz file"),
    ],
)
def test_wrong_arrays_are_named(tmp_path, arrays, message):
    np.savez(tmp_path / "wrong.npz", **arrays)
    with pytest.raises(ValueError, match=f"reference .*wrong.npz.*{message}"):
        read_reference(tmp_path / "wrong.npz", 6)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"<html>", None])
def test_files_that_are_not_npz_are_named(tmp_path, content):
    if content is not None:
        (tmp_path / "no.npz").write_bytes(content)
    with pytest.raises(ValueError, match="reference .*no.npz.* cannot be read as a .npz file"):
        read_reference(tmp_path / "no.npz")
