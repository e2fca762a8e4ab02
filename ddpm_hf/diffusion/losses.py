"""What training minimizes. Where in the chain it looks is in `timestep_samplers.py`."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ddpm_hf.diffusion.gaussian import GaussianDiffusion, gaussian_kl, working_dtype
from ddpm_hf.diffusion.likelihood import discretized_log_likelihood

LOSS_WEIGHTINGS = ("simple", "min_snr", "p2", "vlb")


class Loss(NamedTuple):
    """Of each example, (B,), at least float32: what is minimized, and L_simple beside it, which compares runs of
    different objectives."""

    objective: torch.Tensor
    simple: torch.Tensor


def prediction_target(
    diffusion: GaussianDiffusion, x_0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """What the network should output at t, by `prediction_type`: ε, x_0 or v; shape of `x_0`, at least float32."""
    if diffusion.prediction_type == "epsilon":
        return noise.to(working_dtype(x_0))
    if diffusion.prediction_type == "sample":
        return x_0.to(working_dtype(x_0))
    return diffusion.velocity(x_0, t, noise)


@dataclass(frozen=True)
class Objective:
    """The loss of an example at its timestep.

    L_simple (DDPM, eq. 14) is the mean over pixels of ‖target − f_θ(x_t, t)‖², the target being ε, x_0 or v.

    Args:
        loss_weighting: "simple": L_simple; "min_snr", "p2": L_simple times `weight`; "vlb": the variational bound
            (DDPM, eq. 5) in bits per dimension but for L_T, which no network changes: T·L_t, whose mean over uniform
            timesteps is the bound's sum.
        min_snr_gamma: γ of min-SNR-γ.
        p2_k, p2_gamma: k and γ of P2.
        hybrid_lambda: λ of L_hybrid = L_simple + λ·L_vlb (Improved DDPM, eq. 16), for a chain whose variance_type is
            "learned_range". L_simple, weighted or not, trains the mean, and L_vlb the variance alone: the mean is detached in it. L_vlb is
            T·L_t in bits per dimension as above, so that λ = 0.001 at T = 1000 is L_simple + L_t. (Improved DDPM's
            code writes this as L_t·T/1000.)

    Raises ValueError for an unknown weighting and for numbers outside their range.
    """

    loss_weighting: str = "simple"
    min_snr_gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    hybrid_lambda: float = 0.001

    def __post_init__(self):
        if self.loss_weighting not in LOSS_WEIGHTINGS:
            raise ValueError(f"loss_weighting must be one of {LOSS_WEIGHTINGS}, got {self.loss_weighting!r}.")
        for name in ("min_snr_gamma", "p2_k", "hybrid_lambda"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)!r}.")
        if not 0 <= self.p2_gamma < math.inf:
            raise ValueError(f"p2_gamma must be a finite number of at least 0, got {self.p2_gamma!r}.")

    def __call__(
        self,
        unet: torch.nn.Module,
        diffusion: GaussianDiffusion,
        x_0: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        input_noise: torch.Tensor | None = None,
    ) -> Loss:
        """The losses of a batch.

        Args:
            unet: called as unet(x_t, t, class_labels); its output, with twice the channels for a learned variance, is
                taken to at least float32.
            x_0: images (B, C, H, W) in [-1, 1], float32; of 8 bits where the bound is asked for.
            t: timesteps (B,), int64. noise: z ~ N(0, I), shape of `x_0`: what the target is made of.
            class_labels: (B,), for a class-conditional network.
            input_noise: what x_t is made of, if not `noise` (input perturbation).

        Raises ValueError for a chain of variance_type="learned", whose output is a variance and may be negative.
        """
        if diffusion.variance_type == "learned":
            raise ValueError("variance_type='learned' cannot be trained: use 'learned_range', which stays positive.")
        x_t = diffusion.q_sample(x_0, t, noise if input_noise is None else input_noise)
        output = unet(x_t, t, class_labels, return_dict=False)[0]
        target = prediction_target(diffusion, x_0, t, noise)
        output = output.to(target.dtype)
        is_learned, C = diffusion.variance_type == "learned_range", x_0.shape[1]
        prediction = output[:, :C] if is_learned else output
        simple = (prediction - target).square().flatten(1).mean(1)
        if self.loss_weighting == "vlb":
            return Loss(len(diffusion) * bound_terms(diffusion, output, x_0, x_t, t), simple)
        objective = simple if self.loss_weighting == "simple" else self.weight(diffusion, t, simple) * simple
        if is_learned:
            mean_detached = torch.cat([prediction.detach(), output[:, C:]], 1)
            scale = self.hybrid_lambda * len(diffusion)
            objective = objective + scale * bound_terms(diffusion, mean_detached, x_0, x_t, t)
        return Loss(objective, simple)

    def weight(self, diffusion: GaussianDiffusion, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The factor of L_simple at t, (B,), of the dtype and device of `like` (B,).

        Papers state it for one target. The others follow from the same error seen in other terms, with
        SNR = ᾱ/(1−ᾱ): ‖Δε‖² = SNR·‖Δx_0‖² and ‖Δv‖² = (SNR + 1)·‖Δx_0‖².
        - min-SNR-γ (Hang et al. 2023, section 3.4): min(SNR, γ) of x_0; hence min(SNR, γ)/SNR of ε and
          min(SNR, γ)/(SNR + 1) of v.
        - P2 (Choi et al. 2022, eq. 8): 1/(k + SNR)^γ of ε; hence SNR/(k + SNR)^γ of x_0 and
          SNR/(SNR + 1)/(k + SNR)^γ of v.
        """
        snr = diffusion.at("snr", t, like)
        per_x_0 = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[diffusion.prediction_type]
        if self.loss_weighting == "min_snr":
            return snr.clamp(max=self.min_snr_gamma) / per_x_0
        if self.loss_weighting == "p2":
            p2 = (self.p2_k + snr).pow(-self.p2_gamma)
            return p2 if diffusion.prediction_type == "epsilon" else p2 * snr / per_x_0
        return torch.ones_like(snr)


def bound_terms(
    diffusion: GaussianDiffusion, output: torch.Tensor, x_0: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """The variational bound's term of each example at its t, in bits per dimension, differentiable (DDPM, eq. 5).

    At t > 0 it is KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)); at t = 0 it is L_0 = −log p_θ(x_0 | x_1), by the
    discretized decoder (DDPM, eq. 13). Not clipped: a clipped x_0 has no gradient.

    `output` is the network's at (x_t, t), (B, C, H, W), or (B, 2C, H, W) for a learned variance. Returns (B,).
    """
    mean, log_variance, predicted = diffusion.p_mean_variance(output, x_t, t)
    # The two means differ in x_0 alone: μ̃_t − μ_θ = √ᾱ_{t−1}β_t/(1−ᾱ_t)·(x_0 − x̂_0). Taken so, nothing cancels.
    difference = diffusion.at("posterior_mean_coef_x_0", t, x_0) * (x_0 - predicted)
    true_log_variance = diffusion.at("posterior_log_variance_clipped", t, x_0)
    kl = gaussian_kl(difference, true_log_variance, torch.zeros_like(difference), log_variance)
    # Both are computed for every example: which of them it is would have to be read back from the device.
    decoder = -discretized_log_likelihood(x_0, mean, torch.as_tensor(log_variance))
    nats = torch.where((t == 0).reshape(-1, 1, 1, 1), decoder, kl)
    return nats.flatten(1).mean(1) / math.log(2)
