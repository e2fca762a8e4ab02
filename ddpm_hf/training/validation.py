"""Validation: the images that a run is not trained on, and the loss on them."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator

from ddpm_hf import GaussianDiffusion
from ddpm_hf.data.decoding import to_signed
from ddpm_hf.data.finding import NoSuchSplit
from ddpm_hf.data.images import Images, leave_out_broken
from ddpm_hf.diffusion.losses import Loss, Objective
from ddpm_hf.seeds import make_generator
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.run_data import check_labels, open_split
from ddpm_hf.training.sharding import reshard

logger = logging.getLogger("train")
L_SIMPLE = Objective()
BLOCK = 64  # images whose noise is drawn together


def load_validation_images(
    config: TrainingConfig, validation: Images | None = None, device: torch.device | str = "cpu"
) -> Images | None:
    """At most `validation_images` images, chosen by the seed, in the memory of `device`.

    They are from `validation` (see `load_images`), or else from the validation split. None if there are none, or if
    `validate_every_steps` is 0.

    Raises ValueError for an unknown `validation_split`, and for images that cannot be read.
    """
    if not config.validate_every_steps:
        return None
    images = validation if validation is not None else _validation_split(config)
    if images is None:
        return None
    order = torch.randperm(len(images), generator=make_generator("cpu", config.seed, "validation images", 0))
    images = images.subset(order[: config.validation_images].tolist())
    if validation is None:
        leave_out_broken(images, config.skip_broken_images, "validation images")
    images.keep_in_memory(device)
    return images


def count_validation_images(config: TrainingConfig, validation: Images | None = None) -> int:
    """The number of images that the run was not trained on: `validation` (see `load_images`), or those of the validation
    split, also if the run measured no validation loss. 0 if there are none, and for a split that cannot be opened: a
    finished run does not fail over it."""
    if validation is None:
        try:
            validation = _validation_split(config)
        except (ValueError, OSError) as error:
            logger.warning("The validation images are not counted: %s", error)
    return 0 if validation is None else len(validation)


def _validation_split(config: TrainingConfig) -> Images | None:
    # A split is downloaded as a whole. For a stream, that is done only if a split is named.
    if config.validation_split is None and config.streaming:
        return None
    try:
        images = open_split(config, config.validation_split or "test")
    except NoSuchSplit:
        if config.validation_split is not None:
            raise
        return None
    check_labels(images, config)
    return images


class ValidationLoss:
    """L_simple (DDPM, eq. 14) of validation images at fixed timesteps and noise, so that two values differ by the weights
    alone.

    Image i of N gets t = ⌊(i + ½)T/N⌋ and noise that depends on (seed, i) alone. A class-conditional network gets the
    labels. The processes share the images.

    Args:
        images: the validation images.
        diffusion: the chain that the network is trained on.
        seed: of the noise.
        accelerator: the processes and their device.
        images_at_a_time: images that a process computes together, at most.
        loss_function: called as `Objective` is; its `simple` is the loss.
    """

    def __init__(
        self,
        images: Images,
        diffusion: GaussianDiffusion,
        seed: int,
        accelerator: Accelerator,
        images_at_a_time: int,
        loss_function: Callable[..., Loss] = L_SIMPLE,
    ):
        self.loss_function = loss_function
        self.images, self.diffusion, self.seed, self.accelerator = images, diffusion, seed, accelerator
        self.images_at_a_time = images_at_a_time
        self.timesteps = ((torch.arange(len(images), dtype=torch.float64) + 0.5) / len(images) * len(diffusion)).long()

    @torch.no_grad()
    def __call__(self, unet: torch.nn.Module) -> float:
        """The mean loss of a network, in eval mode, on every process. Every process has to call it."""
        device, was_training = self.accelerator.device, unet.training
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        sums = torch.zeros(2, device=device)
        unet.eval()
        for start in range(0, len(self.images), BLOCK):
            block = range(start, min(start + BLOCK, len(self.images)))
            generator = make_generator(device, self.seed, "validation", start)
            shape = (len(block), self.images.channels, *self.images.size)
            noise = torch.randn(shape, generator=generator, device=device)
            together = self.images_at_a_time * world
            for positions in (block[i : i + together] for i in range(0, len(block), together)):
                # A process without an image computes one that is not counted: with FSDP, all must make the same calls.
                mine = positions[rank::world] or positions[:1]
                counts = float(rank < len(positions))
                batch = {name: values.to(device) for name, values in self.images[list(mine)].items()}
                x_0, t = to_signed(batch["images"]), self.timesteps[list(mine)].to(device)
                own_noise = noise[[i - start for i in mine]]
                losses = self.loss_function(unet, self.diffusion, x_0, t, own_noise, batch.get("labels")).simple
                sums += counts * torch.stack([losses.sum(), torch.full_like(losses[0], len(mine))])
        unet.train(was_training)
        reshard(unet)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        return total / count
