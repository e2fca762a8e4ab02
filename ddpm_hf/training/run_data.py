"""The images of a run: those trained on, and those held out by `validation_fraction`, all looked at before the first step."""

import logging

import torch

from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images, leave_out_broken
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.config import TrainingConfig

logger = logging.getLogger("train")


def load_images(
    config: TrainingConfig, device: torch.device | str = "cpu"
) -> tuple[Images | StreamedImages, Images | None]:
    """What `open_images` gives; a set of at most `memory_limit_bytes` is decoded into the memory of `device`."""
    images, validation = open_images(config)
    for part in (images, validation):
        if isinstance(part, Images) and part.num_bytes <= config.memory_limit_bytes:
            part.keep_in_memory(device)
    return images, validation


def open_images(config: TrainingConfig) -> tuple[Images | StreamedImages, Images | None]:
    """Training images, and validation images where there are any.

    Every image but those of a stream is read once. Raises ValueError that names the broken ones.
    """
    source = open_dataset(
        config.dataset, config.dataset_config, config.split, config.dataset_revision, config.streaming
    )
    form = image_form(config)
    if config.streaming:
        images = StreamedImages(
            source,
            config.resolution,
            **form,
            shuffle_buffer=config.shuffle_buffer,
            num_lanes=config.stream_lanes,
            validation_fraction=config.validation_fraction,
            skip_broken=config.skip_broken_images,
        )
    else:
        images = Images(source, config.resolution, **form)
        leave_out_broken(images, config.skip_broken_images)
    if config.label_column is not None:
        images.check_labels(config.num_classes)
    validation = None
    if config.validation_fraction:
        validation = images.validation() if config.streaming else images.split_validation(config.validation_fraction)
    return images, validation


def image_form(config: TrainingConfig) -> dict:
    """How images become tensors, as `Images` takes it."""
    return {name: getattr(config, name) for name in ("channels", "image_column", "label_column", "crop", "background")}
