"""Training objectives. The timesteps are drawn by `timestep_samplers.py`."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_hf.checks import check_choice, check_float
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.likelihood import bound_terms
from ddpm_hf.diffusion.tables import working_dtype

LOSS_WEIGHTINGS = ("simple", "min_snr", "p2", "vlb")


class Loss(NamedTuple):
    """Losses of each example, (B,), at least float32: the one to minimize, and L_simple for comparing runs with
    different objectives."""

    objective: Tensor
    simple: Tensor


def prediction_target(diffusion: GaussianDiffusion, x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """The target of the network's output at t, by `prediction_type`: ε, x_0 or v; shape of `x_0`, at least float32."""
    if diffusion.prediction_type == "v_prediction":
        return diffusion.velocity(x_0, t, noise)
    return (noise if diffusion.prediction_type == "epsilon" else x_0).to(working_dtype(x_0))


@dataclass(frozen=True)
class Objective:
    """The loss of an example at its timestep.

    L_simple (DDPM, eq. 14) is the mean over pixels of ‖target − f_θ(x_t, t)‖², the target being ε, x_0 or v.

    Args:
        loss_weighting: "simple": L_simple; "min_snr", "p2": L_simple times `weight`; "vlb": the variational bound
            (DDPM, eq. 5) without L_T, which does not depend on the network, in bits per dimension. The loss is T·L_t,
            whose mean over uniform timesteps is the sum of the bound.
        min_snr_gamma: γ of min-SNR-γ.
        p2_k, p2_gamma: k and γ of P2.
        hybrid_lambda: λ of L_hybrid = L_simple + λ·L_vlb (Improved DDPM, eq. 16), used with variance_type
            "learned_range". L_simple, weighted or not, trains the mean; L_vlb trains the variance only, with the mean
            detached. L_vlb is T·L_t in bits per dimension as above, so that λ = 0.001 at T = 1000 is L_simple + L_t.
            (Improved DDPM's code writes this as L_t·T/1000.)

    Raises ValueError or TypeError that names the argument.
    """

    loss_weighting: str = "simple"
    min_snr_gamma: float = 5.0
    p2_k: float = 1.0
    p2_gamma: float = 1.0
    hybrid_lambda: float = 0.001

    def __post_init__(self):
        check_choice("loss_weighting", self.loss_weighting, LOSS_WEIGHTINGS)
        for name in ("min_snr_gamma", "p2_k", "hybrid_lambda"):
            check_float(name, getattr(self, name), "(0, inf)")
        check_float("p2_gamma", self.p2_gamma, "[0, inf)")

    def __call__(
        self,
        unet: torch.nn.Module,
        diffusion: GaussianDiffusion,
        x_0: Tensor,
        t: Tensor,
        noise: Tensor,
        class_labels: Tensor | None = None,
        input_noise: Tensor | None = None,
    ) -> Loss:
        """The losses of a batch.

        Args:
            unet: called as unet(x_t, t, class_labels); its output is (B, C, H, W), or (B, 2C, H, W) for a learned
                variance, and is converted to at least float32.
            x_0: images (B, C, H, W) in [-1, 1], float32; 8-bit ones if the bound is part of the loss.
            t: timesteps (B,), int64.
            noise: z ~ N(0, I), shape of `x_0`, from which the target is computed.
            class_labels: (B,), for a class-conditional network.
            input_noise: the noise in x_t, if not `noise` (input perturbation).

        Raises ValueError for variance_type="learned": the output is the variance itself, and may be negative.
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
            return Loss(len(diffusion) * bound_terms(diffusion, output, x_0, x_t, t)[0], simple)
        objective = simple if self.loss_weighting == "simple" else self.weight(diffusion, t, simple) * simple
        if is_learned:
            mean_detached = torch.cat([prediction.detach(), output[:, C:]], 1)
            bound, _ = bound_terms(diffusion, mean_detached, x_0, x_t, t)
            objective = objective + self.hybrid_lambda * len(diffusion) * bound
        return Loss(objective, simple)

    def weight(self, diffusion: GaussianDiffusion, t: Tensor, like: Tensor) -> Tensor:
        """The weight of L_simple at t, (B,), with the dtype and device of `like` (B,).

        Each paper states it for one target. The others follow by converting the error, with SNR = ᾱ/(1−ᾱ):
        ‖Δε‖² = SNR·‖Δx_0‖² and ‖Δv‖² = (SNR + 1)·‖Δx_0‖².
        - min-SNR-γ (Hang et al. 2023, section 3.4): min(SNR, γ) of x_0; hence min(SNR, γ)/SNR of ε and
          min(SNR, γ)/(SNR + 1) of v.
        - P2 (Choi et al. 2022, eq. 8): 1/(k + SNR)^γ of ε; hence SNR/(k + SNR)^γ of x_0 and
          SNR/(SNR + 1)/(k + SNR)^γ of v.
        """
        snr = diffusion.lookup("snr", t, like)
        per_x_0 = {"epsilon": snr, "sample": 1.0, "v_prediction": snr + 1}[diffusion.prediction_type]
        if self.loss_weighting == "min_snr":
            return snr.clamp(max=self.min_snr_gamma) / per_x_0
        if self.loss_weighting == "p2":
            p2 = (self.p2_k + snr).pow(-self.p2_gamma)
            return p2 if diffusion.prediction_type == "epsilon" else p2 * snr / per_x_0
        return torch.ones_like(snr)
