"""Matplotlib figures: grids of images, the denoising process, and curves. The caller saves them.

Images are arrays (..., H, W, C) in [0, 1], as a pipeline returns them with output_type="np". Of images with 2 channels, or
more than 4, the first three are shown as red, green and blue; a channel that is missing is black.
"""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.pipelines.arguments import check_shape
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import cycled_labels


def image_grid(images: np.ndarray, columns: int = 10, cell_inches: float = 0.6, titles: Sequence[str] = ()) -> Figure:
    """Images (N, H, W, C) in rows of `columns`, with titles above the first row."""
    if images.shape[-1] not in (1, 3, 4):
        images = np.pad(images[..., :3], [(0, 0)] * 3 + [(0, max(0, 3 - images.shape[-1]))])
    rows, (height, width) = -(-len(images) // columns), images.shape[1:3]
    top = 0.3 if titles else 0.0
    size = (columns * cell_inches * width / height, rows * cell_inches + top)
    figure = Figure(figsize=size, dpi=160)
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - top / size[1] - 0.01, wspace=0.06, hspace=0.06)
    for axis, image in zip(axes.flat, images):
        axis.imshow(np.clip(image, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7, pad=3)
    return figure


def to_display(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] to (B, H, W, C) in [0, 1]."""
    return ((x.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def figure_bytes(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def denoising_strip(
    pipe: DDPMPipelineCustom,
    rows: int,
    steps: int | None,
    seed: int,
    columns: int = 11,
    conditions: torch.Tensor | None = None,
) -> Figure:
    """The way of `rows` images from x_T to x_0, shown at `columns` evenly spaced steps. `steps`: sampling steps; None for
    the model's T. Of a class-conditional model, one image of each of the first classes, or of `conditions` (n,) or (n, D)."""
    latents = torch.randn(check_shape(pipe.unet, rows, None), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    labels = cycled_labels(pipe.unet, range(rows), conditions)
    states, titles = [to_display(latents)], ["$x_T$"]
    for step in pipe.denoise(rows, generator, steps, latents=latents, class_labels=labels):
        states.append(to_display(step.x))
        titles.append(f"t = {int(step.t)}")
    titles[-1] = "$x_0$"
    shown = np.linspace(0, len(states) - 1, min(columns, len(states))).round().astype(int)
    cells = np.stack([states[k][row] for row in range(rows) for k in shown])
    return image_grid(cells, len(shown), 0.8, [titles[k] for k in shown])


def loss_curve(
    images_seen: Sequence[float], losses: Sequence[float], validation: Mapping[str, tuple] | None = None
) -> Figure:
    """The training loss as logged and smoothed, on a logarithmic axis, over the images seen. `validation` adds named
    curves (images seen, losses)."""
    figure = Figure(figsize=(6, 3.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.plot(images_seen, losses, color="0.75", linewidth=0.8, label="as logged")
    axis.plot(images_seen, pd.Series(losses, dtype=float).ewm(alpha=0.4).mean(), color="C0", label="smoothed")
    for i, (name, (seen, values)) in enumerate((validation or {}).items(), start=1):
        axis.plot(seen, values, color=f"C{i}", marker=".", label=name)
    axis.set(xlabel="images seen", ylabel="loss", yscale="log")
    axis.legend(frameon=False)
    return figure


def length_curve(
    lengths: Sequence[float], values: Sequence[float], name: str, errors: Sequence[float] | None = None, best: int = 0
) -> Figure:
    """A metric of averaged weights over the length σ_rel of the average. `best` is the index of the marked point."""
    figure = Figure(figsize=(6, 3.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.errorbar(lengths, values, yerr=errors, marker=".", capsize=2)
    axis.plot([lengths[best]], [values[best]], "o", color="C3", label=f"best: {lengths[best]:g}")
    axis.set(xlabel=r"length of the average, $\sigma_{rel}$", ylabel=name)
    axis.legend(frameon=False)
    return figure


def bound_by_timestep(bounds: Mapping[str, VariationalBound]) -> Figure:
    """The terms of the bound in bits/dim, their cumulative sum from L_0, and the mean squared errors of ε and x_0, over
    the timestep. Each named bound is one line."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    for name, bound in bounds.items():
        curves = (bound.terms, np.cumsum(bound.terms), bound.epsilon_mse, bound.x_0_mse)
        for axis, curve in zip(axes, curves):
            axis.plot(np.array(bound.timesteps) + 1, curve, label=name, linewidth=1)
    labels = (r"$L_{t-1}$ (bits/dim)", r"$L_0 + … + L_{t-1}$ (bits/dim)", r"$\epsilon$-MSE", r"$x_0$-MSE")
    for axis, label in zip(axes, labels):
        axis.set(xlabel="t", ylabel=label, xscale="log", yscale="linear" if "…" in label else "log")
    axes[0].legend(frameon=False)
    return figure


def closest_pairs(images: np.ndarray, training: np.ndarray, distances: Sequence[float], columns: int = 10) -> Figure:
    """Pairs of similar images, closest first: the image (N, H, W, C) above the training image (N, H, W, C) nearest to it,
    with their distance as the title."""
    cells = np.concatenate([images[:columns], training[:columns]])
    return image_grid(cells, min(columns, len(images)), 0.8, [f"{distance:.2f}" for distance in distances[:columns]])
