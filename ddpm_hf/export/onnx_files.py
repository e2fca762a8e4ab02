"""Write a model's ONNX files, each compared with PyTorch before it appears in its folder."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.export.graph import import_onnx, to_onnx, to_program
from ddpm_hf.export.inputs import Inputs, graph_inputs, noised_images, random_inputs, samples_of
from ddpm_hf.export.variants import quantized, with_half_weights
from ddpm_hf.files import staging_folder
from ddpm_hf.models.onnx_unet import ONNX_FOLDER, onnx_name, open_session
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import Denoiser

# Of the float32 graph, root mean square, relative to the predictions': the order of sums is another one.
TOLERANCE = 2e-6
SIZES = (1, 2, 5)  # of the batches that are compared
GUIDANCE_SCALE = 2.5  # of every second batch


@dataclass(frozen=True)
class ExportedFile:
    """A file, and how far its predictions are from PyTorch's: the largest difference, relative to the largest prediction,
    and the root of the mean square, relative to that of the predictions."""

    path: Path
    largest_difference: float
    relative_error: float


def export_onnx(
    pipe: DDPMPipelineCustom,
    folder: str | Path,
    variants: Sequence[str] = (),
    images: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    num_images: int = 128,
) -> list[ExportedFile]:
    """Write onnx/model.onnx in the folder, and onnx/model_fp16.onnx and onnx/model_int8.onnx if `variants` has "fp16" and
    "int8". All files appear at the end.

    Args:
        pipe: the model, on the CPU, in float32.
        images, labels: x_0, (N, C, H, W) in [-1, 1], which calibrate int8, noised to timesteps over the whole chain. None:
            `num_images` samples of the model.

    Raises ValueError if the float32 file differs from PyTorch by more than `TOLERANCE`.
    """
    onnx, folder, unet = import_onnx(), Path(folder), pipe.unet.eval()
    model = to_onnx(pipe)
    T, scales = pipe.scheduler.config.num_train_timesteps, (1.0, GUIDANCE_SCALE)
    batches = [
        graph_inputs(unet, random_inputs(unet, T, size, seed), scales[seed % 2]) for seed, size in enumerate(SIZES)
    ]
    models = {None: model}
    if "fp16" in variants:
        models["fp16"] = with_half_weights(model)
    if "int8" in variants:
        if images is None:
            images, labels = samples_of(pipe, num_images)
        noised = noised_images(pipe, images, labels)
        models["int8"] = quantized(model, noised)
        batches += noised[: len(SIZES)]
    (folder / ONNX_FOLDER).mkdir(parents=True, exist_ok=True)
    with staging_folder(folder / ONNX_FOLDER) as staged:
        written = []
        for variant, each in models.items():
            path = folder / onnx_name(variant)
            onnx.save(each, staged / path.name)
            largest, relative = compare(staged / path.name, pipe, batches)
            if variant is None and not relative <= TOLERANCE:
                raise ValueError(
                    f"the graph of ONNX differs from the network by {relative:.1e} of its predictions, which is more than "
                    f"rounding ({TOLERANCE:g}): nothing was written."
                )
            written.append(ExportedFile(path, largest, relative))
        for file in written:
            os.replace(staged / file.path.name, file.path)
    return written


def export_program(pipe: DDPMPipelineCustom, folder: str | Path) -> Path:
    """Write model.pt2, the network as a program of `torch.export`. It is called with sample, timestep (B,) and, for a
    class-conditional model, class_labels (B,), by name."""
    folder = Path(folder)
    program = to_program(pipe.unet.eval(), pipe.scheduler.config.num_train_timesteps)
    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder) as staged:
        torch.export.save(program, staged / "model.pt2")
        os.replace(staged / "model.pt2", folder / "model.pt2")
    return folder / "model.pt2"


# ---------------------------------------------------------------------- comparison


def compare(file: Path, pipe: DDPMPipelineCustom, batches: Sequence[Inputs]) -> tuple[float, float]:
    """The two numbers of `ExportedFile`, over all batches."""
    session, largest, largest_output, squares, squared_outputs = open_session(file), 0.0, 0.0, 0.0, 0.0
    for inputs in batches:
        expected = predictions(pipe, inputs)
        difference = session.run(None, inputs)[0].astype(np.float64) - expected
        largest, largest_output = max(largest, np.abs(difference).max()), max(largest_output, np.abs(expected).max())
        squares, squared_outputs = squares + (difference**2).sum(), squared_outputs + (expected**2).sum()
    return largest / max(largest_output, 1e-30), float(np.sqrt(squares / max(squared_outputs, 1e-30)))


def agrees(file: Path, pipe: DDPMPipelineCustom) -> bool:
    """Whether a file computes the network of a pipeline, up to rounding."""
    inputs = graph_inputs(pipe.unet, random_inputs(pipe.unet, pipe.scheduler.config.num_train_timesteps, 2))
    return compare(file, pipe, [inputs])[1] <= TOLERANCE


def predictions(pipe: DDPMPipelineCustom, inputs: Inputs) -> np.ndarray:
    """What the graph has to compute, from the network of PyTorch and the pipeline's guidance."""
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    x, t, scale = given.pop("sample"), given.pop("timestep"), float(given.pop("guidance_scale", 1.0))
    denoiser = Denoiser(pipe.unet, len(x), "cpu", **given, guidance_scale=scale)
    with torch.no_grad():
        return denoiser(x, t.repeat(2) if denoiser.is_guided else t).numpy().astype(np.float64)
