"""Fine-tuning against training from scratch, on the images of one digit: `python -m benchmarks.fine_tuning`

Trains on the digits of one kind three times: from scratch, from all weights of the shipped model of all digits
(`--init_from`), and by adapters alone (`--lora_rank`). After each budget of images seen it measures the Fréchet distance
of samples to these digits, and the share that a classifier recognizes as this digit.
"""

import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ddpm_hf.scripts import train
from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.builtin import digits
from ddpm_hf.evaluation.digits import DigitsBackbone, DigitsJudge
from ddpm_hf.evaluation.metrics import frechet_distance, moments
from ddpm_hf.evaluation.sampling import sample_images


@dataclass
class FineTuningArguments:
    model: str = HfArg(default="model_cards/digits", help="model of all digits")
    digit: int = HfArg(default=8, help="the digit to train on")
    budgets: list[int] = field(default_factory=lambda: [1600, 6400, 25600, 102400])
    rank: int = HfArg(default=16, help="of the adapters")
    num_samples: int = HfArg(default=500, help="samples of each measurement")
    steps: int = HfArg(default=100, help="sampling steps")
    seed: int = HfArg(default=0, help="seed of the runs and the samples")


def ways(args: FineTuningArguments) -> dict[str, list[str]]:
    """The options of each way to train. Its rate is the better of two, 1e-3 and 3e-3 (of adapters 3e-3 and 1e-2), by the
    distance at 6,400 images."""
    base = ["--init_from", args.model]
    return {
        "from scratch": ["--config", "digits", "--learning_rate", "1e-3"],
        "fine-tuned": [*base, "--learning_rate", "1e-3"],
        f"adapters of rank {args.rank}": [*base, "--lora_rank", str(args.rank), "--learning_rate", "3e-3"],
    }


class Quality:
    """Measures samples of one digit, of which `images` has all of the training split."""

    def __init__(self, args: FineTuningArguments, images):
        self.args, self.judge, self.backbone = args, DigitsJudge(digits()), DigitsBackbone(digits())
        pixels = np.stack([np.asarray(image) for image in images["image"]])[:, None]
        self.reference = moments(self.backbone(pixels), "the digits")

    def __call__(self, folder: str | Path) -> tuple[float, float]:
        """The Fréchet distance of samples, and the share that is this digit."""
        pipe = DDPMPipelineCustom.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        samples = sample_images(pipe, range(self.args.num_samples), self.args.steps, self.args.seed, 250)
        pixels = np.round(samples * 255).astype(np.uint8).transpose(0, 3, 1, 2)
        distance = frechet_distance(moments(self.backbone(pixels)), self.reference)
        found = self.judge.classifier.predict(pixels.reshape(len(pixels), -1) / 255.0)
        return distance, float((found == self.args.digit).mean())


def main(arguments: list[str] | None = None) -> dict[tuple[str, int], tuple[float, float]]:
    """Prints and returns the distance and the share, by way and number of images seen."""
    parser = HfArgumentParser(FineTuningArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    images = digits()["train"].filter(lambda label: label == args.digit, input_columns="label")
    quality, found = Quality(args, images), {}
    found["the model of all digits", 0] = quality(args.model)
    with tempfile.TemporaryDirectory() as folder:
        images.save_to_disk(f"{folder}/data")
        common = ["--dataset", f"{folder}/data", "--batch_size", "64", "--warmup_steps", "20", "--seed", str(args.seed)]
        common += ["--learning_rate_schedule", "constant", "--ema_halflife_images", "8000", "--quality_samples", "0"]
        common += ["--sample_steps", "20"]  # of pictures that are not looked at
        common += ["--checkpoint_every_steps", "1000000", "--validate_every_steps", "0", "--report_to", "none"]
        for way, options in ways(args).items():
            for budget in sorted(args.budgets):  # each continues the run of the one before
                output = f"{folder}/{way}"
                train.main([*options, *common, "--output_dir", output, "--total_images", str(budget)])
                found[way, budget] = quality(output)
    print(f"\n{len(images)} images of the digit {args.digit}\n| | images seen | FD | recognized as {args.digit} |")
    print("|---|---|---|---|")
    for (way, budget), (distance, share) in found.items():
        print(f"| {way} | {budget:,} | {distance:.3g} | {share:.0%} |")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
