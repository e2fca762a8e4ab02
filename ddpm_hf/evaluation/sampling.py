"""Sample images by their index: deterministic, in batches, on any number of processes."""

from collections.abc import Sequence

import numpy as np

from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import cycled_classes
from ddpm_hf.seeds import image_generators


def sample_images(
    pipe: DDPMPipelineCustom,
    indices: Sequence[int],
    steps: int | None,
    seed: int,
    batch_size: int,
    class_label: int | None = None,
    guidance_scale: float = 1.0,
) -> np.ndarray:
    """The images with these indices, (N, H, W, C) in [0, 1]. An image depends on the seed and its index, not on the batch.

    Args:
        steps: sampling steps; None for the model's T.
        batch_size: number of images per call of the pipeline.
        class_label: of a class-conditional model; None cycles through the classes by index.
        guidance_scale: of classifier-free guidance; 1 is no guidance.
    """
    batches = []
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        options = {"class_labels": labels_of(pipe, batch, class_label), "guidance_scale": guidance_scale}
        generators = image_generators(seed, batch)
        batches.append(pipe(len(batch), generators, steps, output_type="np", **options).images)
    return np.concatenate(batches)


def labels_of(pipe: DDPMPipelineCustom, indices: Sequence[int], class_label: int | None = None) -> list[int] | None:
    """The class of each image: `class_label` if it is given, else by the index. None for an unconditional model."""
    return cycled_classes(pipe.unet, indices) if class_label is None else [class_label] * len(indices)
