"""What evaluate.py and ema.py measure a model by: its images, the bound, samples and features, each process a share.

`args` are evaluate.py's `EvaluateArguments`; `run` is what config.yaml says of the run, {} where there is none.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub.constants import HF_HOME
from PIL import Image

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.data.decoding import ImageFormat, to_signed
from ddpm_hf.data.finding import NoSuchSplit, dataset_files, open_dataset
from ddpm_hf.data.images import Images, leave_out_broken
from ddpm_hf.diffusion.analytic import estimate_analytic_moments
from ddpm_hf.diffusion.likelihood import BoundSums, VariationalBound
from ddpm_hf.evaluation.features import compute_features, dataset_revision, read_cached, write_cached
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.seeds import make_generator


class Shares:
    """Work shared out among processes: each takes every n-th index, and the rows come back in order."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.rank, self.world = accelerator, accelerator.process_index, accelerator.num_processes

    def mine(self, total: int) -> list[int]:
        return list(range(self.rank, total, self.world))

    def gather(self, rows: torch.Tensor, total: int) -> torch.Tensor:
        """The rows (n, …) that the processes computed for `mine(total)`, as (total, …) on the CPU of each."""
        if self.world == 1:
            return rows.cpu()
        padded = rows.new_zeros(-(-total // self.world), *rows.shape[1:])
        padded[: len(rows)] = rows
        gathered = self.accelerator.gather(padded.to(self.accelerator.device)).cpu()
        return gathered.unflatten(0, (self.world, -1)).transpose(0, 1).flatten(0, 1)[:total]

    def add(self, values: torch.Tensor) -> torch.Tensor:
        if self.world == 1:
            return values
        return self.accelerator.reduce(values.to(self.accelerator.device), "sum").cpu()


def split_images(args, run: dict, config: Mapping, split: str) -> Images:
    """The images of a split, brought to the size of a network of this `config` as in the run of `config.yaml`, with the labels
    that a class-conditional one is told. Raises ValueError where it is not known which they are."""
    labels = None
    if config["num_class_embeds"] is not None:
        labels = args.label_column or run.get("label_column")
        if labels is None:
            raise ValueError("the model is class-conditional: label_column must say which column holds the classes.")
    size = config["sample_size"]
    size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
    crop, background = run.get("crop", "center"), run.get("background", "white")
    form = ImageFormat(size, config["in_channels"], crop, background, bits=8)
    dataset = open_dataset(args.dataset, args.dataset_config, split, args.dataset_revision)
    images = Images(dataset, form, args.image_column, labels)
    if labels is not None:
        images.check_labels(run.get("num_classes") or config["num_class_embeds"])
    return images


def training_images(args, run: dict, config: Mapping) -> tuple[Images, Images | None]:
    """Training images, and those of the same split that the run held out by `validation_fraction`."""
    training, fraction = split_images(args, run, config, args.split), run.get("validation_fraction", 0.0)
    if not fraction:
        return training, None
    leave_out_broken(training, run.get("skip_broken_images", False))
    return training, training.split_validation(fraction)


def real_images(args, run: dict, config: Mapping) -> tuple[Images, Images, str]:
    """Training images, held-out ones, and where these are from: those of the validation split, or what the run held out."""
    training, validation = training_images(args, run, config)
    try:
        return training, split_images(args, run, config, args.validation_split), args.validation_split
    except NoSuchSplit as error:
        if validation is None:
            raise ValueError(f"{error} Nor did the run hold images out (validation_fraction).") from error
        return training, validation, f"{run['validation_fraction']:g} of {args.split} by hash"


def choose_variance(pipe: DDPMPipelineCustom, variance_type: str | None, images: Images, args, device) -> None:
    """Give the pipeline a scheduler of another variance; the analytic one's moments are of training images."""
    if variance_type is None or variance_type == pipe.scheduler.config.variance_type:
        return
    changes = {"variance_type": variance_type, "analytic_moments": None}
    if variance_type == "analytic":
        order = torch.randperm(len(images), generator=make_generator("cpu", args.seed, "moments", 0)).tolist()
        batch = {name: values.to(device) for name, values in images[order[: args.analytic_images]].items()}
        model = partial(predict, pipe, labels=batch.get("labels"))
        generator = make_generator(device, args.seed, "moments", 1)
        diffusion = pipe.scheduler.diffusion
        x_0 = to_signed(batch["images"])
        changes["analytic_moments"] = estimate_analytic_moments(diffusion, model, [x_0], generator).tolist()
    pipe.scheduler = DDPMSchedulerCustom.from_config(pipe.scheduler.config, **changes)


def predict(pipe: DDPMPipelineCustom, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None):
    return pipe.unet(x_t, t, labels).sample


def measure_bound(pipe, diffusion, images: Images, stride: int, purpose: str, args, shares: Shares) -> VariationalBound:
    """The bound of some images of a split on one chain, over all processes."""
    config, device = pipe.scheduler.config, shares.accelerator.device
    if config.thresholding:
        raise ValueError("thresholding=True has no bound: what it does to a pixel depends on all others.")
    edge = config.clip_sample_range
    clip = (lambda x_0: x_0.clamp(-edge, edge)) if config.clip_sample else None
    order = torch.randperm(len(images), generator=make_generator("cpu", args.seed, purpose, 0)).tolist()
    chosen = order[: args.bound_images]
    sums, mine = BoundSums(len(diffusion), stride), shares.mine(len(chosen))
    for start in range(0, len(mine), args.batch_size):
        positions = mine[start : start + args.batch_size]
        batch = {name: values.to(device) for name, values in images[[chosen[p] for p in positions]].items()}
        x_0 = to_signed(batch["images"])
        generators = [make_generator("cpu", args.seed, purpose, 1 + p) for p in positions]
        offsets = torch.tensor(positions) % stride
        sums.add(diffusion, partial(predict, pipe), x_0, generators, offsets, clip, batch.get("labels"))
    sums.values.copy_(shares.add(sums.values))
    return sums.result(diffusion)


def make_samples(pipe, args, shares: Shares) -> torch.Tensor:
    """The model's, uint8 (N, C, H, W), rounded as a PNG would be."""
    images = sample_images(pipe, shares.mine(args.num_samples), args.steps, args.seed, args.batch_size)
    rows = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
    return shares.gather(rows.contiguous(), args.num_samples)


def read_samples(args, size: tuple[int, int], channels: int) -> torch.Tensor:
    """The first `num_samples` images of a folder by name, uint8 (N, C, H, W)."""
    files = dataset_files(args.samples)
    if len(files) < args.num_samples:
        raise ValueError(f"--samples {args.samples!r} holds {len(files)} images, num_samples is {args.num_samples}.")
    mode, rows = {1: "L", 3: "RGB", 4: "RGBA"}[channels], []
    for file in files[: args.num_samples]:
        with Image.open(file) as image:
            if image.size != size[::-1]:
                raise ValueError(f"samples must have the model's resolution {size}: {file} is {image.size[::-1]}.")
            rows.append(np.asarray(image.convert(mode)).reshape(*size, channels))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def features_of(backbone, batches_of, total: int, args, shares: Shares) -> torch.Tensor:
    """(total, d) features; `batches_of(indices)` gives uint8 images."""
    mine = shares.mine(total)
    parts = (batches_of(mine[i : i + args.batch_size]) for i in range(0, len(mine), args.batch_size))
    return shares.gather(compute_features(backbone, parts), total)


def resizing(images: Images) -> str:
    """How images came to their size, as protocols say it."""
    how = "cover, center crop" if images.format.crop == "center" else f"fit, padded with {images.format.background}"
    return f"Pillow LANCZOS to {how}"


def real_features(backbone, images: Images, split: str, args, shares: Shares) -> torch.Tensor:
    key = {
        "dataset": args.dataset,
        "dataset_config": args.dataset_config,
        "dataset_revision": dataset_revision(images.dataset),
        "split": split,
        "resolution": list(images.size),
        "channels": images.channels,
        "resize": resizing(images),
        **backbone.protocol,
        "backbone_resize": backbone.protocol["resize"],
    }
    folder, main = Path(args.cache_dir or Path(HF_HOME) / "ddpm_hf" / "features"), shares.accelerator.is_main_process
    # What the main process finds decides for all: a process that computed alone would wait for the others for ever.
    found = [read_cached(folder, key) if main else None]
    if shares.world > 1:
        broadcast_object_list(found)
    if found[0] is None:
        found[0] = features_of(backbone, lambda i: images[i]["images"], len(images), args, shares)
        if main:
            write_cached(folder, key, found[0])
    return found[0]
