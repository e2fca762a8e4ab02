"""Draw the figures of docs/derivation.md: `python docs/make_figures.py`

The schedules come from the package's tables. The noising strip shows a photograph from scikit-learn.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from ddpm_hf import DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.evaluation.plots import figure_bytes, image_grid, to_display

IMAGES = Path(__file__).parent / "images"


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
        "noising.png": noising_strip(linear, pixels),
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


def noising_strip(diffusion: GaussianDiffusion, image: torch.Tensor, columns: int = 10, seed: int = 0) -> Figure:
    """One image (C, H, W) in [-1, 1] from x_0 to x_T (eq. 2), with the same noise at every timestep."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))[None]
    timesteps = torch.linspace(0, len(diffusion) - 1, columns - 1).round().int().tolist()
    states = [image[None]] + [diffusion.q_sample(image[None], t, noise) for t in timesteps]
    titles = ["$x_0$"] + [f"$x_{{{t + 1}}}$" for t in timesteps]
    return image_grid(to_display(torch.cat(states)), columns, 0.9, titles)


if __name__ == "__main__":
    main()
