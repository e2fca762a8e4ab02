"""Guidance by any function: samples of p(x_0)·exp(fn(x_0)), where fn is a log-probability, or minus a loss.

With h_t(x_t) = E[exp fn(x_0) | x_t], the score of the guided process is ∇log p_t(x_t) + ∇log h_t(x_t). The gradient is
therefore added to the score that the network predicts, whatever it predicts (ε: Dhariwal and Nichol 2021, algorithm 2), so
that every sampler takes it. In a step of DDPM this moves the mean by β_t/√α_t·∇log h_t (their algorithm 1, which has Σ_t).
h_t itself is rarely known: `GRADIENTS` lists what stands in for it.
"""

from collections.abc import Callable

import torch

from ddpm_hf.checks import ArgumentTypeError, check_choice, shown
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.models.onnx_unet import OnnxUNet
from ddpm_hf.pipelines.guidance import Denoiser

GuidanceFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# What fn is given, and what its gradient is taken with respect to.
GRADIENTS = {
    "network": "fn(x̂_0(x_t), t): through the prediction of x_0 and the network, as in DPS (Chung et al. 2023)",
    "estimate": "fn(x̂_0, t): √ᾱ_t times the gradient at x̂_0, without the network's derivative: v is held fixed",
    "x_t": "fn(x_t, t): a function of noisy images, such as a classifier that was trained on them",
}


class GuidedDenoiser:
    """A `Denoiser` whose prediction is guided by the gradient of a function; called in the same way.

    Args:
        denoiser: the network, possibly with classifier-free guidance, which comes first.
        diffusion: the chain that the network was trained on.
        device: of the images.
        guidance: fn(x, t), the log-probability of each image, (B,), or their sum. x is float32, (B, C, H, W), and not
            clipped; t is the timestep, a scalar tensor.
        gradient: a key of `GRADIENTS`.

    Raises ValueError or TypeError, naming the argument; for what the function returns, at the first step.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        diffusion: GaussianDiffusion,
        device: torch.device | str,
        guidance: GuidanceFunction,
        gradient: str = "network",
    ):
        if not callable(guidance):
            raise ArgumentTypeError(f"guidance must be a function of x_0 and t, got {shown(guidance)}.")
        check_choice("guidance_gradient", gradient, GRADIENTS)
        if gradient != "estimate" and diffusion.alphas_cumprod[-1] == 0:
            problem = "needs ᾱ_T above 0, got 0 (zero terminal SNR): use 'estimate'"
            raise ValueError(f"guidance_gradient={gradient!r} {problem}.")
        if gradient == "network" and isinstance(denoiser.unet, OnnxUNet):
            raise ValueError("guidance_gradient='network' needs a network in PyTorch: use 'estimate' or 'x_t'.")
        self.unet, self.denoiser, self.guidance, self.gradient = denoiser.unet, denoiser, guidance, gradient
        self.prediction_type = diffusion.prediction_type
        with torch.inference_mode(False):  # tensors of inference mode cannot take part in gradients
            levels = (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
            self.levels = torch.stack(levels).to(device, torch.float32)
            if denoiser.class_labels is not None:
                denoiser.class_labels = denoiser.class_labels.clone()

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), after `scheduler.scale_model_input`; t: the scheduler's timestep, a scalar tensor."""
        with torch.inference_mode(False), torch.enable_grad():  # a caller may have turned gradients off
            x, t = x.detach().clone().requires_grad_(), t.clone()
            signal, noise = self._levels_at(t)
            with torch.set_grad_enabled(self.gradient == "network"):
                output = self.denoiser(x, t)
            prediction = output[:, : x.shape[1]]
            if self.gradient == "x_t":
                seen = source = x
            else:
                seen = source = self._predict_x_0(prediction, x, signal, noise)
                if self.gradient == "network":
                    source = x
                else:
                    seen = source = seen.detach().requires_grad_()
            slope = self._gradient(seen, t, source)
        # √ᾱ_t·slope is the gradient with respect to x_t.
        slope = slope if self.gradient == "estimate" else slope / signal
        factor = {"epsilon": -noise * signal, "sample": noise**2, "v_prediction": -noise}[self.prediction_type]
        return torch.cat([prediction + factor * slope, output[:, x.shape[1] :]], 1).detach()

    def _levels_at(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """√ᾱ_t and √(1−ᾱ_t), interpolated for the fractional timesteps of some schedulers."""
        t = t.to(self.levels.device)
        low, high = self.levels[:, t.floor().long()], self.levels[:, t.ceil().long()]
        return tuple(torch.lerp(low, high, t.float() - t.floor().float()))

    def _predict_x_0(self, prediction, x, signal, noise) -> torch.Tensor:
        if self.prediction_type == "sample":
            return prediction
        if self.prediction_type == "epsilon":
            return (x - noise * prediction) / signal
        return signal * x - noise * prediction

    def _gradient(self, seen: torch.Tensor, t: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        value = self.guidance(seen.clone(), t)  # which the function may change in place
        expected = f"a floating-point tensor with one log-probability per image, ({len(seen)},), or their sum"
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ArgumentTypeError(f"guidance must return {expected}, got {shown(value)}.")
        if value.shape not in ((), (len(seen),)):
            raise ValueError(f"guidance must return {expected}, got shape {tuple(value.shape)}.")
        (slope,) = torch.autograd.grad(value.sum(), source, allow_unused=True) if value.requires_grad else (None,)
        if slope is None:
            raise ValueError("guidance must compute its result from its first argument by differentiable operations.")
        return slope
