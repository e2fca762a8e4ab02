"""Draw the figures of docs/derivation.md: `python docs/make_figures.py`

The schedules come from the package's tables. The images are scikit-learn's photographs, and patches of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.data.builtin import photos
from ddpm_hf.data.decoding import ImageFormat, to_signed
from ddpm_hf.data.images import Images
from ddpm_hf.evaluation.plots import figure_bytes, image_grid, to_display

IMAGES = Path(__file__).parent / "images"
COLUMNS = 10


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    linear = DDPMSchedulerCustom().diffusion
    names = ["linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
    several = {name: DDPMSchedulerCustom(beta_schedule=name).diffusion for name in names}
    photo = ImageOps.fit(Image.fromarray(load_sample_image("flower.jpg")), (96, 96))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
    figures = {
        "linear.png": schedule_curves({"linear": linear}),
        "schedules.png": schedule_curves(several),
        "noising.png": image_grid(to_display(noised(linear, pixels)), COLUMNS, 0.9, noising_titles(linear)),
        "noising_schedules.png": noising_by_schedule(list(several.values())[:3], pixels),
        "denoising_patches.png": denoising_strips(linear, patches()),
    }
    for name, figure in figures.items():
        (IMAGES / name).write_bytes(figure_bytes(figure))


def schedule_curves(diffusions: Mapping[str, GaussianDiffusion]) -> Figure:
    """β_t, √(1−β_t), ᾱ_t and the signal-to-noise ratio over t/T, one line per named chain."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    axes = figure.subplots(2, 2).flat
    tables = {
        "betas": r"$\beta_t$",
        "sqrt_alphas": r"$\sqrt{1-\beta_t}$",
        "alphas_cumprod": r"$\bar\alpha_t$",
        "snr": "SNR",
    }
    for axis, (table, label) in zip(axes, tables.items()):
        for name, diffusion in diffusions.items():
            t = np.arange(1, len(diffusion) + 1) / len(diffusion)
            axis.plot(t, getattr(diffusion, table).numpy(), label=name)
        axis.set(xlabel="t / T", ylabel=label, yscale="log" if table == "snr" else "linear")
    if len(diffusions) > 1:
        axes[0].legend(frameon=False)
    return figure


def shown_timesteps(diffusion: GaussianDiffusion) -> list[int]:
    return torch.linspace(0, len(diffusion) - 1, COLUMNS - 1).round().int().tolist()


def noising_titles(diffusion: GaussianDiffusion) -> list[str]:
    return ["$x_0$"] + [f"$x_{{{t + 1}}}$" for t in shown_timesteps(diffusion)]


def noised(diffusion: GaussianDiffusion, image: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """One image (C, H, W) in [-1, 1] from x_0 to x_T (eq. 2), with the same noise at every timestep."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))[None]
    return torch.cat([image[None]] + [diffusion.q_sample(image[None], t, noise) for t in shown_timesteps(diffusion)])


def noising_by_schedule(diffusions: Sequence[GaussianDiffusion], image: torch.Tensor) -> Figure:
    """A row for each chain."""
    rows = torch.cat([noised(diffusion, image) for diffusion in diffusions])
    return image_grid(to_display(rows), COLUMNS, 0.5, noising_titles(diffusions[0]))


def patches() -> torch.Tensor:
    """32×32 patches of both photographs, (1024, 3, 32, 32) in [-1, 1], float64."""
    return to_signed(Images(photos()["train"], ImageFormat((32, 32), channels=3))[range(1024)]["images"]).double()


def denoising_strips(diffusion: GaussianDiffusion, images: torch.Tensor, rows: int = 4, seed: int = 4) -> Figure:
    """The reverse process (eq. 11) from x_T to x_0, with the exact prediction of the noise for `images`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, *images.shape[1:], generator=generator)
    shown, cells = shown_timesteps(diffusion), []
    for t in reversed(range(len(diffusion))):
        if t in shown:
            cells.append(to_display(x))
        step = diffusion.p_mean_std(exact_epsilon(diffusion, images, x, t), x, t)
        x = step.mean + step.std * torch.randn(x.shape, generator=generator)
    cells.append(to_display(x))
    titles = noising_titles(diffusion)[::-1]
    return image_grid(np.stack(cells, 1).reshape(-1, *cells[0].shape[1:]), COLUMNS, 0.9, titles)


def exact_epsilon(diffusion: GaussianDiffusion, images: torch.Tensor, x_t: torch.Tensor, t: int) -> torch.Tensor:
    """E[ε | x_t] for x_0 drawn from `images` (N, C, H, W), float64: Bayes' rule with q(x_t | x_0). Shape of `x_t`."""
    signal, variance = diffusion.alphas_cumprod[t].sqrt(), diffusion.one_minus_alphas_cumprod[t]
    x, y = x_t.flatten(1).double(), images.flatten(1)
    # −‖x − √ᾱ·y‖²/(2(1−ᾱ)), without the part that is the same for all images.
    weights = ((signal * x @ y.T - signal**2 / 2 * y.square().sum(1)) / variance).softmax(1)
    x_0 = (weights @ y).reshape(x_t.shape)
    return diffusion.convert(x_0, x_t.double(), t, "sample", "epsilon").float()


if __name__ == "__main__":
    main()
