"""Write a model's ONNX files, each compared with PyTorch before it appears in its folder."""

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ddpm_hf.export.graph import facts_of, import_onnx, to_onnx, to_program
from ddpm_hf.export.inputs import Inputs, graph_inputs, noised_images, random_inputs, samples_of
from ddpm_hf.export.variants import quantized, with_half_weights
from ddpm_hf.files import staging_folder
from ddpm_hf.models.onnx_unet import ONNX_FOLDER, OnnxUNet, onnx_name, open_session
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import Denoiser

# Of the float32 graph, root mean square, relative to the predictions': the order of sums is another one. A network that
# amplifies rounding may differ by as many times PyTorch's own rounding.
TOLERANCE, TIMES_ROUNDING = 2e-6, 2
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

    Raises ValueError if the float32 file differs from PyTorch by more than rounding.
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
    expected = [predictions(pipe.unet, inputs) for inputs in batches]
    (folder / ONNX_FOLDER).mkdir(parents=True, exist_ok=True)
    with staging_folder(folder / ONNX_FOLDER) as staged:
        written = []
        for variant, each in models.items():
            path = folder / onnx_name(variant)
            onnx.save(each, staged / path.name)
            largest, relative = compare(staged / path.name, batches, expected)
            if variant is None and not is_rounding(relative, pipe, batches, expected):
                raise ValueError(
                    f"the graph of ONNX differs from the network by {relative:.1e} of its predictions, which is more than "
                    "rounding: nothing was written."
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


def compare(file: Path, batches: Sequence[Inputs], expected: Sequence[np.ndarray]) -> tuple[float, float]:
    """The two numbers of `ExportedFile`, over all batches."""
    session = open_session(file)
    return differences([session.run(None, inputs)[0] for inputs in batches], expected)


def differences(got: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> tuple[float, float]:
    """The largest and the root mean square of differences, each relative to that of `expected`."""
    a, b = (np.concatenate([part.ravel() for part in parts]).astype(np.float64) for parts in (got, expected))
    largest, square = max(np.abs(b).max(), 1e-30), max((b**2).mean(), 1e-30)
    return float(np.abs(a - b).max() / largest), float(np.sqrt(((a - b) ** 2).mean() / square))


def is_rounding(
    relative: float, pipe: DDPMPipelineCustom, batches: Sequence[Inputs], expected: Sequence[np.ndarray]
) -> bool:
    """Whether a root mean square is that of another order of sums."""
    if relative <= TOLERANCE:
        return True
    exact = copy.deepcopy(pipe.unet).double()
    own = differences(expected, [predictions(exact, inputs) for inputs in batches])[1]
    return relative <= TIMES_ROUNDING * own < 1e-3  # where rounding is that large, nothing is shown


def agrees(file: Path, pipe: DDPMPipelineCustom) -> bool:
    """Whether a file is an export of a pipeline: what it records, and its predictions up to rounding."""
    try:
        recorded = OnnxUNet(file).facts
    except ValueError:
        return False
    if any(recorded.get(name) != value for name, value in json.loads(json.dumps(facts_of(pipe))).items()):
        return False
    batches = [graph_inputs(pipe.unet, random_inputs(pipe.unet, pipe.scheduler.config.num_train_timesteps, 2))]
    expected = [predictions(pipe.unet, inputs) for inputs in batches]
    return is_rounding(compare(file, batches, expected)[1], pipe, batches, expected)


def predictions(unet: torch.nn.Module, inputs: Inputs) -> np.ndarray:
    """What the graph has to compute, from the network of PyTorch, in its precision, and the guidance of pipelines."""
    given = {name: torch.from_numpy(value) for name, value in inputs.items()}
    given = {name: value.to(unet.dtype) if value.is_floating_point() else value for name, value in given.items()}
    x, t, scale = given.pop("sample"), given.pop("timestep"), float(given.pop("guidance_scale", 1.0))
    denoiser = Denoiser(unet, len(x), "cpu", **given, guidance_scale=scale)
    with torch.no_grad():
        return denoiser(x, t.repeat(2) if denoiser.is_guided else t).numpy()
