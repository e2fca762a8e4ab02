"""Sample images from a trained model: `accelerate launch training/sample.py --model outputs/digits --num_images 64`.

Writes one PNG per image, named by its index, or one .npz or .parquet file. The work is spread over the processes that
`accelerate launch` starts. Image i of a seed is the same whatever their number, and a run that was stopped goes on
where it ended when the same command is given again; so does one with a larger `--num_images`.
"""

import io
import json
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from accelerate import PartialState
from tqdm import tqdm
from transformers import HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.plots import PNG_COLOUR_TYPES, png_bytes, quantized
from ddpm_hf.files import atomic_file
from ddpm_hf.pipelines.guidance import cycled_classes
from ddpm_hf.schedulers.samplers import SAMPLERS, make_sampler
from ddpm_hf.seeds import check_seed, image_generators

FORMATS = ("png", "npz", "parquet")


@dataclass
class SampleArguments:
    model: str = field(metadata={"help": "a folder, or a repository on the Hub"})
    num_images: int = 64
    scheduler: str | None = field(default=None, metadata={"help": f"{', '.join(SAMPLERS)}; None: the saved one"})
    steps: int | None = field(default=None, metadata={"help": "sampling steps; None: the model's own T"})
    seed: int = 0
    class_label: int | None = field(
        default=None, metadata={"help": "of a class-conditional model; None: image i gets class i modulo their number"}
    )
    guidance_scale: float = field(default=1.0, metadata={"help": "of classifier-free guidance; 1: none"})
    format: str = field(default="png", metadata={"help": f"{', '.join(FORMATS)}"})
    bits: int = field(default=8, metadata={"help": "8 or 16 per channel"})
    batch_size: int = field(default=250, metadata={"help": "images made at once by a process"})
    output_dir: str | None = field(default=None, metadata={"help": "where to write; None: samples/ under the model"})
    device: str | None = field(default=None, metadata={"help": "None: a GPU for each process if there are any"})


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(SampleArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        pipe = prepare(args)
        folder = output_folder(args)
        check_record(folder, args)
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"sample.py: error: {error}")
    state = PartialState(cpu=args.device == "cpu")
    pipe.to(args.device or state.device)
    pipe.set_progress_bar_config(disable=True)

    # Batches are cut from all indices, whoever makes them: the rounding of an image depends on its batch.
    batches = [range(k, min(k + args.batch_size, args.num_images)) for k in range(0, args.num_images, args.batch_size)]
    unfinished = [batch for batch in batches if not all(is_done(folder, args, batch))]
    there = sum(sum(is_done(folder, args, batch)) for batch in batches)
    state.wait_for_everyone()  # before the first file is written: all must see the same ones missing
    if state.is_main_process:
        atomic_file(folder / record_name(args), record(args))
    share = unfinished[state.process_index :: state.num_processes]
    title = "images" if state.num_processes == 1 else f"images, process 1 of {state.num_processes}"
    with tqdm(total=sum(map(len, share)), unit="image", desc=title, disable=not state.is_main_process) as bar:
        for batch in share:
            write_batch(folder, args, batch, make_batch(pipe, args, batch))
            bar.update(len(batch))
    state.wait_for_everyone()
    if state.is_main_process:
        what = gather(folder, args, batches, labels_of(pipe, args, range(args.num_images)))
        print(f"{args.num_images - there} images written to {what} ({there} were there).")


