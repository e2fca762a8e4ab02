"""Sample images from a trained model: `python training/sample.py --model outputs/digits --num_images 64`.

Writes one PNG file per image, named by its index, or one .npz or .parquet file. Images are sampled from noise, or made from
pictures: `--init_image` (image to image, or inpainting with `--mask`) and `--interpolate`. The work is spread over the processes.
Image i of a seed is the same on any number of processes. The same command resumes a run that was stopped, and a larger
`--num_images` adds images.
"""

import io
from pathlib import Path

import numpy as np
from PIL import Image

import ddpm_hf
from ddpm_hf.checks import check_device, check_int
from ddpm_hf.evaluation.encoding import PNG_CHANNELS
from ddpm_hf.evaluation.sample_options import FILES, SampleArguments
from ddpm_hf.evaluation.sample_output import SampleFolder, folder_path, read_labels
from ddpm_hf.files import atomic_file, check_output_folder
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.processes import fail, prepare_process
from ddpm_hf.training.progress import progress_bar

# Modules that import torch are imported in functions, after the options are parsed, so that --help answers at once.
GRID_IMAGES, ANIMATED_IMAGES, MAX_FRAMES, PADDING = 100, 16, 60, 2  # the last: pixels between images


def main(arguments: list[str] | None = None) -> None:
    prepare_process()
    parser = OptionParser(SampleArguments, __doc__.splitlines()[0])
    try:
        args = parser.parse(arguments)
        pipe = prepare(args)
        folder = SampleFolder(args)
    except (ValueError, TypeError, OSError) as error:
        fail("sample.py", error)

    from accelerate import PartialState
    from accelerate.utils import gather_object

    from ddpm_hf.evaluation.backends import faster_pipeline
    from ddpm_hf.pipelines.denoising import NonFiniteSamples

    state = PartialState(cpu=args.device == "cpu")
    pipe.to(args.device or state.device)
    if args.backend == "auto":
        batch = range(min(args.batch_size, args.num_images))
        options = {"num_inference_steps": args.steps} | sampling_options(pipe, args, batch)
        pipe, reason = faster_pipeline(pipe, args.model, len(batch), **options)
        state.print(reason)
    pipe.set_progress_bar_config(disable=True)

    # Batches do not depend on the number of processes, because the rounding of an image depends on its batch.
    batches = [range(k, min(k + args.batch_size, args.num_images)) for k in range(0, args.num_images, args.batch_size)]
    unfinished = [batch for batch in batches if not all(folder.is_done(batch))]
    existing = sum(sum(folder.is_done(batch)) for batch in batches)
    state.wait_for_everyone()  # before the first file is written, so that all processes find the same ones missing
    if state.is_main_process:
        folder.write_record()
    share, problem = unfinished[state.process_index :: state.num_processes], None
    title = "Sampling" if state.num_processes == 1 else f"Sampling, process 1 of {state.num_processes}"
    with progress_bar(title, sum(map(len, share)), "images", shown=state.is_main_process) as bar:
        for batch in share:
            try:
                images = make_batch(pipe, args, batch)
            except NonFiniteSamples as error:
                problem = f"in the batch of images {batch.start} to {batch.stop - 1}, {error}"
                break
            folder.write(batch, images)
            bar.update(len(batch))
    # Also waits for all parts to be written. A process that ended alone would leave the others waiting, unexplained.
    if problems := [p for p in gather_object([problem]) if p is not None]:
        fail("sample.py", problems[0])
    if state.is_main_process:
        written = folder.join(batches, labels_of(pipe, args, range(args.num_images)))
        print(f"{args.num_images - existing} images written to {written} ({existing} existed).")
        write_grid(pipe, args, folder)
        write_animation(pipe, args)


