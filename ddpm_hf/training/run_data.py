"""The training and validation images of a run. All of them, except those of a stream, are checked before the first step."""

from dataclasses import replace

import torch

from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images, leave_out_broken
from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.training.config import TrainingConfig

PREVIEWS = 100  # conditions of samples.png
RunImages = tuple[Images | StreamedImages, Images | None]


def load_images(config: TrainingConfig, device: torch.device | str = "cpu") -> RunImages:
    """The images of `open_images`, decoded into the memory of `device` if they fit in `memory_limit_bytes`."""
    images, validation = open_images(config)
    for part in (images, validation):
        if isinstance(part, Images) and part.num_bytes <= config.memory_limit_bytes:
            part.keep_in_memory(device)
    return images, validation


def open_images(config: TrainingConfig) -> RunImages:
    """The training images and, with a `validation_fraction`, the validation images.

    Raises ValueError that names the broken images, unless `skip_broken_images` leaves them out.
    """
    images = open_split(config, config.split, config.streaming)
    if isinstance(images, Images):
        leave_out_broken(images, config.skip_broken_images)
    check_labels(images, config)
    fraction = config.validation_fraction
    return images, images.split_validation(fraction) if fraction else None


def open_split(config: TrainingConfig, split: str, streaming: bool = False) -> Images | StreamedImages:
    """The images of a split, not checked yet. Raises NoSuchSplit if there is no such split."""
    labels = (config.label_column, config.class_embed_type is None)
    dataset = open_dataset(config.dataset, config.dataset_config, split, config.dataset_revision, streaming, *labels)
    form = ImageFormat(
        config.resolution, config.channels, config.crop, config.background, white_level=config.white_level
    )
    source = (dataset, form, config.image_column, config.label_column)
    if streaming:
        return StreamedImages(*source, config.shuffle_buffer, config.stream_lanes, config.skip_broken_images)
    return Images(*source, num_workers=config.num_workers)


def preview_conditions(images: Images | StreamedImages, config: TrainingConfig) -> torch.Tensor | None:
    """The conditions of a run's sample pictures: those of the first images. None without `class_embed_type`."""
    return None if config.class_embed_type is None else images.first_labels(PREVIEWS)


def check_labels(images: Images | StreamedImages, config: TrainingConfig) -> None:
    """Raise ValueError for labels that are not among the run's classes, or not conditions of its `class_embed_type`."""
    if config.class_embed_type is not None:
        images.check_conditions(config.condition_width)
    elif config.label_column is not None:
        images.check_labels(with_num_classes(config, images).num_classes)


def with_num_classes(config: TrainingConfig, images: Images | StreamedImages | None) -> TrainingConfig:
    """The configuration with the number of classes in the data, if a run on classes does not give it. None for images that
    are not read yet: any number."""
    has_classes = config.label_column is not None and config.class_embed_type is None
    if not has_classes or config.num_classes is not None:
        return config
    return replace(config, num_classes=1 if images is None else images.count_classes())
