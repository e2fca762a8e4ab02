"""Draw the figures of docs/derivation.md and README.md: `python docs/make_figures.py --model outputs/digits`

The schedules come from the package's tables, the noising strip from a photograph that scikit-learn ships, and the
denoising strip and the samples from a trained model.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image
from transformers import HfArgumentParser

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.plots import figure_bytes, noising_strip, schedule_curves

IMAGES = Path(__file__).parent / "images"


@dataclass
class FigureArguments:
    model: str = field(default="outputs/digits", metadata={"help": "the output folder of training/train.py"})


def main() -> None:
    (args,) = HfArgumentParser(FigureArguments).parse_args_into_dataclasses()
    IMAGES.mkdir(exist_ok=True)
    for name in ("samples.png", "denoising.png"):
        shutil.copyfile(Path(args.model) / name, IMAGES / name)

    linear = DDPMSchedulerCustom().diffusion
    (IMAGES / "linear.png").write_bytes(figure_bytes(schedule_curves({"linear": linear})))
    names = ["linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
    several = {name: DDPMSchedulerCustom(beta_schedule=name).diffusion for name in names}
    (IMAGES / "schedules.png").write_bytes(figure_bytes(schedule_curves(several)))

    photo = ImageOps.fit(Image.fromarray(load_sample_image("flower.jpg")), (96, 96))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 127.5 - 1
    (IMAGES / "noising.png").write_bytes(figure_bytes(noising_strip(linear, pixels)))


if __name__ == "__main__":
    main()
