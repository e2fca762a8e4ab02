"""The loss of images that a run is not trained on: which they are, and the draws at which they are looked at."""

import logging

import torch
from accelerate import Accelerator
from training_config import TrainingConfig

from ddpm_hf import GaussianDiffusion
from ddpm_hf.data import Images, open_dataset, to_signed
from ddpm_hf.losses import denoising_loss
from ddpm_hf.seeds import addressed_generator

logger = logging.getLogger("train")
BLOCK = 64  # images whose noise is drawn together


def held_out_images(config: TrainingConfig) -> Images | None:
    """At most `validation_images` images, drawn once, of the held-out split; None where there is none, or no wish for it.

    Raises ValueError for a `validation_split` that is not there, and for images that cannot be read.
    """
    if not config.validate_every_steps:
        return None
    source = (config.dataset, config.dataset_config)
    try:
        dataset = open_dataset(*source, config.validation_split or "test")
    except ValueError:
        if config.validation_split is not None:
            raise
        return None
    # A data set saved without splits opens as itself, whatever split is asked for.
    if dataset._fingerprint == open_dataset(*source, config.split)._fingerprint:
        if config.validation_split is not None:
            raise ValueError(f"the data set {config.dataset!r} has no splits, so no {config.validation_split!r}.")
        return None
    order = torch.randperm(len(dataset), generator=addressed_generator("cpu", config.seed, "validation images", 0))
    dataset = dataset.select(order[: config.validation_images].tolist())
    images = Images(dataset, config.resolution, config.channels, config.image_column)
    if broken := images.broken():
        names = ", ".join(images.describe(i) for i in broken[:20])
        if not config.skip_broken_images or len(broken) == len(images):
            raise ValueError(f"{len(broken)} held-out images cannot be read: {names}.")
        logger.warning("Leaving out %d held-out images that cannot be read: %s", len(broken), names)
        images.without(broken)
    images.keep_in_memory()
    return images


class HeldOutLoss:
    """L_simple (eq. 14) of held-out images at draws that never change, so that two values differ by the weights alone.

    Image i of N is looked at for t = ⌊(i + ½)T/N⌋, with noise that depends on (seed, i) alone. The processes share the
    images, and all of them get the mean.
    """

    def __init__(self, images: Images, diffusion: GaussianDiffusion, seed: int, accelerator: Accelerator):
        self.images, self.diffusion, self.seed, self.accelerator = images, diffusion, seed, accelerator
        self.timesteps = ((torch.arange(len(images), dtype=torch.float64) + 0.5) / len(images) * len(diffusion)).long()

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module) -> float:
        """The loss of a network, which is in eval mode meanwhile. Every process has to call it."""
        device, was_training = self.accelerator.device, unet.training
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        sums = torch.zeros(2, device=device)
        unet.eval()
        for start in range(0, len(self.images), BLOCK):
            positions = range(start, min(start + BLOCK, len(self.images)))
            generator = addressed_generator(device, self.seed, "validation", start)
            shape = (len(positions), self.images.channels, *self.images.size)
            noise = torch.randn(shape, generator=generator, device=device)
            # Where there are fewer images than processes, the others compute one for nothing: all take the same steps.
            mine = positions[rank::world] or positions[:1]
            counts = float(rank < len(positions))
            x_0 = to_signed(self.images[list(mine)]["images"].to(device))
            t = self.timesteps[list(mine)].to(device)
            losses = denoising_loss(unet, self.diffusion, x_0, t, noise[[i - start for i in mine]])
            sums += counts * torch.stack([losses.sum(), torch.full_like(losses[0], len(mine))])
        unet.train(was_training)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count
