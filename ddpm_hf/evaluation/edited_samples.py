"""Images that training/sample.py makes from other images, by their index."""

import numpy as np
import torch

from ddpm_hf.evaluation.sample_options import DEFAULT_STRENGTH, SampleArguments
from ddpm_hf.pipelines.arguments import timesteps_from
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.editing import image_to_image, inpaint
from ddpm_hf.pipelines.inputs import to_images, to_mask
from ddpm_hf.seeds import image_generators, seed_generators


def check_edit(pipe: DDPMPipelineCustom, args: SampleArguments, has_classes: bool) -> None:
    """Read the pictures, and check the options that go with them. Raises ValueError that names the option."""
    if args.interpolate is not None:
        for file in args.interpolate:
            to_images(pipe, "interpolate", file)
        if has_classes and args.class_label is None:
            raise ValueError("interpolate needs a class_label, which all images between the two pictures have.")
    else:
        images = to_images(pipe, "init_image", args.init_image)
        if args.mask is not None:
            to_mask(args.mask, images)
            return
    timesteps_from(pipe, None, args.steps, _strength(args))


def edited_images(pipe: DDPMPipelineCustom, args: SampleArguments, indices: range, **options) -> np.ndarray:
    """The images with these indices, (N, H, W, C) in [0, 1]: they differ by their noise, and with `interpolate` by their
    place between the two pictures alone. `options` are those of editing."""
    generators, options = image_generators(args.seed, indices), {"output_type": "np"} | options
    if args.mask is not None:
        images = to_images(pipe, "init_image", args.init_image).expand(len(indices), -1, -1, -1)
        return inpaint(pipe, images, args.mask, args.steps, generator=generators, **options)
    if args.interpolate is not None:
        one, other = (to_images(pipe, "interpolate", file) for file in args.interpolate)
        weights = torch.linspace(0, 1, args.num_images)[list(indices)].reshape(-1, 1, 1, 1)
        images = (1 - weights) * one + weights * other
        generators = seed_generators([args.seed] * len(indices))
    else:
        images = to_images(pipe, "init_image", args.init_image).expand(len(indices), -1, -1, -1)
    return image_to_image(pipe, images, None, args.steps, strength=_strength(args), generator=generators, **options)


def _strength(args: SampleArguments) -> float:
    return DEFAULT_STRENGTH if args.strength is None else args.strength
