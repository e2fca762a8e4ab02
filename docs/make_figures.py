"""Draw the figures of docs/derivation.md: `python docs/make_figures.py`

The schedules come from the package's tables, the noising strip from a photograph that scikit-learn ships.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from ddpm_hf import DDPMSchedulerCustom
from ddpm_hf.evaluation.plots import figure_bytes, noising_strip, schedule_curves

IMAGES = Path(__file__).parent / "images"


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
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
