"""Sample images from a trained model: `python training/sample.py --model outputs/digits --num_images 64`.

Writes one PNG file per image, named by its index, or one .npz or .parquet file. The work is spread over the processes.
Image i of a seed is the same on any number of processes. The same command resumes a run that was stopped, and a larger
`--num_images` adds images.
"""

import hashlib
import io
import json
import shutil
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import ddpm_hf
from ddpm_hf.checks import check_device, check_int
from ddpm_hf.data.arrays import array_file
from ddpm_hf.evaluation.encoding import PNG_CHANNELS, png_bytes, quantize
from ddpm_hf.evaluation.options import SamplerName
from ddpm_hf.files import atomic_file
from ddpm_hf.options import check_options, option
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.processes import fail, prepare_process
from ddpm_hf.training.progress import progress_bar

# Modules that import torch are imported in functions, after the options are parsed, so that --help answers at once.


@dataclass
class SampleArguments:
    model: str = option(MISSING, "folder, or repository on the Hub")
    num_images: int = option(64, "total number of images, including existing ones", "[1, inf)")
    scheduler: SamplerName | None = option(None, "None: the saved one")
    steps: int | None = option(None, "sampling steps; None: the model's T", "[1, inf)")
    timesteps: str | None = option(
        None,
        "timesteps instead of evenly spaced ones: 'best' for those of evaluate.py with the best likelihood in --steps "
        "steps of ddpm; 'ddimN' for N in equal strides from 0, as improved-diffusion names them; or a descending list "
        "such as 900,500,100,0",
    )
    seed: int = option(0, "seed; an image depends on it and on the image's index", "[0, inf)")
    class_label: str | None = option(
        None,
        "of a class-conditional model: a class by name or number, a number for class_embed_type 'timestep', or a .npy "
        "file with one label per row, of which image i gets row i modulo their number; None: the classes in turn",
    )
    guidance_scale: float = option(1.0, "of classifier-free guidance; 1: no guidance", "(-inf, inf)")
    format: Literal["png", "npz", "parquet"] = option(
        "png", "a parquet file holds PNG images, and an array of uint16 for color of 16 bits"
    )
    bits: Literal[8, 16] = option(8, "per channel; color of 16 bits as npz or parquet")
    batch_size: int = option(250, "images per process at a time", "[1, inf)")
    output_dir: str | None = option(None, "folder to write to; None: generated/ in the model's")
    device: str | None = option(None, "None: a GPU for each process if there are any")

    def __post_init__(self):
        check_options(self)


def main(arguments: list[str] | None = None) -> None:
    prepare_process()
    parser = OptionParser(SampleArguments, __doc__.splitlines()[0])
    try:
        args = parser.parse(arguments)
        pipe = prepare(args)
        folder = output_folder(args)
        check_record(folder, args)
    except (ValueError, TypeError, OSError) as error:
        fail("sample.py", error)

    from accelerate import PartialState
    from accelerate.utils import gather_object

    from ddpm_hf.pipelines.denoising import NonFiniteSamples

    state = PartialState(cpu=args.device == "cpu")
    pipe.to(args.device or state.device)
    pipe.set_progress_bar_config(disable=True)

    # Batches do not depend on the number of processes, because the rounding of an image depends on its batch.
    batches = [range(k, min(k + args.batch_size, args.num_images)) for k in range(0, args.num_images, args.batch_size)]
    unfinished = [batch for batch in batches if not all(is_done(folder, args, batch))]
    existing = sum(sum(is_done(folder, args, batch)) for batch in batches)
    state.wait_for_everyone()  # before the first file is written, so that all processes find the same ones missing
    if state.is_main_process:
        atomic_file(folder / record_name(args), record(args))
    share, problem = unfinished[state.process_index :: state.num_processes], None
    title = "Sampling" if state.num_processes == 1 else f"Sampling, process 1 of {state.num_processes}"
    with progress_bar(title, sum(map(len, share)), "images", shown=state.is_main_process) as bar:
        for batch in share:
            try:
                images = make_batch(pipe, args, batch)
            except NonFiniteSamples as error:
                problem = f"in the batch of images {batch.start} to {batch.stop - 1}, {error}"
                break
            write_batch(folder, args, batch, images)
            bar.update(len(batch))
    # Also waits for all parts to be written. A process that ended alone would leave the others waiting, unexplained.
    if problems := [p for p in gather_object([problem]) if p is not None]:
        fail("sample.py", problems[0])
    if state.is_main_process:
        written = gather(folder, args, batches, labels_of(pipe, args, range(args.num_images)))
        print(f"{args.num_images - existing} images written to {written} ({existing} existed).")


