"""Images that the tests of editing and inversion share."""

import pytest
import torch

from tests.gaussian_unet import MEAN, STD


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.8


@pytest.fixture
def gaussian_images() -> torch.Tensor:
    noise = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    return (MEAN + STD * noise).clamp(-1, 1)