def prepare(args: SampleArguments) -> DDPMPipelineCustom:
    """The pipeline, with everything checked that can be before an image is made."""
    for name, value in (("num_images", args.num_images), ("batch_size", args.batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    check_seed("seed", args.seed)
    if args.format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {args.format!r}.")
    if args.bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {args.bits}.")
    pipe = DDPMPipelineCustom.from_pretrained(args.model)
    if args.scheduler is not None:
        pipe.scheduler = make_sampler(args.scheduler, pipe.scheduler)
    channels = pipe.unet.config.in_channels
    if args.format != "npz" and channels not in PNG_COLOUR_TYPES:
        raise ValueError(f"format={args.format!r} holds 1 to 4 channels, the model has {channels}: use npz.")
    labels = labels_of(pipe, args, range(1))
    pipe.denoise(1, num_inference_steps=args.steps, class_labels=labels, guidance_scale=args.guidance_scale)
    return pipe


def labels_of(pipe: DDPMPipelineCustom, args: SampleArguments, indices: range) -> list[int] | None:
    """The class of each image: it belongs to the image's index, as its noise does."""
    if args.class_label is not None:
        return [args.class_label] * len(indices)
    return cycled_classes(pipe.unet, indices)


def make_batch(pipe: DDPMPipelineCustom, args: SampleArguments, batch: range) -> np.ndarray:
    """The images of these indices, (B, H, W, C) in [0, 1]."""
    options = {"class_labels": labels_of(pipe, args, batch), "guidance_scale": args.guidance_scale}
    return pipe(len(batch), image_generators(args.seed, batch), args.steps, output_type="np", **options).images


# ---------------------------------------------------------------------- files


def output_folder(args: SampleArguments) -> Path:
    default = Path(args.model) / "samples" if Path(args.model).is_dir() else Path("samples")
    folder = Path(args.output_dir) if args.output_dir is not None else default
    (parts_folder(folder, args) if args.format != "png" else folder).mkdir(parents=True, exist_ok=True)
    return folder


def record_name(args: SampleArguments) -> str:
    return f"seed{args.seed}.json"


def record(args: SampleArguments) -> str:
    """The options that images depend on."""
    names = ("model", "scheduler", "steps", "seed", "class_label", "guidance_scale", "bits")
    return json.dumps({name: asdict(args)[name] for name in names}, indent=2) + "\n"


def check_record(folder: Path, args: SampleArguments) -> None:
    """ValueError where the folder holds images of this seed that were made otherwise: they would be mixed."""
    file = folder / record_name(args)
    if file.is_file() and (before := json.loads(file.read_text())) != (now := json.loads(record(args))):
        changed = ", ".join(
            f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]
        )
        raise ValueError(f"{folder} holds images of seed {args.seed} made with {changed}: give another output_dir.")


def png_file(folder: Path, args: SampleArguments, index: int) -> Path:
    return folder / f"seed{args.seed}-{index:06d}.png"


def parts_folder(folder: Path, args: SampleArguments) -> Path:
    return folder / f".seed{args.seed}-{args.format}.parts"


def part_file(folder: Path, args: SampleArguments, batch: range) -> Path:
    return parts_folder(folder, args) / f"{batch.start:06d}-{batch.stop:06d}.npy"


def whole_file(folder: Path, args: SampleArguments) -> Path:
    return folder / f"seed{args.seed}-{args.num_images}.{args.format}"


def is_done(folder: Path, args: SampleArguments, batch: range) -> list[bool]:
    """Whether each image of a batch is written."""
    if args.format == "png":
        return [png_file(folder, args, i).exists() for i in batch]
    return [whole_file(folder, args).exists() or part_file(folder, args, batch).exists()] * len(batch)


def write_batch(folder: Path, args: SampleArguments, batch: range, images: np.ndarray) -> None:
    if args.format == "png":
        for i, image in zip(batch, images):
            if not png_file(folder, args, i).exists():
                atomic_file(png_file(folder, args, i), png_bytes(image, args.bits))
    else:
        stream = io.BytesIO()
        np.save(stream, quantized(images, args.bits))
        atomic_file(part_file(folder, args, batch), stream.getvalue())


def gather(folder: Path, args: SampleArguments, batches: list[range], labels: list[int] | None) -> Path:
    """Put the processes' parts into one file, where one was asked for. Returns where the images are."""
    if args.format == "png":
        return folder
    target = whole_file(folder, args)
    if not target.exists():
        parts = [np.load(part_file(folder, args, batch)) for batch in batches]
        stream = io.BytesIO()
        if args.format == "npz":
            # arr_0 and arr_1 are what evaluation code for diffusion models looks for.
            np.savez(stream, np.concatenate(parts), *([] if labels is None else [np.array(labels)]))
        else:
            write_parquet(stream, parts, args.bits, labels)
        atomic_file(target, stream.getvalue())
    shutil.rmtree(parts_folder(folder, args), ignore_errors=True)
    return target


def write_parquet(stream: io.BytesIO, parts: list[np.ndarray], bits: int, labels: list[int] | None) -> None:
    """A data set with the columns `image` (PNG bytes) and, of a class-conditional model, `label`."""
    import datasets

    pngs = [png_bytes(image / (2**bits - 1), bits) for part in parts for image in part]
    columns = {"image": [{"bytes": png, "path": None} for png in pngs]}
    features = datasets.Features({"image": datasets.Image()})
    if labels is not None:
        columns["label"], features["label"] = labels, datasets.Value("int64")
    datasets.Dataset.from_dict(columns, features=features).to_parquet(stream)


if __name__ == "__main__":
    main()
