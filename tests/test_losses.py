"""Objectives against their definition, and timestep samplers against the distribution they promise."""

import pytest
import torch

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.losses import TIMESTEP_SAMPLERS, denoising_loss, prediction_target, stratified_timesteps


class Constant(torch.nn.Module):
    """A network that always gives the same image."""

    def __init__(self, output):
        super().__init__()
        self.output = torch.nn.Parameter(output)

    def forward(self, x_t, t, class_labels=None, return_dict=True):
        return (self.output.expand_as(x_t),)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_gives_the_target_has_zero_loss_and_one_that_is_off_by_d_has_d_squared(prediction_type):
    diffusion = DDPMSchedulerCustom(prediction_type=prediction_type).diffusion
    x_0, noise = torch.randn(2, 4, 3, 8, 8).unbind()
    t = torch.tensor([0, 10, 500, 999])
    target = prediction_target(diffusion, x_0, t, noise)
    assert denoising_loss(Constant(target), diffusion, x_0, t, noise).abs().max() == 0
    loss = denoising_loss(Constant(target + 0.5), diffusion, x_0, t, noise)
    torch.testing.assert_close(loss, torch.full((4,), 0.25))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_the_target_leads_back_to_x_0(prediction_type):
    diffusion = DDPMSchedulerCustom(prediction_type=prediction_type).diffusion
    x_0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64).unbind()
    t = torch.tensor([1, 300, 999])
    x_t = diffusion.q_sample(x_0, t, noise)
    target = prediction_target(diffusion, x_0, t, noise)
    torch.testing.assert_close(diffusion.predict_x_0(target, x_t, t), x_0, rtol=1e-9, atol=1e-9)


def test_the_loss_of_a_bf16_network_is_taken_in_float32():
    diffusion = DDPMSchedulerCustom().diffusion
    x_0, noise = torch.randn(2, 2, 1, 4, 4).unbind()
    network = Constant(torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16))
    loss = denoising_loss(network, diffusion, x_0, torch.tensor([5, 6]), noise)
    torch.testing.assert_close(loss, noise.square().flatten(1).mean(1))


@pytest.mark.parametrize("name", TIMESTEP_SAMPLERS)
@pytest.mark.parametrize("T", [1, 7, 1000])
def test_every_timestep_is_equally_likely_and_none_is_outside_the_chain(name, T):
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([TIMESTEP_SAMPLERS[name](64, T, generator) for _ in range(2000)])
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() < T
    share = torch.bincount(t, minlength=T) / len(t)
    deviation = (T * (1 - 1 / T) / len(t)) ** 0.5  # of a share, relative to 1/T
    assert ((share * T - 1).abs() <= 5 * deviation + 1e-6).all()


def test_stratified_timesteps_share_the_range_out_evenly():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        t = stratified_timesteps(50, 1000, generator).sort().values
        assert ((t // 20).unique().numel()) >= 49  # one in each fiftieth, up to one that straddles a border
        assert t.diff().max() <= 21
