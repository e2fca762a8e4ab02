"""Images of a seed by their index, in batches."""

from collections.abc import Sequence

import numpy as np

from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import cycled_classes
from ddpm_hf.seeds import image_generators


def sample_images(
    pipe: DDPMPipelineCustom, indices: Sequence[int], steps: int | None, seed: int, batch_size: int
) -> np.ndarray:
    """The images of these indices of a seed, (N, H, W, C) in [0, 1], `batch_size` at a time: each the same in any
    company. Of a class-conditional model they go round through the classes, by index."""
    batches = []
    for start in range(0, len(indices), batch_size):
        chosen = indices[start : start + batch_size]
        labels = cycled_classes(pipe.unet, chosen)
        generators = image_generators(seed, chosen)
        batches.append(pipe(len(chosen), generators, steps, output_type="np", class_labels=labels).images)
    return np.concatenate(batches)
