"""Guidance by a function. The data are Gaussian, and so is their product with exp(fn) of a quadratic or linear fn.

x_0 ~ N(m, s²) and fn(x_0) = −(x_0 − y)²/(2τ²) have the product N(m', s'²) with 1/s'² = 1/s² + 1/τ² and m' = s'²·(m/s² + y/τ²).
With x̂_0 = E[x_0 | x_t] and V_t = Var(x_0 | x_t), E[exp fn(x_0) | x_t] is proportional to exp(−(x̂_0 − y)²/(2(τ² + V_t))).
A function of x̂_0 and t with this exponent is therefore exact at every step: the guided network is the optimal one of N(m', s'²).
"""

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput

from benchmarks import classifier_guidance
from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.pipelines.arguments import prepare_denoiser
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler
from tests.gaussian_unet import MEAN, STD, GaussianUNet, gaussian_pipeline
from tests.pipelines.helpers import edits

TARGET, WIDTH = 0.5, 0.25  # y and τ
CHAIN = DDPMSchedulerCustom().diffusion


def variance_given_x_t(t: torch.Tensor, std: float = STD) -> torch.Tensor:
    """Var(x_0 | x_t) = s²·(1−ᾱ_t)/(ᾱ_t·s² + 1−ᾱ_t)."""
    log_snr = torch.logit(CHAIN.alphas_cumprod)
    log_snr = torch.lerp(log_snr[t.floor().long()], log_snr[t.ceil().long()], (t - t.floor()).double())
    bar, rest = torch.sigmoid(log_snr), torch.sigmoid(-log_snr)
    return std**2 * rest / (bar * std**2 + rest)


def quadratic(std: float = STD):
    def fn(x_0, t):
        return -((x_0 - TARGET) ** 2).flatten(1).sum(1) / (2 * (WIDTH**2 + variance_given_x_t(t, std).float()))

    return fn


def posterior(mean: float = MEAN, std: float = STD) -> dict[str, float]:
    precision = 1 / std**2 + 1 / WIDTH**2
    return {"mean": (mean / std**2 + TARGET / WIDTH**2) / precision, "std": precision**-0.5}


class AnyPrediction(GaussianUNet):
    """The optimal network of Gaussian data that predicts what `prediction_type` says."""

    prediction_type = "epsilon"

    def forward(self, sample, timestep, return_dict=True):
        # Not converted from ε, which would lose digits at large t.
        mean, variance = self.config.mean, self.config.std**2
        signal, noise = (
            getattr(CHAIN, f"sqrt_{name}")[timestep].float() for name in ("alphas_cumprod", "one_minus_alphas_cumprod")
        )
        deviation = (sample - signal * mean) / (signal**2 * variance + noise**2)
        epsilon, x_0 = noise * deviation, mean + signal * variance * deviation
        predictions = {"epsilon": epsilon, "sample": x_0, "v_prediction": signal * epsilon - noise * x_0}
        return UNet2DOutput(sample=predictions[self.prediction_type])


def pipeline(prediction_type: str = "epsilon", **changes):
    pipe = gaussian_pipeline(DDPMSchedulerCustom(clip_sample=False, prediction_type=prediction_type))
    pipe.unet = AnyPrediction(**changes)
    pipe.unet.prediction_type = prediction_type
    return pipe


def of_x_t(x_t, t):
    """The quadratic as a function of the noisy image."""
    bar = CHAIN.alphas_cumprod[int(t)]
    x_0 = MEAN + bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar) * (x_t - bar.sqrt() * MEAN)
    return quadratic()(x_0, t)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("gradient", "fn", "data"),
    [
        ("network", quadratic(), {"mean": MEAN, "std": STD}),
        ("x_t", of_x_t, {"mean": MEAN, "std": STD}),
        ("estimate", quadratic(1.0), {"mean": 0.0, "std": 1.0}),  # exact where v does not depend on x_t
    ],
)
def test_guided_prediction_is_the_optimal_one_of_the_posterior(prediction_type, gradient, fn, data):
    pipe = pipeline(prediction_type, **data)
    exact = prepare_denoiser(pipeline(prediction_type, **posterior(**data)), 2)
    guided = prepare_denoiser(pipe, 2, guidance=fn, guidance_gradient=gradient)
    x = torch.randn(2, 1, 64, 64)
    for t in map(torch.tensor, (0, 1, 50, 400, 800, 999)):
        torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-4, atol=2e-4)
        assert (guided(x, t) - pipe.unet(x, t).sample).abs().max() > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_those_of_the_posteriors_network_with_every_sampler(name):
    """The same seed gives the same images, up to rounding and, between timesteps, interpolation."""
    pipes = gaussian_pipeline(), gaussian_pipeline(**posterior())
    for pipe in pipes:
        pipe.scheduler = make_sampler(name, pipe.scheduler)
    steps = 25
    guided, exact = (
        pipe(2, seed=0, num_inference_steps=steps, output_type="pt", **options).images
        for pipe, options in zip(pipes, ({"guidance": quadratic()}, {}))
    )
    torch.testing.assert_close(guided, exact, rtol=0, atol=1e-3)


