"""Inputs of a model's network: random ones, to compare runtimes, and noised images, to calibrate 8-bit arithmetic."""

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_hf.models.builders import image_size, temb_channels
from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom
from ddpm_hf.pipelines.guidance import cycled_labels, null_class_of
from ddpm_hf.schedulers.samplers import as_ddpm, make_sampler, recommended_sampler

Inputs = dict[str, np.ndarray]  # of the ONNX graph, by name
BATCH_SIZE = 16
DEFAULT_PIXELS = 8  # height and width of the smallest level, for a network that takes images of any size


def random_inputs(unet: nn.Module, T: int, size: int, seed: int = 0) -> dict[str, Tensor]:
    """Noise, a timestep for each image and labels, by the names of `UNet2DModelCustom.forward`."""
    config, generator = unet.config, torch.Generator().manual_seed(seed)
    H, W = image_size(config) or (DEFAULT_PIXELS * 2 ** (len(config.block_out_channels) - 1),) * 2
    inputs = {
        "sample": torch.randn(size, config.in_channels, H, W, generator=generator),
        # Not 0, which a Fourier embedding takes the logarithm of.
        "timestep": _of_type(unet, torch.randint(min(1, T - 1), T, (size,), generator=generator)),
    }
    if config.class_embed_type is not None:
        width = (temb_channels(config),) if config.class_embed_type == "identity" else ()
        inputs["class_labels"] = torch.randn(size, *width, generator=generator)
    elif config.num_class_embeds is not None:
        inputs["class_labels"] = torch.randint(0, config.num_class_embeds, (size,), generator=generator)
    return inputs


def graph_inputs(unet: nn.Module, inputs: dict[str, Tensor], guidance_scale: float = 1.0) -> Inputs:
    """Inputs of the ONNX graph: those of the network, and the guidance scale of a network with a null class."""
    arrays = {name: value.numpy() for name, value in inputs.items()}
    guided = null_class_of(unet) is not None
    return arrays | ({"guidance_scale": np.array(guidance_scale, np.float32)} if guided else {})


def samples_of(pipe: DDPMPipelineCustom, number: int) -> tuple[Tensor, Tensor | None]:
    """Samples of the model, (N, C, H, W) in [-1, 1], and their labels: the classes in turn."""
    sampler, steps = recommended_sampler(pipe.scheduler)
    fast = DDPMPipelineCustom(pipe.unet, make_sampler(sampler, pipe.scheduler))
    fast.set_progress_bar_config(disable=True)
    labels, images = cycled_labels(pipe.unet, range(number)), []
    for start in range(0, number, BATCH_SIZE):
        part = slice(start, min(start + BATCH_SIZE, number))
        options = {"seed": 0, "first_index": start, "class_labels": None if labels is None else labels[part]}
        images.append(fast(part.stop - start, None, steps, "pt", **options).images)
    return torch.cat(images) * 2 - 1, None if labels is None else torch.tensor(labels)


def noised_images(pipe: DDPMPipelineCustom, x_0: Tensor, labels: Tensor | None) -> list[Inputs]:
    """Batches of x_t of images x_0, (N, C, H, W) in [-1, 1]. Each image has a timestep of its own; the timesteps are spread
    evenly over the chain."""
    diffusion, generator = as_ddpm(pipe.scheduler).diffusion, torch.Generator().manual_seed(0)
    N, T = len(x_0), len(diffusion)
    t = ((torch.arange(N) + 0.5) * T / N).long()[torch.randperm(N, generator=generator)]
    inputs = {
        "sample": diffusion.q_sample(x_0.float(), t, torch.randn(x_0.shape, generator=generator)),
        "timestep": _of_type(pipe.unet, t),
    }
    if labels is not None:
        inputs["class_labels"] = labels
    parts = [slice(start, start + BATCH_SIZE) for start in range(0, N, BATCH_SIZE)]
    return [graph_inputs(pipe.unet, {name: value[p] for name, value in inputs.items()}) for p in parts]


def _of_type(unet: nn.Module, t: Tensor) -> Tensor:
    """Timesteps of the type that the graph takes: a table of them needs integers."""
    return t if unet.config.time_embedding_type == "learned" else t.float()
