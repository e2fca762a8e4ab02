"""A classifier of labelled images, whose features and answers measure samples: `python -m benchmarks.classifier`

    python -m benchmarks.classifier --dataset path/to/mnist --output_dir outputs/classifiers/mnist
    python training/evaluate.py --model outputs/mnist --dataset path/to/mnist --features outputs/classifiers/mnist
    python -m benchmarks.classifier --classifier outputs/classifiers/mnist --samples seed0-10000.npz
    python -m benchmarks.classifier --dataset path/to/mnist --samples seed0-10000.npz

The first command trains on the training split, prints the accuracy on the test split, and saves a model of transformers,
which the second one takes for `--features`. The third prints the share of samples, from `sample.py --format npz`, that the
classifier takes for the class asked for. The fourth trains on samples alone and tests on real images: the classification
accuracy score (Ravuri and Vinyals 2019).
"""

import sys
from dataclasses import dataclass

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ConvNextImageProcessor, RegNetConfig, RegNetForImageClassification
from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf.data.columns import find_column
from ddpm_hf.data.decoding import ImageFormat, to_signed
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images
from ddpm_hf.training.progress import progress_bar

BATCH, PEAK_RATE, WEIGHT_DECAY = 128, 3e-3, 0.05
SHIFT = 1 / 14  # of an image's side, at most: two pixels of 28 or 32


@dataclass
class ClassifierArguments:
    dataset: str | None = HfArg(default=None, help="data with a column of labels and the splits train and test")
    label_column: str = HfArg(default="label", help="column of labels")
    samples: str | None = HfArg(default=None, help=".npz file of images and labels, as sample.py writes it")
    classifier: str | None = HfArg(default=None, help="folder of a classifier that judges the samples")
    output_dir: str | None = HfArg(default=None, help="folder to write the classifier to")
    images_seen: int = HfArg(default=180_000, help="length of the training")
    width: int = HfArg(default=32, help="channels of the first level; the features are four times as many")
    random_flip: bool = HfArg(default=False, help="mirror images, which digits do not bear")
    seed: int = HfArg(default=0, help="seed of weights and batches")

    def __post_init__(self):
        if (self.classifier is None) == (self.dataset is None) or (self.dataset is None and self.samples is None):
            raise ValueError(
                "give a dataset to train and test a classifier, or a classifier and samples to judge them."
            )


def read_split(args: ClassifierArguments, split: str, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), uint8, and labels (N,) of a split, of the size of its first image."""
    data = open_dataset(args.dataset, None, split, label_column=args.label_column)
    if size is None:
        size = data[0][find_column(data, datasets.Image, None, "image_column")].size[::-1]
    images = Images(data, ImageFormat(size, 3, bits=8), label_column=args.label_column)
    batch = images[range(len(images))]
    return batch["images"], batch["labels"]


def read_npz(file: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W), uint8, and labels (N,) of samples."""
    with np.load(file, allow_pickle=False) as arrays:
        if "arr_1" not in arrays.files or arrays["arr_0"].dtype != np.uint8:
            raise ValueError(f"{file} must hold images of 8 bits and labels: those of a class-conditional model.")
        images, labels = torch.from_numpy(arrays["arr_0"]), torch.from_numpy(arrays["arr_1"])
    return images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous(), labels.long()


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def build(num_labels: int, width: int) -> RegNetForImageClassification:
    sizes = {"embedding_size": width, "hidden_sizes": [width, 2 * width, 4 * width], "depths": [1, 2, 2]}
    config = RegNetConfig(**sizes, groups_width=width, layer_type="x", downsample_in_first_stage=False)
    config.num_labels = num_labels
    return RegNetForImageClassification(config)


def augmented(images: Tensor, random: torch.Generator, flip: bool) -> Tensor:
    """Images shifted by up to SHIFT, and mirrored with probability 1/2 if `flip`."""
    n, (height, width), device = len(images), images.shape[2:], images.device
    shift = int(SHIFT * min(height, width))
    padded = F.pad(to_signed(images), [shift] * 4, mode="replicate")
    top, left = torch.randint(2 * shift + 1, (2, n), generator=random)
    rows, columns = top[:, None] + torch.arange(height), left[:, None] + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=random) < 0.5, columns.flip(1), columns)
    index, rows, columns = torch.arange(n, device=device)[:, None, None], rows.to(device), columns.to(device)
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(images: Tensor, labels: Tensor, args: ClassifierArguments) -> RegNetForImageClassification:
    """A classifier of images (N, 3, H, W), uint8, with labels (N,)."""
    torch.manual_seed(args.seed)
    random, device = torch.Generator().manual_seed(args.seed), default_device()
    model = build(int(labels.max()) + 1, args.width).to(device, memory_format=torch.channels_last).train()
    images, labels = images.to(device), labels.to(device)
    steps = args.images_seen // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, steps)
    with progress_bar("Classifier", steps * BATCH, "images") as bar:
        for _ in range(steps):
            chosen = torch.randint(len(images), (BATCH,), generator=random).to(device)
            x = augmented(images[chosen], random, args.random_flip).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x).logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update(BATCH)
    return model.eval()


@torch.no_grad()
def accuracy(model: RegNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    """The share of images that the classifier takes for their label."""
    answers = [model(to_signed(part.to(model.device))).logits.argmax(1).cpu() for part in images.split(500)]
    return (torch.cat(answers) == labels).float().mean().item()


def main(arguments: list[str] | None = None) -> float:
    """Prints and returns the accuracy."""
    parser = HfArgumentParser(ClassifierArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        samples = None if args.samples is None else read_npz(args.samples)
    except (ValueError, OSError) as error:
        sys.exit(f"classifier.py: error: {error}")
    if args.classifier is not None:
        model = RegNetForImageClassification.from_pretrained(args.classifier).eval().to(default_device())
        share = accuracy(model, *samples)
        print(f"{share:.2%} of {len(samples[0]):,} samples are taken for the class asked for")
        return share
    test_images, test_labels = read_split(args, "test")
    images, labels = samples or read_split(args, "train", tuple(test_images.shape[2:]))
    model = train(images, labels, args)
    share = accuracy(model, test_images, test_labels)
    trained = f"{len(images):,} {'real images' if samples is None else 'samples'}"
    print(f"{share:.2%} of {len(test_images):,} real test images are recognized, after training on {trained}")
    if args.output_dir is not None:
        model.save_pretrained(args.output_dir)
        half = [0.5] * 3
        ConvNextImageProcessor(do_resize=False, image_mean=half, image_std=half).save_pretrained(args.output_dir)
    return share


if __name__ == "__main__":
    main(sys.argv[1:])
