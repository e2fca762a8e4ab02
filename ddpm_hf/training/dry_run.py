"""The speed of a run, from a few steps that take seconds whatever the network is."""

from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.diffusion.gaussian import GaussianDiffusion
from ddpm_hf.diffusion.losses import Loss
from ddpm_hf.diffusion.timestep_samplers import UniformTimesteps
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.run_summary import TIMED_STEPS, settled_time, speed_line
from ddpm_hf.training.step import training_step

SECONDS = 15.0  # after which no further step is begun


def time_training(
    config: TrainingConfig,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    diffusion: GaussianDiffusion,
    sampler: UniformTimesteps,
    batches: MicroBatches,
    first_step: int,
    seconds: float = SECONDS,
    loss_function: Callable[..., Loss] | None = None,
) -> None:
    """Train with one image per process, then with as many as there is time for, up to the run's micro-batch; print
    the speed, unless the run is at its end.

    No step is begun after `seconds`, and none but the first is expected to take longer than a third of them. Weights and
    optimizer state change: they are not to be used afterwards. Every process must call this.
    """
    if first_step == config.total_steps:
        return
    world, device = accelerator.num_processes, accelerator.device
    share = config.images_at_a_time(world)
    (images,) = islice(batches.step(), 1)
    began, size, times = settled_time(device), 1, []
    while True:
        small = replace(config, batch_size=size * world, micro_batch_size=None, stream_lanes=None)
        batch = {name: values[:size] for name, values in images.items()}
        started = settled_time(device)
        training_step(accelerator, model, optimizer, diffusion, small, first_step, [batch], sampler, loss_function)
        ended = settled_time(device)
        times.append(ended - started)
        # The slowest of all processes, since they take the next step together. Its time grows with its images at most.
        left, took = (f(gather_object([value])) for f, value in ((min, seconds - ended + began), (max, times[-1])))
        larger = min(share, max(size, int(size * left / (3 * took))))
        if left <= 0 or (larger == size and len(times) > TIMED_STEPS):
            break
        if larger > size:
            size, times = larger, []
    counted = times[1:] or times  # the first one of a size allocates
    rate = size * world * len(counted) / sum(counted)
    measured = f"{len(counted)} step{'s' * (len(counted) > 1)} of {size * world} image{'s' * (size * world > 1)}"
    left = (config.total_steps - first_step) * config.batch_size
    accelerator.print(speed_line(rate, measured, left, device))
