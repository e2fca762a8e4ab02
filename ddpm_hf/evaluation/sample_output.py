"""The folder that training/sample.py writes to: its files, and the record of the options that they depend on. Imports no torch."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ddpm_hf.data.arrays import array_file
from ddpm_hf.evaluation.encoding import png_bytes, quantize
from ddpm_hf.evaluation.sample_options import SampleArguments
from ddpm_hf.files import atomic_file

RECORDED = (
    *("model", "variant", "scheduler", "steps", "spacing", "timesteps", "eta", "seed", "class_label", "guidance_scale"),
    *("strength", "bits"),
)


def folder_path(args: SampleArguments) -> Path:
    # Not samples/, where a run writes its previews.
    default = Path(args.model) / "generated" if Path(args.model).is_dir() else Path("generated")
    return Path(args.output_dir) if args.output_dir is not None else default


def read_labels(class_label: str) -> list:
    """The number, or the rows of the .npy file, that `--class_label` gives. Raises ValueError if it is neither."""
    if not class_label.endswith(".npy"):
        try:
            return [float(class_label) if set(class_label) & set(".einEIN") else int(class_label)]
        except ValueError as error:
            raise ValueError(
                f"class_label must be a class of the model, a number or a .npy file, got {class_label!r}."
            ) from error
    try:
        labels = np.load(class_label, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"class_label {class_label!r} cannot be read as an array of numbers: {error}") from error
    if labels.ndim == 0 or not len(labels) or labels.dtype.kind not in "iuf":
        given = f"shape {labels.shape} of {labels.dtype}"
        raise ValueError(f"class_label {class_label!r} must hold at least one row of numbers, got {given}.")
    return labels.tolist()


class SampleFolder:
    """The files of the images of one seed: PNG files, or one .npz or .parquet file that is joined from parts at the end.

    Raises ValueError for a folder that cannot be written to, or that has images of this seed made with other options.
    """

    def __init__(self, args: SampleArguments):
        self.args, self.path = args, folder_path(args)
        self.parts = self.path / f".seed{args.seed}-{args.format}.parts"
        # Without --format png: the file of all images.
        self.output_file = self.path / f"seed{args.seed}-{args.num_images}.{args.format}"
        self.record_file = self.path / f"seed{args.seed}.json"
        try:
            (self.path if args.format == "png" else self.parts).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            accepted, problem = "a folder that can be written to, or a new one", f"{error.filename!r}: {error.strerror}"
            raise ValueError(f"output_dir must be {accepted}, got {problem}.") from error
        self._check_record()

    def png_file(self, index: int) -> Path:
        return self.path / f"seed{self.args.seed}-{index:06d}.png"

    def part_file(self, batch: range) -> Path:
        return self.parts / f"{batch.start:06d}-{batch.stop:06d}.npy"

    # ------------------------------------------------------------------ record

    def record(self) -> str:
        """The options that the images of this seed depend on."""
        args = self.args
        options = {name: asdict(args)[name] for name in RECORDED}
        pictures = {"init_image": args.init_image, "mask": args.mask, "interpolate": args.interpolate}
        for name, files in pictures.items():
            files = [files] if isinstance(files, str) else files
            options[name] = None if files is None else [file_digest(file) for file in files]
        # The place of an image between two others depends on how many there are.
        options["num_images"] = args.num_images if args.interpolate is not None else None
        if args.class_label is not None:
            is_file = args.class_label.endswith(".npy")
            options["class_label"] = file_digest(args.class_label) if is_file else read_labels(args.class_label)[0]
        return json.dumps(options, indent=2) + "\n"

    def _check_record(self) -> None:
        now = json.loads(self.record())
        try:
            before = dict(json.loads(self.record_file.read_text())) if self.record_file.exists() else now
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"output_dir {str(self.path)!r} holds {self.record_file.name}, which is no record of samples: {error}"
            ) from error
        # A record of an earlier version lacks an option that was not there yet, and whose default is None.
        changed = ", ".join(
            f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]
        )
        if changed:
            raise ValueError(
                f"output_dir {str(self.path)!r} has images of seed {self.args.seed} made with other options ({changed}): "
                "give another output_dir."
            )

    # ------------------------------------------------------------------ images

    def is_done(self, batch: range) -> list[bool]:
        """For each image of a batch, whether it is written."""
        if self.args.format == "png":
            return [self.png_file(i).exists() for i in batch]
        return [self.output_file.exists() or self.part_file(batch).exists()] * len(batch)

    def write_record(self) -> None:
        atomic_file(self.record_file, self.record())

    def write(self, batch: range, images: np.ndarray) -> None:
        """Write PNG files, or a part of the output file. `images` are (B, H, W, C) in [0, 1]."""
        images = quantize(images, self.args.bits)
        if self.args.format == "png":
            for file, image in zip(map(self.png_file, batch), images):
                if not file.exists():
                    atomic_file(file, png_bytes(image))
        else:
            atomic_file(self.part_file(batch), array_file(images))

    def join(self, batches: Sequence[range], labels: list | None) -> Path:
        """Join the parts into the output file, unless the format is PNG. Returns where the images are."""
        from ddpm_hf.evaluation.sample_files import npz_file, parquet_file

        if self.args.format == "png":
            return self.path
        if not self.output_file.exists():
            images = np.concatenate([np.load(self.part_file(batch)) for batch in batches])
            write = npz_file if self.args.format == "npz" else parquet_file
            atomic_file(self.output_file, write(images, labels))
        shutil.rmtree(self.parts, ignore_errors=True)
        return self.output_file


def file_digest(path: str) -> str:
    return "sha256 " + hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
