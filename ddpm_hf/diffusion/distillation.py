"""Progressive distillation (Salimans and Ho 2022): a student learns to do in one step of DDIM what its teacher does in two."""

import torch
from torch import Tensor

from ddpm_hf.checks import check_int
from ddpm_hf.diffusion.gaussian import FIXED_VARIANCES, Clip, GaussianDiffusion
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.diffusion.tables import TableLookup
from ddpm_hf.diffusion.timesteps import spaced_timesteps

TARGETS = ("sample", "v_prediction")


class DistillationObjective:
    """The loss of a student of N steps, whose teacher takes 2N. It is called as `Objective` is.

    Student and teacher sample by DDIM on evenly spaced timesteps ("trailing"), of which the student has every second
    one. From x_t, two steps of the teacher lead through t' to t'', with its predictions x̂ of x_0 at t and x̂' at t'. The
    target is the x_0 for which one step leads from x_t to the same x_t'' (algorithm 2). With κ = √SNR it is a mean of the two,

        x̃ = x̂ + w·(x̂' − x̂),   w = (κ_t'' − κ_t')/(κ_t'' − κ_t),

    and w = 1 for the last step, whose κ_t'' is infinite. Written so, no digits cancel. The loss of an example is
    max(SNR_t, 1)·‖x̃ − x̂_θ‖² as a mean over pixels, the truncated SNR of section 4.

    Args:
        teacher: called as teacher(x_t, t, class_labels); without gradients, in eval mode.
        diffusion: the chain of T steps that both were trained on. It predicts x_0 or v: ε says nothing about x_0 where
            there is no signal, which is where few steps begin. Its variance is a fixed one.
        steps: N, at most T/2.
        clip: maps the predictions of the teacher, as in sampling; may work in place.

    Raises ValueError that names the argument.
    """

    def __init__(self, teacher: torch.nn.Module, diffusion: GaussianDiffusion, steps: int, clip: Clip | None = None):
        check_distilled(steps, len(diffusion), diffusion.prediction_type, diffusion.variance_type)
        self.teacher, self.steps, self.clip = teacher, steps, clip
        timesteps = spaced_timesteps(len(diffusion), 2 * steps, "trailing")
        timesteps[::2] = spaced_timesteps(len(diffusion), steps, "trailing")  # the same but for rounding
        self.chain = diffusion.respace(timesteps)
        self._timesteps = self.chain.timesteps
        root = self.chain.sqrt_snr
        infinity = torch.full((1,), torch.inf, dtype=torch.float64, device="cpu")
        end, middle, start = torch.cat([infinity, root[1:-1:2]]), root[::2], root[1::2]
        weight = torch.where(end.isinf(), 1.0, (end - middle) / (end - start))
        self._lookup = TableLookup({"weight": weight})

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
        """The losses of a batch. Arguments are those of `Objective`. The T timesteps t are shared out among the N steps of
        the student, in order; `simple` is ‖f_θ − f‖², where f is what the network would predict for x̃."""
        step = t * self.steps // len(diffusion)
        chain, index = self.chain, 2 * step + 1
        x_t = chain.q_sample(x_0, index, noise if input_noise is None else input_noise)
        target = self.target(x_t, step, class_labels)
        output = self._call(unet, x_t, index, class_labels)
        prediction = chain.convert(target, x_t, index, "sample", chain.prediction_type)
        simple = (output.to(target.dtype) - prediction).square().flatten(1).mean(1)
        error = (chain.predict_x_0(output, x_t, index) - target).square().flatten(1).mean(1)
        return Loss(chain.lookup("snr", index, error).clamp(min=1) * error, simple)

    @torch.no_grad()
    def target(self, x_t: Tensor, step: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """x̃ for x_t (B, C, H, W) at the student's steps (B,), int64, of which 0 is the last in sampling."""
        first = 2 * step + 1
        output = self._call(self.teacher, x_t, first, class_labels)
        middle = self.chain.ddim_mean_std(output, x_t, first, clip=self.clip, use_clipped_model_output=True)
        output = self._call(self.teacher, middle.mean, first - 1, class_labels)
        x_0 = self.chain.predict_x_0(output, middle.mean, first - 1)
        x_0 = x_0 if self.clip is None else self.clip(x_0)
        return middle.x_0.lerp(x_0, self._lookup("weight", step, x_0).to(x_0.dtype))

    def _call(self, unet: torch.nn.Module, x_t: Tensor, index: Tensor, class_labels: Tensor | None) -> Tensor:
        self._timesteps = self._timesteps.to(index.device)  # once
        return unet(x_t, self._timesteps[index], class_labels, return_dict=False)[0]


def check_distilled(steps: int, T: int, prediction_type: str, variance_type: str) -> None:
    """Raise ValueError for a student of `steps` steps that such a model cannot teach."""
    check_int("distill_steps", steps, 1, T // 2, "half of num_train_timesteps")
    if prediction_type not in TARGETS:
        raise ValueError(
            f"distill_steps needs a model that predicts 'sample' or 'v_prediction', got {prediction_type!r}, which says "
            "nothing about the image in pure noise, where few steps begin."
        )
    if variance_type not in FIXED_VARIANCES:
        raise ValueError(f"distill_steps needs a model with a fixed variance, got {variance_type!r}.")
