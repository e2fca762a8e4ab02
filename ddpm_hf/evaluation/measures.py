"""The images, samples and features that a model is measured on.

The work is spread over the processes that `accelerate` or `torchrun` started, and every process gets the full result.
`run` is the content of the model's config.yaml, {} for a model without one.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.data.finding import NoSuchSplit, open_dataset
from ddpm_hf.data.images import Images, leave_out_broken
from ddpm_hf.evaluation.encoding import quantize
from ddpm_hf.evaluation.features import Backbone, dataset_revision
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.files import atomic_file
from ddpm_hf.models.builders import image_size, temb_channels
from ddpm_hf.pipelines.denoising import NonFiniteSamples
from ddpm_hf.pipelines.guidance import count_classes
from ddpm_hf.seeds import make_generator

logger = logging.getLogger(__name__)


def process_share(total: int) -> range:
    """The indices 0..total−1 that this process works on. Shares are contiguous, so that `gather_rows` keeps the order."""
    state = PartialState()
    start, stop = (total * rank // state.num_processes for rank in (state.process_index, state.process_index + 1))
    return range(start, stop)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes' shares, on the CPU of each process."""
    return torch.cat(gather_object([rows.cpu()]))


# ---------------------------------------------------------------------- images


def model_images(
    dataset: datasets.Dataset, unet_config: Mapping, run: dict, image_column: str | None, label_column: str | None
) -> Images:
    """The images of a data set at the model's size, resized as in training, with the labels of a class-conditional model.
    Broken images are left out if the run left them out (its `skip_broken_images`).

    Raises ValueError if the model is class-conditional and neither `label_column` nor the run names the labels, and for
    labels that do not fit the model.
    """
    labels, embed_type = None, unet_config.get("class_embed_type")
    if unet_config["num_class_embeds"] is not None or embed_type is not None:
        labels = label_column or run.get("label_column")
        if labels is None:
            raise ValueError("the model is class-conditional: label_column must say which column holds the labels.")
    elif label_column is not None:
        raise ValueError(f"label_column must be left out for an unconditional model, got {label_column!r}.")
    crop, background = run.get("crop", "center"), run.get("background", "white")
    levels = run.get("white_level")
    form = ImageFormat(
        image_size(unet_config), unet_config["in_channels"], crop, background, bits=8, white_level=levels
    )
    images = Images(dataset, form, image_column, labels)
    if run.get("skip_broken_images"):
        leave_out_broken(images, True)
    if embed_type is not None:
        images.check_conditions(temb_channels(unet_config) if embed_type == "identity" else None)
    elif labels is not None:
        images.check_labels(run.get("num_classes") or count_classes(unet_config))
    return images


def open_images(options: Any, unet_config: Mapping, run: dict, split: str) -> Images:
    """`model_images` of a split of the data set that the options of a script name: `dataset`, `dataset_config`,
    `dataset_revision`, `image_column` and `label_column`."""
    labels, has_classes = options.label_column or run.get("label_column"), unet_config.get("class_embed_type") is None
    source = (options.dataset, options.dataset_config, split, options.dataset_revision)
    dataset = open_dataset(*source, label_column=labels, has_classes=has_classes)
    return model_images(dataset, unet_config, run, options.image_column, options.label_column)


def split_as_trained(images: Images, run: dict) -> Images | None:
    """Remove from training images those that the run validated on (its `validation_fraction`), and return them; None for
    a run without that."""
    if not (fraction := run.get("validation_fraction")):
        return None
    leave_out_broken(images, False)
    return images.split_validation(fraction)


def real_images(
    open_split: Callable[[str], Images], run: dict, split: str, validation_split: str | None = None
) -> tuple[Images, Images | None, str | None]:
    """Training images, validation images, and a description of the latter: the validation split ("test" for None), or the
    part of `split` that the run validated on. None and None if there is neither.

    Raises ValueError for a named validation split that does not exist, unless the run validated on a part.
    """
    training = open_split(split)
    validation = split_as_trained(training, run)
    try:
        return training, open_split(validation_split or "test"), validation_split or "test"
    except NoSuchSplit as error:
        if validation is not None:
            return training, validation, f"{run['validation_fraction']:g} of {split} by hash"
        if validation_split is not None:
            raise ValueError(f"{error} Nor did the run hold images out (validation_fraction).") from error
        return training, None, None


def resizing(images: Images) -> str:
    """How images were resized, for protocols."""
    how = "cover, center crop" if images.format.crop == "center" else f"fit, padded with {images.format.background}"
    return f"Pillow LANCZOS to {how}"


def random_indices(images: Images, seed: int, purpose: str) -> list[int]:
    return torch.randperm(len(images), generator=make_generator("cpu", seed, purpose, 0)).tolist()


# ---------------------------------------------------------------------- samples and features