def prepare(args: SampleArguments) -> "ddpm_hf.DDPMPipelineCustom":
    """The pipeline, after all checks that can be made before sampling. `args.timesteps` becomes a list in place of `steps`,
    and the name of a class in `args.class_label` its number."""
    from ddpm_hf.pipelines.guidance import class_names_of
    from ddpm_hf.schedulers.samplers import make_sampler

    if args.device is not None:
        check_device("device", args.device, computes=True)
    pipe = ddpm_hf.DDPMPipelineCustom.from_pretrained(args.model)
    if args.scheduler is not None:
        pipe.scheduler = make_sampler(args.scheduler, pipe.scheduler)
    class_names = class_names_of(pipe.unet) or []
    if args.class_label in class_names:
        args.class_label = str(class_names.index(args.class_label))
    channels = pipe.unet.config.in_channels
    if args.format != "npz" and channels not in PNG_CHANNELS:
        raise ValueError(f"format={args.format!r} is for 1 to 4 channels, the model has {channels}: use npz.")
    if args.format == "png" and args.bits == 16 and channels != 1:
        raise ValueError(f"format='png' with bits=16 is for gray images, not {channels} channels: use npz or parquet.")
    if args.timesteps is not None:
        args.timesteps, args.steps = ",".join(map(str, choose_timesteps(args, pipe.scheduler))), None
    pipe.check_inputs(1, None, args.steps, output_type="np", **sampling_options(pipe, args, range(1)))
    return pipe


def choose_timesteps(args: SampleArguments, scheduler) -> list[int]:
    """The timesteps that the option names. Raises ValueError for those that the scheduler or the model does not have."""
    from ddpm_hf import DDPMSchedulerCustom
    from ddpm_hf.diffusion.timesteps import parse_timesteps
    from ddpm_hf.evaluation.best_timesteps import read_best_timesteps

    T = scheduler.config.num_train_timesteps
    if args.timesteps != "best":
        if args.steps is not None:
            raise ValueError(f"steps={args.steps} and a list of timesteps exclude each other: give one of them.")
        return parse_timesteps(args.timesteps, T)
    if not isinstance(scheduler, DDPMSchedulerCustom):
        name = args.scheduler or type(scheduler).__name__
        raise ValueError(f"timesteps='best' is for scheduler='ddpm', got {name!r}.")
    steps = check_int("steps", args.steps, 2, T, note="with timesteps='best'")
    return read_best_timesteps(Path(args.model), steps, scheduler.config.variance_type)


def sampling_options(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, indices: range) -> dict:
    """Arguments of the pipeline's call for the images with these indices, besides their number, noise and `steps`."""
    timesteps = None if args.timesteps is None else [int(t) for t in args.timesteps.split(",")]
    labels = labels_of(pipe, args, indices)
    return {"timesteps": timesteps, "class_labels": labels, "guidance_scale": args.guidance_scale}


def labels_of(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, indices: range) -> list | None:
    """The label of each image, which depends on the image's index alone, as its noise does."""
    from ddpm_hf.pipelines.guidance import cycled_labels

    if args.class_label is None:
        return cycled_labels(pipe.unet, indices)
    labels = read_labels(args.class_label)
    return [labels[i % len(labels)] for i in indices]


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


def make_batch(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, batch: range) -> np.ndarray:
    """The images with these indices, (B, H, W, C) in [0, 1]."""
    from ddpm_hf.evaluation.sampling import sample_images

    return sample_images(pipe, batch, args.steps, args.seed, len(batch), **sampling_options(pipe, args, batch))


# ---------------------------------------------------------------------- files


