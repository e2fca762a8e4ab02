"""The images of a run: those trained on, and those held out by `validation_fraction`, all looked at before the first step."""

import logging

import torch
from training_config import TrainingConfig

from ddpm_hf.data import Images, open_dataset
from ddpm_hf.streaming import StreamedImages

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
        validation = images.held_out() if config.streaming else images.hold_out(config.validation_fraction)
    return images, validation


def image_form(config: TrainingConfig) -> dict:
    """How images become tensors, as `Images` takes it."""
    return {name: getattr(config, name) for name in ("channels", "image_column", "label_column", "crop", "background")}


def leave_out_broken(images: Images, is_allowed: bool, what: str = "images") -> None:
    """Leave out images that cannot be read, if that is allowed and leaves some; ValueError, naming them, otherwise."""
    if shallow := images.read_at_8_bits():
        logger.warning(
            "%d colour images of 16 bits are read at 8, which is what Pillow can do; the first is %s.",
            len(shallow),
            images.describe(shallow[0]),
        )
    if not (broken := images.broken()):
        return
    names = "\n".join(f"  {images.describe(i)}" for i in broken[:20])
    more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
    if not is_allowed or len(broken) == len(images):
        raise ValueError(
            f"{len(broken)} of {len(images)} {what} cannot be read:\n{names}{more}\n"
            "Repair or remove them, or leave them out with --skip_broken_images."
        )
    logger.warning("Leaving out %d %s that cannot be read:\n%s%s", len(broken), what, names, more)
    images.without(broken)
