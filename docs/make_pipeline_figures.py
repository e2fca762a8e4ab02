"""Draw the figures of docs/pipeline.md: `python docs/make_pipeline_figures.py`

Each figure is a grid of images from a trained model of the digits. Its inputs are digits of the test split.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat, to_signed
from ddpm_hf.data.images import Images
from ddpm_hf.evaluation.plots import figure_bytes, image_grid, to_display
from ddpm_hf.files import atomic_file
from ddpm_hf.pipelines.editing import denoise_image, image_to_image, inpaint, interpolate
from ddpm_hf.pipelines.inversion import interpolate_seeds, reconstruct
from ddpm_hf.schedulers.samplers import make_sampler

IMAGES = Path(__file__).parent / "images"
COLUMNS, STEPS = 10, 100


@dataclass
class FigureArguments:
    model: str = HfArg(default="model_cards/digits", help="model of the digits")


def main() -> None:
    (args,) = HfArgumentParser(FigureArguments).parse_args_into_dataclasses()
    pipe = DDPMPipelineCustom.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    given = to_signed(Images(digits()["test"], ImageFormat((8, 8), channels=1))[range(COLUMNS)]["images"])
    IMAGES.mkdir(exist_ok=True)
    for name, make in FIGURES.items():
        atomic_file(
            IMAGES / f"pipeline_{name}.png", figure_bytes(image_grid(np.concatenate(make(pipe, given)), COLUMNS))
        )


def samplers(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: DDPM 100 steps, DDIM 20, DPM-Solver++ 20, from one seed."""
    rows = []
    for name, steps in (("ddpm", STEPS), ("ddim", 20), ("dpmsolver++", 20)):
        fast = DDPMPipelineCustom(pipe.unet, make_sampler(name, pipe.scheduler))
        fast.set_progress_bar_config(disable=True)
        rows.append(fast(COLUMNS, seed=0, num_inference_steps=steps, output_type="np").images)
    return rows


def image_to_image_rows(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: the inputs, and images made from them after 1/5, 2/5 and 3/5 of the noising process."""
    T = pipe.scheduler.config.num_train_timesteps
    made = [
        image_to_image(pipe, given, T * k // 5, min(STEPS, T * k // 5), seed=0, output_type="np") for k in (1, 2, 3)
    ]
    return [to_display(given), *made]


def interpolation(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: interpolations of one pair each, λ from 0 to 1."""
    T, weights = pipe.scheduler.config.num_train_timesteps, np.linspace(0, 1, COLUMNS).tolist()
    mixed = interpolate(pipe, given[:3], given[3:6], T // 4, weights, STEPS, output_type="np")
    return [np.stack([images[row] for images in mixed]) for row in range(3)]


def seeds(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: interpolations of one pair of seeds each, along the great circle between their noise."""
    weights = np.linspace(0, 1, COLUMNS).tolist()
    return [interpolate_seeds(pipe, a, b, weights, STEPS, "np") for a, b in ((0, 1), (2, 3), (4, 5))]


def inversion(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: the inputs, and their reconstructions from the noise that DDIM inversion encodes them as."""
    return [to_display(given), reconstruct(pipe, given, STEPS, output_type="np")]


def inpainting(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: the inputs, their upper halves, and two inpainted lower halves."""
    mask = torch.zeros(given.shape[2:])
    mask[mask.shape[0] // 2 :] = 1
    known = torch.where(mask == 1, torch.zeros(()), given)
    made = [inpaint(pipe, known, mask, 50, 5, 5, seed=seed, output_type="np") for seed in (0, 1)]
    return [to_display(given), to_display(known), *made]


def denoising(pipe: DDPMPipelineCustom, given: torch.Tensor) -> list[np.ndarray]:
    """Rows: the inputs, with noise of standard deviation 0.5, E[x_0 | image], and a sample of p(x_0 | image)."""
    noisy = given + 0.5 * torch.randn(given.shape, generator=torch.Generator().manual_seed(0))
    cleaned = [denoise_image(pipe, noisy, 0.5, steps, seed=0, output_type="np") for steps in (1, 50)]
    return [to_display(given), to_display(noisy), *cleaned]


FIGURES = {
    "samplers": samplers,
    "image_to_image": image_to_image_rows,
    "interpolation": interpolation,
    "seeds": seeds,
    "inversion": inversion,
    "inpainting": inpainting,
    "denoising": denoising,
}

if __name__ == "__main__":
    main()