def output_folder(args: SampleArguments) -> Path:
    # Not samples/, where a run writes its previews.
    default = Path(args.model) / "generated" if Path(args.model).is_dir() else Path("generated")
    folder = Path(args.output_dir) if args.output_dir is not None else default
    try:
        (parts_folder(folder, args) if args.format != "png" else folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = f"{error.filename!r}: {error.strerror}"
        raise ValueError(f"output_dir must be a folder that can be written to, or a new one, got {problem}.") from error
    return folder


def record_name(args: SampleArguments) -> str:
    """The file with the options that a seed's images depend on."""
    return f"seed{args.seed}.json"


def record(args: SampleArguments) -> str:
    names = ("model", "scheduler", "steps", "timesteps", "seed", "class_label", "guidance_scale", "bits")
    options = {name: asdict(args)[name] for name in names}
    if args.class_label is not None:
        is_file = args.class_label.endswith(".npy")
        options["class_label"] = file_digest(args.class_label) if is_file else read_labels(args.class_label)[0]
    return json.dumps(options, indent=2) + "\n"


def file_digest(path: str) -> str:
    return "sha256 " + hashlib.sha256(Path(path).read_bytes()).hexdigest()


def check_record(folder: Path, args: SampleArguments) -> None:
    """Raise ValueError if the folder has images of this seed that were made with other options."""
    file, now = folder / record_name(args), json.loads(record(args))
    try:
        before = dict(json.loads(file.read_text())) if file.exists() else now
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"output_dir {str(folder)!r} holds {file.name}, which is no record of samples: {error}"
        ) from error
    # A record of an earlier version lacks an option that was not there yet, and whose default is None.
    changed = ", ".join(
        f"{name} {before.get(name)!r}, now {now[name]!r}" for name in now if before.get(name) != now[name]
    )
    if changed:
        raise ValueError(
            f"output_dir {str(folder)!r} has images of seed {args.seed} made with other options ({changed}): "
            "give another output_dir."
        )


def png_file(folder: Path, args: SampleArguments, index: int) -> Path:
    return folder / f"seed{args.seed}-{index:06d}.png"


def parts_folder(folder: Path, args: SampleArguments) -> Path:
    return folder / f".seed{args.seed}-{args.format}.parts"


def part_file(folder: Path, args: SampleArguments, batch: range) -> Path:
    return parts_folder(folder, args) / f"{batch.start:06d}-{batch.stop:06d}.npy"


def output_file(folder: Path, args: SampleArguments) -> Path:
    return folder / f"seed{args.seed}-{args.num_images}.{args.format}"


def is_done(folder: Path, args: SampleArguments, batch: range) -> list[bool]:
    """For each image of a batch, whether it is written."""
    if args.format == "png":
        return [png_file(folder, args, i).exists() for i in batch]
    return [output_file(folder, args).exists() or part_file(folder, args, batch).exists()] * len(batch)


def write_batch(folder: Path, args: SampleArguments, batch: range, images: np.ndarray) -> None:
    """Write PNG files, or a part of the output file. `images` are (B, H, W, C) in [0, 1]."""
    images = quantize(images, args.bits)
    if args.format == "png":
        for file, image in zip((png_file(folder, args, i) for i in batch), images):
            if not file.exists():
                atomic_file(file, png_bytes(image))
    else:
        atomic_file(part_file(folder, args, batch), array_file(images))


def gather(folder: Path, args: SampleArguments, batches: list[range], labels: list | None) -> Path:
    """Join the parts into the output file, unless the format is PNG. Returns where the images are."""
    if args.format == "png":
        return folder
    target = output_file(folder, args)
    if not target.exists():
        images = np.concatenate([np.load(part_file(folder, args, batch)) for batch in batches])
        stream = io.BytesIO()
        if args.format == "npz":
            # The names arr_0 and arr_1 are those that evaluation code for diffusion models reads.
            np.savez(stream, images, *([] if labels is None else [np.array(labels)]))
        else:
            write_parquet(stream, images, labels)
        atomic_file(target, stream.getvalue())
    shutil.rmtree(parts_folder(folder, args), ignore_errors=True)
    return target


def write_parquet(stream: io.BytesIO, images: np.ndarray, labels: list | None) -> None:
    """A data set with a column `image` and, for a class-conditional model, `label`."""
    import datasets

    if images.dtype == np.uint16 and images.shape[-1] > 1:  # no PNG: Pillow writes no color of 16 bits
        columns, features = {"image": list(images)}, {"image": datasets.Array3D(images.shape[1:], "uint16")}
    else:
        columns = {"image": [{"bytes": png_bytes(image), "path": None} for image in images]}
        features = {"image": datasets.Image()}
    if labels is not None:
        value = datasets.Value("int64" if np.array(labels).dtype.kind == "i" else "float64")
        columns["label"], features["label"] = labels, datasets.List(value) if np.ndim(labels) == 2 else value
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(stream)


if __name__ == "__main__":
    main()