def test_samples_have_the_mean_and_variance_of_the_posterior():
    x = 2 * gaussian_pipeline()(2, seed=0, num_inference_steps=500, guidance=quadratic(), output_type="pt").images - 1
    expected = posterior()
    # Four standard errors of 8192 independent pixels; 500 steps make the spread 2 % smaller.
    assert x.mean().item() == pytest.approx(expected["mean"], abs=4 * expected["std"] / 8192**0.5)
    assert x.std().item() == pytest.approx(expected["std"], rel=0.05)


def test_linear_function_shifts_the_mean_and_keeps_the_spread():
    """exp(a·x_0) makes N(m, s²) N(m + a·s², s²): exact without regard to t."""
    slope = 5.0
    guided = prepare_denoiser(gaussian_pipeline(), 1, guidance=lambda x_0, t: slope * x_0.sum())
    exact = prepare_denoiser(gaussian_pipeline(mean=MEAN + slope * STD**2), 1)
    x = torch.randn(1, 1, 64, 64)
    for t in map(torch.tensor, (0, 50, 400, 999)):
        torch.testing.assert_close(guided(x, t), exact(x, t), rtol=1e-4, atol=1e-4)


def test_step_of_ddpm_moves_its_mean_by_beta_times_the_gradient():
    """Dhariwal and Nichol's algorithm 1 has Σ_t·∇log p(y | x_t), here with β_t/√α_t for Σ_t."""
    fn, x, t = (lambda x_t, t: (3 * x_t).sum()), torch.randn(1, 1, 64, 64), 300
    pipe = gaussian_pipeline()
    plain, guided = (
        pipe.scheduler.step(
            prepare_denoiser(pipe, 1, **options)(x, torch.tensor(t)), t, x, torch.Generator().manual_seed(0)
        )
        for options in ({}, {"guidance": fn, "guidance_gradient": "x_t"})
    )
    moved = CHAIN.betas[t] / CHAIN.alphas[t].sqrt() * 3
    torch.testing.assert_close(guided[0] - plain[0], torch.full_like(x, moved.item()), rtol=0, atol=1e-5)


