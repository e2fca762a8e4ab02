"""The options of training/sample.py, and the rules between them. Nothing here imports torch."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ddpm_hf.evaluation.options import SamplerName
from ddpm_hf.options import check_options, option

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

DEFAULT_STRENGTH = 0.8  # that of diffusers' image to image
OWN_STEPS = "editing runs the steps of DDPM, evenly spaced"
# Options that exclude each other, and why.
CONFLICTS = (
    ("interpolate", ("init_image", "mask"), "the images come from one or the other"),
    ("init_image", ("scheduler", "timesteps", "eta", "spacing"), OWN_STEPS),
    ("interpolate", ("scheduler", "timesteps", "eta", "spacing"), OWN_STEPS),
    ("mask", ("strength", "gif"), "inpainting goes back and forth on the whole chain"),
    ("spacing", ("timesteps",), "both choose the timesteps"),
)
BACKENDS_WITHOUT = {"auto": "variant", "onnxruntime": "device"}  # an option that cannot be given with a backend
# Options, and those of which they need one.
NEEDS = {"mask": ("init_image",), "strength": ("init_image", "interpolate")}
FILES = {"gif": (".gif", ".webp", ".mp4"), "grid": (".png", ".jpg", ".jpeg", ".webp")}


@dataclass
class SampleArguments:
    model: str = option(MISSING, "folder, or repository on the Hub")
    backend: Literal["torch", "onnxruntime", "auto"] = option(
        "torch",
        "what computes the network; 'onnxruntime': on the CPU, from the file of ddpm-export; 'auto': the faster of them, by "
        "measuring a step of each",
    )
    variant: str | None = option(None, "of the weights, such as fp16; of onnxruntime fp16 or int8")
    num_images: int = option(64, "total number of images, including existing ones", "[1, inf)")
    scheduler: SamplerName | None = option(
        None, "None: the saved one, but the recommended one for ddpm without --steps and other options of the steps"
    )
    steps: int | None = option(
        None,
        "sampling steps; None: those that the model was distilled to, those recommended (20 of unipc), or T",
        "[1, inf)",
    )
    spacing: Literal["trailing", "leading", "linspace"] | None = option(
        None, "of the timesteps; None: that of the saved scheduler, and 'trailing' for another --scheduler"
    )
    timesteps: str | None = option(
        None,
        "timesteps instead of evenly spaced ones: 'best' for those of evaluate.py with the best likelihood in --steps "
        "steps of ddpm; 'ddimN' for N in equal strides from 0, as improved-diffusion names them; or a descending list "
        "such as 900,500,100,0",
    )
    eta: float | None = option(None, "noise per step of ddim, from 0 (none) to 1 (that of DDPM); None: 0", "[0, 1]")
    seed: int = option(0, "seed; an image depends on it and on the image's index", "[0, inf)")
    class_label: str | None = option(
        None,
        "of a class-conditional model: a class by name or number, a number for class_embed_type 'timestep', or a .npy "
        "file with one label per row, of which image i gets row i modulo their number; None: the classes in turn",
    )
    guidance_scale: float = option(1.0, "of classifier-free guidance; 1: no guidance", "(-inf, inf)")
    init_image: str | None = option(
        None, "file of a picture to change: image to image, or, with --mask, inpainting. Each image is another result"
    )
    mask: str | None = option(
        None,
        "file of a picture, white where --init_image is to be filled in. Each of the --steps is run about 10 times",
    )
    interpolate: list[str] | None = option(
        None, "files of two pictures. The images lead from the first to the second, in equal steps"
    )
    strength: float | None = option(
        None, "of --init_image and --interpolate: the share of the chain that is run. None: 0.8", "(0, 1]"
    )
    format: Literal["png", "npz", "parquet"] = option(
        "png", "a parquet file holds PNG images, and an array of uint16 for color of 16 bits"
    )
    bits: Literal[8, 16] = option(8, "per channel; color of 16 bits as npz or parquet")
    batch_size: int = option(250, "images per process at a time", "[1, inf)")
    output_dir: str | None = option(None, "folder to write to; None: generated/ in the model's")
    grid: str | None = option(
        None, "file for a grid of the first 100 images (.png, .jpg or .webp), outside of --output_dir"
    )
    gif: str | None = option(
        None, "file for an animation of how the first 16 images are made (.gif, .webp or .mp4), outside of --output_dir"
    )
    device: str | None = option(None, "None: a GPU for each process if there are any")

    def __post_init__(self):
        check_options(self)
        for name, others, reason in CONFLICTS:
            for other in others:
                if self.is_given(name) and self.is_given(other):
                    values = f"{name}={getattr(self, name)!r} and {other}={getattr(self, other)!r}"
                    raise ValueError(f"{values} exclude each other: {reason}.")
        for name, others in NEEDS.items():
            if self.is_given(name) and not any(map(self.is_given, others)):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} needs {' or '.join(f'--{other}' for other in others)}."
                )
        if (name := BACKENDS_WITHOUT.get(self.backend)) is not None and self.is_given(name):
            raise ValueError(f"{name}={getattr(self, name)!r} cannot be given with backend={self.backend!r}.")
        if self.interpolate is not None and len(self.interpolate) != 2:
            raise ValueError(f"interpolate must be the files of two pictures, got {self.interpolate!r}.")
        for name, suffixes in FILES.items():
            if (file := getattr(self, name)) is not None and Path(file).suffix.lower() not in suffixes:
                raise ValueError(f"{name} must be a file named {' or '.join(suffixes)}, got {file!r}.")

    def is_given(self, name: str) -> bool:
        return getattr(self, name) is not None

    def recommend(self, scheduler: "SchedulerMixin") -> None:
        """Sample from a model with the scheduler of DDPM as recommended, unless an option says how."""
        from ddpm_hf import DDPMSchedulerCustom
        from ddpm_hf.schedulers.samplers import recommended_sampler

        options = ("scheduler", "steps", "spacing", "timesteps", "eta")
        if isinstance(scheduler, DDPMSchedulerCustom) and not self.is_editing and not any(map(self.is_given, options)):
            self.scheduler, self.steps = recommended_sampler(scheduler)

    @property
    def is_editing(self) -> bool:
        """Whether the images are made from other images."""
        return self.is_given("init_image") or self.is_given("interpolate")
