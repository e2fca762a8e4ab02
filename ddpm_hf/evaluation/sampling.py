"""Sample images by their index: deterministic, in batches, on any number of processes."""

from collections.abc import Sequence

import numpy as np
import torch

from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import cycled_labels
from ddpm_hf.seeds import image_generators


def sample_images(
    pipe: DDPMPipelineCustom,
    indices: Sequence[int],
    steps: int | None,
    seed: int,
    batch_size: int,
    conditions: torch.Tensor | None = None,
    **options,
) -> np.ndarray:
    """The images with these indices, (N, H, W, C) in [0, 1]. An image depends on the seed and its index, not on the batch.

    Args:
        steps: sampling steps; None for the model's T.
        batch_size: number of images per call of the pipeline.
        conditions: of a conditional model, (n,) classes or numbers, or (n, D) vectors. Image i gets row i modulo n.
        options: further arguments of the pipeline's call. A class-conditional model gets its classes in turn, by the
            index of the image, unless `conditions` or `class_labels` are given.
    """
    batches = []
    for start in range(0, len(indices), batch_size):
        batch = indices[start : start + batch_size]
        arguments = {"class_labels": cycled_labels(pipe.unet, batch, conditions), "output_type": "np"} | options
        batches.append(pipe(len(batch), image_generators(seed, batch), steps, **arguments).images)
    return np.concatenate(batches)
