"""Figures, as matplotlib figures that the caller saves: sample grid, noising and denoising strips, curves.

Images are arrays (..., H, W, C) in [0, 1], as a pipeline gives them with output_type="np".
"""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure

from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import Labels

PNG_COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels


def image_grid(images: np.ndarray, columns: int = 10, cell_inches: float = 0.6) -> Figure:
    """Images (N, H, W, C) in rows of `columns`."""
    rows = -(-len(images) // columns)
    return _cells(images, rows, columns, cell_inches)


def _cells(images: np.ndarray, rows: int, columns: int, cell_inches: float, titles: Sequence[str] = ()) -> Figure:
    height, width = images.shape[1:3]
    top = 0.3 if titles else 0.0
    size = (columns * cell_inches * width / height, rows * cell_inches + top)
    figure = Figure(figsize=size, dpi=160)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - top / size[1] - 0.01, wspace=0.06, hspace=0.06)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, image in zip(axes.flat, images):
        axis.imshow(_displayable(image), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7, pad=3)
    return figure


def _displayable(image: np.ndarray) -> np.ndarray:
    image = np.clip(image, 0, 1)
    return image[..., 0] if image.shape[-1] == 1 else image


def to_display(x: torch.Tensor) -> np.ndarray:
    """(B, C, H, W) in [-1, 1] to (B, H, W, C) in [0, 1]."""
    return ((x.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def figure_bytes(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def png_bytes(image: np.ndarray, bits: int = 8) -> bytes:
    """One image (H, W, C) in [0, 1], C of 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGBA), as the bytes of a PNG file
    of 8 or 16 bits, pixel for pixel. Raises ValueError for other channels and bits."""
    if bits not in (8, 16) or image.ndim != 3 or image.shape[-1] not in PNG_COLOUR_TYPES:
        raise ValueError(
            f"a PNG file holds 8 or 16 bits of (H, W, C) with C in {list(PNG_COLOUR_TYPES)}, "
            f"got bits={bits!r} and shape {image.shape}."
        )
    # Written here, since Pillow has no colors of 16 bits. Big-endian, and every row behind a 0: unfiltered.
    levels = quantized(image, bits).astype(np.uint8 if bits == 8 else ">u2")
    H, W, C = image.shape
    rows = np.zeros((H, 1 + W * C * bits // 8), np.uint8)
    rows[:, 1:] = np.ascontiguousarray(levels).view(np.uint8).reshape(H, -1)
    header = struct.pack(">IIBBBBB", W, H, bits, PNG_COLOUR_TYPES[C], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def quantized(images: np.ndarray, bits: int) -> np.ndarray:
    """Images in [0, 1] as the nearest of 2^bits levels, uint8 or uint16."""
    levels = (np.clip(images, 0, 1).astype(np.float64) * (2**bits - 1)).round()
    return levels.astype(np.uint8 if bits == 8 else np.uint16)


def noising_strip(diffusion: GaussianDiffusion, image: torch.Tensor, columns: int = 10, seed: int = 0) -> Figure:
    """One image (C, H, W) in [-1, 1] from x_0 to x_T (eq. 2), the same noise z throughout."""
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))[None]
    timesteps = torch.linspace(0, len(diffusion) - 1, columns - 1).round().int().tolist()
    states = [image[None]] + [diffusion.q_sample(image[None], t, noise) for t in timesteps]
    titles = ["$x_0$"] + [f"$x_{{{t + 1}}}$" for t in timesteps]
    return _cells(to_display(torch.cat(states)), 1, columns, 0.9, titles)


def denoising_strip(
    pipe: DDPMPipelineCustom,
    rows: int = 4,
    columns: int = 11,
    num_inference_steps: int | None = None,
    seed: int = 0,
    class_labels: Labels = None,
) -> Figure:
    """`rows` images on their way from x_T to x_0, at `columns` moments evenly spaced over the chain; of these classes,
    for a class-conditional model."""
    size = pipe.unet.config.sample_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    latents = torch.randn(rows, pipe.unet.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    states, titles = [to_display(latents)], ["$x_T$"]
    for step in pipe.denoise(rows, generator, num_inference_steps, latents=latents, class_labels=class_labels):
        states.append(to_display(step.x))
        titles.append(f"t = {int(step.t)}")
    titles[-1] = "$x_0$"
    # Titles name the timestep an image is made at; the last is the image itself.
    kept = np.linspace(0, len(states) - 1, min(columns, len(states))).round().astype(int)
    cells = np.stack([states[k][row] for row in range(rows) for k in kept])
    return _cells(cells, rows, len(kept), 0.8, [titles[k] for k in kept])


def loss_curve(
    images_seen: Sequence[float],
    losses: Sequence[float],
    smoothing: float = 0.6,
    validation: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Training loss against images seen, as logged and smoothed, on a logarithmic axis; beside it, under their names,
    losses of validation images (images seen, losses)."""
    figure = Figure(figsize=(6, 3.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    smooth, weight, curve = 0.0, 0.0, []
    for loss in losses:
        smooth, weight = smoothing * smooth + (1 - smoothing) * loss, smoothing * weight + (1 - smoothing)
        curve.append(smooth / weight)
    axis.plot(images_seen, losses, color="0.75", linewidth=0.8, label="as logged")
    axis.plot(images_seen, curve, color="C0", label="smoothed")
    for i, (name, (seen, values)) in enumerate((validation or {}).items(), start=1):
        axis.plot(seen, values, color=f"C{i}", marker=".", label=name)
    axis.set(xlabel="images seen", ylabel="loss", yscale="log")
    axis.legend(frameon=False)
    return figure


def length_curve(
    lengths: Sequence[float], values: Sequence[float], name: str, errors: Sequence[float] | None = None, best: int = 0
) -> Figure:
    """A figure of averaged weights against the average's length σ_rel, the best one marked."""
    figure = Figure(figsize=(6, 3.5), dpi=130, layout="constrained")
    axis = figure.subplots()
    axis.errorbar(lengths, values, yerr=errors, marker=".", capsize=2)
    axis.plot([lengths[best]], [values[best]], "o", color="C3", label=f"best: {lengths[best]:g}")
    axis.set(xlabel=r"length of the average, $\sigma_{rel}$", ylabel=name)
    axis.legend(frameon=False)
    return figure


def schedule_curves(diffusions: Mapping[str, GaussianDiffusion]) -> Figure:
    """β_t, √(1−β_t), ᾱ_t and the signal-to-noise ratio against t/T, one line per named chain."""
    figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
    axes = figure.subplots(2, 2).flat
    curves = {
        r"$\beta_t$": "betas",
        r"$\sqrt{1-\beta_t}$": "sqrt_alphas",
        r"$\bar\alpha_t$": "alphas_cumprod",
        "SNR": "snr",
    }
    for axis, (label, table) in zip(axes, curves.items()):
        for name, diffusion in diffusions.items():
            t = np.arange(1, len(diffusion) + 1) / len(diffusion)
            axis.plot(t, getattr(diffusion, table).numpy(), label=name)
        axis.set(xlabel="t / T", ylabel=label, yscale="log" if table == "snr" else "linear")
    axes[0].legend(frameon=False) if len(diffusions) > 1 else None
    return figure


def bound_by_timestep(bounds: Mapping[str, VariationalBound]) -> Figure:
    """The bound's terms in bits/dim, their running sum from L_0 on, and the mean squared errors of ε and x_0 against
    the timestep, one line per named bound: chains of one model, or training against validation images."""
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
    """Pairs that lie close together, closest first, the image (N, H, W, C) above the training image (N, H, W, C)
    nearest to it and their distance above both."""
    columns = min(columns, len(images))
    cells = np.concatenate([images[:columns], training[:columns]])
    return _cells(cells, 2, columns, 0.8, [f"{distance:.2f}" for distance in distances[:columns]])
