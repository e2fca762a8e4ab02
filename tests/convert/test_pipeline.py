"""Converted networks and chains compute what those of their repositories do."""

import logging

import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import save_file

from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.convert.pipeline import convert
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.schedules import make_betas
from tests.convert.reference import DDPMTorch, GuidedBlocks, Names, OpenAI, PytorchDDPM, Reference

X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
T = torch.tensor([0, 1, 3])  # where the network's time features, in float32, are exact to 1e-7
SOURCES = {
    "pytorch_diffusion": (Names, {"variance_type": "fixed_small"}),
    "improved-diffusion": (OpenAI, {"num_heads": 1}),
    "guided-diffusion": (OpenAI, {"num_head_channels": 64}),
    "pytorch-ddpm": (PytorchDDPM, {}),
    "ddpm-torch": (DDPMTorch, {"variance_type": "fixed_large"}),
}


@pytest.fixture
def make(tmp_path):
    """The pipeline of a reference network's checkpoint, and what the reference computes."""

    def make(source, network, labels=None, classes=0, change=None, **options):
        expected = network(X, T, labels, classes)
        if change is not None:
            change(network.weights)
        save_file({name: t.contiguous() for name, t in network.weights.items()}, tmp_path / "c.safetensors")
        where = {"checkpoint": str(tmp_path / "c.safetensors"), "output_dir": str(tmp_path), "resolution": 8}
        return convert(ConvertOptions(source=source, **where, **options)), expected

    return make


def assert_equal_outputs(pipe, expected, labels=None):
    with torch.no_grad():
        output = pipe.unet.double()(X, T, class_labels=labels).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("attends", [(False, True), (True, False, True), (False, False)], ids=str)
def test_outputs_are_those_of_the_repository_wherever_attention_is(make, source, attends):
    names, options = SOURCES[source]
    options = options | ({"num_head_channels": 32} if source == "guided-diffusion" else {})
    heads = 1 if source != "guided-diffusion" else 2
    channels = (64,) * len(attends) if heads > 1 else (32, 64, 64)[: len(attends)]
    network = Reference(names, channels, attends, layers=len(attends) - 1, heads=heads)
    assert_equal_outputs(*make(source, network, **options))


@pytest.mark.parametrize("order", ["heads first", "parts first"])
@pytest.mark.parametrize("names", [OpenAI, GuidedBlocks])
def test_heads_and_residual_resampling_of_guided_diffusion(make, order, names):
    network = Reference(names, (32, 64), (False, True), 2, heads=4, order=order, scale_shift=True, outputs=6)
    options = {"num_heads": 4, "use_new_attention_order": order == "parts first"}
    pipe, expected = make("guided-diffusion", network, **options)
    assert_equal_outputs(pipe, expected)
    assert pipe.scheduler.config.variance_type == "learned_range" and pipe.unet.config.attention_head_dim == 16


def test_classes_of_openai(make):
    labels = torch.tensor([0, 4, 2])
    pipe, expected = make(
        "improved-diffusion", Reference(OpenAI, (32, 32), (True, False)), labels, classes=5, num_heads=1
    )
    assert_equal_outputs(pipe, expected, labels)


def test_a_converted_pipeline_is_plain_diffusers(make, tmp_path):
    pipe, expected = make("pytorch-ddpm", Reference(PytorchDDPM, (32, 64), (False, True)))
    pipe.save_pretrained(tmp_path / "saved")
    stock = DDPMPipeline.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        output = stock.unet(X.float(), T).sample.double()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