def prepare(args: SampleArguments) -> "ddpm_hf.DDPMPipelineCustom":
    """The pipeline, after all checks that can be made before sampling. `args.timesteps` becomes a list in place of `steps`,
    and the name of a class in `args.class_label` its number."""
    from ddpm_hf.evaluation.edited_samples import check_edit
    from ddpm_hf.pipelines.grids import check_video
    from ddpm_hf.pipelines.guidance import class_names_of
    from ddpm_hf.schedulers.samplers import make_sampler

    if args.device is not None:
        check_device("device", args.device, computes=True)
    backend = "torch" if args.backend == "auto" else args.backend
    pipe = ddpm_hf.DDPMPipelineCustom.from_pretrained(args.model, backend=backend, variant=args.variant)
    args.recommend(pipe.scheduler)
    if args.scheduler is not None:
        pipe.scheduler = make_sampler(args.scheduler, pipe.scheduler, args.spacing)
    elif args.spacing is not None:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing=args.spacing)
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
    options = sampling_options(pipe, args, range(1))
    pipe.check_inputs(1, None, args.steps, output_type="np", **options)
    if args.is_editing:
        check_edit(pipe, args, options["class_labels"] is not None)
    if args.gif is not None and args.gif.lower().endswith(".mp4"):
        check_video()
    for name in FILES:
        if (file := getattr(args, name)) is not None:
            check_output_folder(name, Path(file).parent, [Path(file).name])
            if Path(file).resolve().is_relative_to(folder_path(args).resolve()):
                raise ValueError(
                    f"{name} must be outside of {str(folder_path(args))!r}, which holds samples alone, got {file!r}."
                )
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
    return {"timesteps": timesteps, "eta": args.eta, "class_labels": labels, "guidance_scale": args.guidance_scale}


def labels_of(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, indices: range) -> list | None:
    """The label of each image, which depends on the image's index alone, as its noise does."""
    from ddpm_hf.pipelines.guidance import cycled_labels

    if args.class_label is None:
        return cycled_labels(pipe.unet, indices)
    labels = read_labels(args.class_label)
    return [labels[i % len(labels)] for i in indices]


def make_batch(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, batch: range, **options) -> np.ndarray:
    """The images with these indices, (B, H, W, C) in [0, 1]. `options` are further ones of the pipeline's call."""
    from ddpm_hf.evaluation.edited_samples import edited_images
    from ddpm_hf.evaluation.sampling import sample_images

    options |= sampling_options(pipe, args, batch)
    if args.is_editing:
        options = {name: value for name, value in options.items() if name not in ("timesteps", "eta")}
        return edited_images(pipe, args, batch, **options)
    return sample_images(pipe, batch, args.steps, args.seed, len(batch), **options)


def magnification(pipe: "ddpm_hf.DDPMPipelineCustom") -> int:
    """By how much small images are enlarged in a picture of several."""
    from ddpm_hf.pipelines.arguments import check_shape

    return max(1, 64 // max(check_shape(pipe.unet, 1, None)[2:]))


def write_grid(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments, folder: SampleFolder) -> None:
    """Write the file that `--grid` names, from the images that are written."""
    if args.grid is None:
        return
    from ddpm_hf.evaluation.sample_files import read_samples
    from ddpm_hf.pipelines.arguments import check_shape

    count = min(args.num_images, GRID_IMAGES)
    if args.format == "png":
        images = [Image.open(folder.png_file(i)) for i in range(count)]
    else:
        _, channels, *size = check_shape(pipe.unet, 1, None)
        images = read_samples(str(folder.output_file), count, tuple(size), channels)
    stream = io.BytesIO()
    format = Image.registered_extensions()[Path(args.grid).suffix.lower()]
    ddpm_hf.image_grid(images, scale=magnification(pipe), padding=PADDING).save(stream, format)
    atomic_file(Path(args.grid), stream.getvalue())
    print(f"Grid of {count} images written to {args.grid}.")


def write_animation(pipe: "ddpm_hf.DDPMPipelineCustom", args: SampleArguments) -> None:
    """Write the file that `--gif` names. The first images are made once more, which are perhaps written already."""
    if args.gif is None:
        return
    from ddpm_hf.pipelines.grids import animation_bytes, image_grid

    frames, stride, layout = [], 1, {"scale": magnification(pipe), "padding": PADDING}

    def keep(pipe, i, t, tensors):
        nonlocal frames, stride
        if i % stride == 0:
            frames.append(image_grid(pipe.to_images(tensors["latents"], "pt"), **layout))
        if len(frames) > 2 * MAX_FRAMES:  # the number of steps is not known here
            frames, stride = frames[::2], 2 * stride

    batch = range(min(args.num_images, ANIMATED_IMAGES))
    last = image_grid(make_batch(pipe, args, batch, callback_on_step_end=keep), **layout)
    animation = animation_bytes([*frames, last], Path(args.gif).suffix[1:].upper())
    atomic_file(Path(args.gif), animation)
    print(f"Animation of {len(batch)} images written to {args.gif}.")


if __name__ == "__main__":
    main()