EDITS = edits(400, 10, 5, (20, 5, 2)) | {
    "denoise": lambda pipe, x, **options: pipe.to_images([*pipe.denoise(2, seed=0, num_inference_steps=10, **{k: v for k, v in options.items() if k != "output_type"})][-1].x, "pt"),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_editing_and_stepping_are_guided_too(gaussian_images, edit):
    exact = edit(gaussian_pipeline(**posterior()), gaussian_images, output_type="pt")
    guided = edit(gaussian_pipeline(), gaussian_images, output_type="pt", guidance=quadratic())
    torch.testing.assert_close(guided, exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("gradient", ["network", "estimate", "x_t"])
def test_classifier_free_guidance_comes_first(make_pipeline, gradient):
    pipe = make_pipeline(num_class_embeds=4)
    torch.nn.init.normal_(pipe.unet.class_embedding.weight, std=3)
    mark_null_class(pipe.unet)
    options = {"class_labels": [0, 2], "guidance_scale": 3.0}
    plain, x, t = prepare_denoiser(pipe, 2, **options), torch.randn(2, 3, 8, 8), torch.tensor(12)
    guided = prepare_denoiser(pipe, 2, **options, guidance=lambda x, t: -(x**4).sum(), guidance_gradient=gradient)
    signal = pipe.scheduler.diffusion.sqrt_alphas_cumprod[12].float()
    noise = pipe.scheduler.diffusion.sqrt_one_minus_alphas_cumprod[12].float()

    def x_0(x):
        return signal * x - noise * plain(x, t)  # the network predicts v

    gradients = {
        "network": lambda x: torch.func.grad(lambda x: -(x_0(x) ** 4).sum())(x),
        "estimate": lambda x: signal * -4 * x_0(x).detach() ** 3,
        "x_t": lambda x: -4 * x**3,
    }
    expected = plain(x, t) - noise / signal * gradients[gradient](x)
    torch.testing.assert_close(guided(x, t), expected.detach(), rtol=1e-4, atol=1e-4)


def test_variance_channels_and_weights_are_left_alone(make_pipeline, scheduler_config):
    pipe = make_pipeline(DDPMSchedulerCustom(**scheduler_config, variance_type="learned_range"), out_channels=6)
    plain, guided = (
        prepare_denoiser(pipe, 2, **options)(torch.ones(2, 3, 8, 8), torch.tensor(5))
        for options in ({}, {"guidance": lambda x, t: x.sum()})
    )
    torch.testing.assert_close(guided[:, 3:], plain[:, 3:].detach(), rtol=0, atol=1e-6)
    assert (guided[:, :3] - plain[:, :3]).abs().max() > 1e-4
    assert all(p.requires_grad and p.grad is None for p in pipe.unet.parameters())


def test_gradients_may_be_turned_off_around_the_call(make_pipeline):
    pipe = make_pipeline(num_class_embeds=4)
    options = {"class_labels": 1, "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    results = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():
            results.append(pipe(2, guidance=lambda x, t: -(x**2).sum(), **options).images)
    assert not results[0].requires_grad
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"guidance": 3}, "guidance must be a function"),
        ({"guidance": lambda x, t: x.sum(), "guidance_gradient": "x_1"}, "guidance_gradient must be one of"),
        ({"guidance_gradient": None}, "guidance_gradient must be one of"),
        ({"guidance_gradient": "x_t"}, "guidance_gradient='x_t' needs guidance"),
        ({"guidance": lambda x, t: 1.0}, "guidance must return a floating-point tensor"),
        ({"guidance": lambda x, t: x}, r"or their sum, got shape \(2, 3, 8, 8\)"),
        ({"guidance": lambda x, t: x.sum(0).sum()[None].expand(3)}, r"got shape \(3,\)"),
        ({"guidance": lambda x, t: x.sum().round().long()}, "guidance must return a floating-point tensor"),
        ({"guidance": lambda x, t: x.detach().sum()}, "from its first argument by differentiable"),
        ({"guidance": lambda x, t: torch.ones((), requires_grad=True)}, "from its first argument by differentiable"),
    ],
)
def test_wrong_functions_are_named(tiny_pipeline, options, named):
    with pytest.raises(ValueError, match=named):
        tiny_pipeline(2, num_inference_steps=2, **options)


@pytest.mark.parametrize("gradient", ["network", "estimate", "x_t"])
def test_function_may_change_its_argument_in_place(tiny_pipeline, gradient):
    options = {"num_inference_steps": 3, "seed": 0, "output_type": "pt", "guidance_gradient": gradient}
    plain, in_place = (
        tiny_pipeline(2, guidance=fn, **options).images
        for fn in (lambda x, t: -((2 * x) ** 2).sum(), lambda x, t: -(x.mul_(2) ** 2).sum())
    )
    torch.testing.assert_close(in_place, plain, rtol=0, atol=1e-6)


def test_zero_terminal_snr_is_guided_by_the_estimate_alone(make_pipeline, scheduler_config):
    pipe = make_pipeline(DDPMSchedulerCustom(**scheduler_config, rescale_betas_zero_snr=True))
    options = {"guidance": lambda x, t: -(x**2).sum(), "num_inference_steps": 3, "seed": 0, "output_type": "pt"}
    for gradient in ("network", "x_t"):
        with pytest.raises(ValueError, match=f"guidance_gradient='{gradient}' needs ᾱ_T above 0"):
            pipe(2, guidance_gradient=gradient, **options)
    assert pipe(2, guidance_gradient="estimate", **options).images.isfinite().all()


def test_compiled_pipeline_refuses_it(tiny_pipeline):
    tiny_pipeline.compile()
    with pytest.raises(ValueError, match="guidance by a function cannot be compiled"):
        tiny_pipeline(1, guidance=lambda x, t: x.sum())


def test_classifier_of_noisy_digits_chooses_the_digit(capsys):
    options = ["--scales", "0", "3", "--per_class", "5", "--steps", "20", "--training_steps", "600"]
    shares = classifier_guidance.main(options)
    assert shares[0.0] < 0.35 and shares[3.0] > 0.8
    assert capsys.readouterr().out.count("are the digit asked for") == 2