class OfAnyT(torch.nn.Module):
    """A network that depends on what it is told, a fraction too."""

    def forward(self, x, t):
        return (x * torch.cos(t.double() / 700) + torch.sin(t.double() / 300)) / 2


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_model_told_a_quarter_of_t_has_the_exact_chain_of_1000_steps(make, schedule):
    chain = {"num_train_timesteps": 4000, "noise_schedule": schedule}
    pipe, _ = make("improved-diffusion", Reference(OpenAI, (32, 32), (True, False)), num_heads=1, **chain)
    betas = make_betas(*{"cosine": ("squaredcos_cap_v2", 4000), "linear": ("linear", 4000, 2.5e-5, 0.005)}[schedule])
    theirs = GaussianDiffusion(betas, variance_type="fixed_large").respace(range(0, 4000, 4))
    network, noise = OfAnyT(), torch.Generator().manual_seed(0)
    x = y = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=noise)
    pipe.scheduler.set_timesteps(1000)
    for i in reversed(range(1000)):
        z = torch.randn(x.shape, dtype=torch.float64, generator=noise)
        t = int(theirs.timesteps[i])
        step = theirs.p_mean_std(network(x, torch.tensor(t / 4)), x, i, lambda x_0: x_0.clamp(-1, 1))
        x = step.mean + step.std * z
        y = pipe.scheduler.step(network(y, torch.tensor(i)), i, y, variance_noise=z).prev_sample
    assert x.std() > 0.01 and x.isfinite().all()
    torch.testing.assert_close(y, x, rtol=0, atol=1e-12)


def test_a_chain_that_is_told_t_stays_as_it_is(make, caplog):
    caplog.set_level(logging.ERROR)
    chain = {"num_train_timesteps": 4000, "noise_schedule": "cosine", "num_heads": 1}
    network = Reference(OpenAI, (32, 32), (True, False))
    pipe, _ = make("guided-diffusion", network, **chain)
    assert (pipe.scheduler.config.num_train_timesteps, pipe.scheduler.config.trained_betas) == (4000, None)
    other, _ = make("improved-diffusion", network, rescale_timesteps=False, **chain)
    assert torch.equal(other.scheduler.diffusion.betas, pipe.scheduler.diffusion.betas)


@pytest.mark.parametrize("ours", [{"source": "pytorch-ddpm"}, {"source": "ddpm-torch", "variance_type": "fixed_small"}])
def test_a_checkpoint_of_another_repository_is_refused(make, ours):
    with pytest.raises(ValueError, match=f"is no checkpoint of {ours['source']} that can be converted"):
        make(network=Reference(OpenAI, (32, 64), (False, True)), **ours)


def test_networks_that_diffusers_cannot_express_are_refused(make):
    heads = Reference(OpenAI, (32, 64), (True, True), heads=4)
    with pytest.raises(ValueError, match=r"num_heads = 4 over \[32, 64\] channels: UNet2DModel has the same number"):
        make("improved-diffusion", heads, num_heads=4)
    network = Reference(OpenAI, (32, 64), (False, True), outputs=5)
    with pytest.raises(ValueError, match="must predict 3 or 6 channels from 3, got 5"):
        make("improved-diffusion", network, num_heads=1)


def test_a_variance_that_the_network_does_not_have_is_refused(make):
    network = Reference(OpenAI, (32, 64), (False, True))
    with pytest.raises(ValueError, match="variance_type must fit .* got learned_range"):
        make("improved-diffusion", network, num_heads=1, variance_type="learned_range")
    with pytest.raises(ValueError, match="variance_type must fit .* got None.*pytorch_diffusion has no default"):
        make("pytorch_diffusion", Reference(Names, (32, 64), (False, True)))


def test_weights_that_are_unknown_missing_or_nan_are_named(make):
    for change, message in (
        (lambda w: w.update(extra=torch.zeros(3)), "unknown weights extra"),
        (lambda w: w.pop("tail.2.bias"), "lacks conv_out.bias"),
        (lambda w: w["head.weight"].fill_(float("nan")), "conv_in.weight holds NaN"),
        (lambda w: w.pop("head.weight"), "no weights for 'conv_in.weight'"),
    ):
        with pytest.raises(ValueError, match=message):
            make("pytorch-ddpm", Reference(PytorchDDPM, (32, 64), (False, True)), change=change)