def draw_conditions(pipe: DDPMPipelineCustom, images: Images, count: int, seed: int) -> torch.Tensor | None:
    """Labels of `count` samples that follow those of the images; None for an unconditional model.

    Classes: each has its share of the images, to less than one sample, in random order. Conditions of a model with
    `class_embed_type`: those of `count` random images, or of all if there are fewer.
    """
    if pipe.unet.config.class_embed_type is not None:
        return images.subset(random_indices(images, seed, "conditions")[:count]).first_labels(count)
    if pipe.unet.config.num_class_embeds is None:
        return None
    labels = images.first_labels(len(images)).sort().values
    # Evenly spaced in the sorted labels: random draws would add the noise of their counts to distances.
    chosen = labels[((torch.arange(count, dtype=torch.float64) + 0.5) * len(labels) / count).long()]
    return chosen[torch.randperm(count, generator=make_generator("cpu", seed, "conditions", 0))]


def describe_conditions(pipe: DDPMPipelineCustom, split: str | None) -> str | None:
    """What `draw_conditions` does with the images of a split, for protocols; None for no split."""
    if pipe.unet.config.class_embed_type is not None:
        return f"drawn from the {split} split"
    if pipe.unet.config.num_class_embeds is None:
        return None
    return "classes in turn" if split is None else f"classes by their shares of the {split} split"


def default_num_samples(dim: int | None) -> int:
    """A number of samples that gives the covariance of `dim` features full rank; None for no features."""
    return 500 if dim is None or dim <= 400 else 5000


def make_samples(
    pipe: DDPMPipelineCustom,
    num_samples: int,
    steps: int,
    seed: int,
    batch_size: int,
    conditions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Samples of the model, uint8 (N, C, H, W), rounded as in a PNG file. `conditions`: see `sample_images`. Raises
    NonFiniteSamples on every process for samples with NaN or infinite values."""
    images, problem = None, None
    try:
        images = sample_images(pipe, process_share(num_samples), steps, seed, batch_size, conditions)
    except NonFiniteSamples as error:
        problem = str(error)
    # All processes raise: one that ended alone would leave the others waiting.
    if problems := [p for p in gather_object([problem]) if p is not None]:
        raise NonFiniteSamples(problems[0])
    return gather_rows(torch.from_numpy(quantize(images, 8)).permute(0, 3, 1, 2).contiguous())


def features_of(
    backbone: Backbone | Callable[[torch.Tensor], torch.Tensor],
    images_at: Callable[[range], torch.Tensor],
    total: int,
    batch_size: int,
) -> torch.Tensor:
    """Features (total, d), or whatever `backbone` returns for each image, of the uint8 images that `images_at` returns for a
    range of indices."""
    share = process_share(total)
    batches = (share[i : i + batch_size] for i in range(0, len(share), batch_size))
    return gather_rows(torch.cat([backbone(images_at(indices)) for indices in batches]))


def recognized_share(
    backbone: Backbone, images_at: Callable[[range], torch.Tensor], labels: torch.Tensor, batch_size: int
) -> float:
    """The share of images that a classifier takes for their class, of `labels` (N,). `images_at` returns uint8 images for a
    range of indices."""
    answers = features_of(backbone.classify, images_at, len(labels), batch_size)
    return (answers == labels.cpu()).double().mean().item()


def real_features(
    backbone: Backbone, images: Images, source: dict, batch_size: int, cache_dir: str | None = None
) -> torch.Tensor:
    """Features (N, d) of real images, from the cache if they are in it.

    Args:
        source: "dataset", "dataset_config" and "split" of the images. They are part of the cache's key, whose hash is the
            name of the file and whose text is in the file's metadata.
        cache_dir: None for ddpm_hf/features in HF_HOME.
    """
    key = {
        **source,
        "dataset_revision": dataset_revision(images.dataset),
        "dataset_resize": resizing(images),
        "resolution": list(images.size),
        "channels": images.channels,
        **backbone.protocol,
    }
    text, is_main = json.dumps(key, sort_keys=True), PartialState().is_main_process
    folder = Path(cache_dir or Path(HF_HOME) / "ddpm_hf" / "features")
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    # The main process decides for all: a process that found no file would wait forever for the others' features.
    (features,) = broadcast_object_list([_read_features(file) if is_main and file.is_file() else None])
    if features is None:
        features = features_of(backbone, lambda i: images[i]["images"], len(images), batch_size)
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            atomic_file(file, save({"features": features.contiguous()}, metadata={"key": text}))
    return features


def _read_features(file: Path) -> torch.Tensor | None:
    """The features in a file of the cache; None for a damaged file, whose features are computed again."""
    try:
        return load_file(file)["features"]
    except (SafetensorError, KeyError, OSError) as error:
        logger.warning("The features in %s are computed again, because the file cannot be read: %s", file, error)
        return None
