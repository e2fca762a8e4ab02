"""Classifier guidance of an unconditional model of the digits: `python -m benchmarks.classifier_guidance --model model_cards/digits`

Trains a classifier on noisy digits, as Dhariwal and Nichol (2021) do, which takes seconds on a CPU. Then samples each digit
with the gradient of its log-probability, at several scales, and counts by another classifier how many are the digit asked for.
"""

import math
import sys
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf import DDPMPipelineCustom, GaussianDiffusion
from ddpm_hf.data.builtin import digits
from ddpm_hf.data.decoding import ImageFormat, to_signed
from ddpm_hf.data.images import Images
from ddpm_hf.evaluation.digits import DigitsJudge
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.schedulers.samplers import as_ddpm

CLASSES = 10


@dataclass
class GuidanceArguments:
    model: str = HfArg(default="model_cards/digits", help="model of the digits")
    scales: list[float] = field(default_factory=lambda: [0.0, 1.0, 3.0])
    per_class: int = HfArg(default=20, help="samples of each digit")
    steps: int = HfArg(default=50, help="sampling steps")
    training_steps: int = HfArg(default=1500, help="of the classifier")
    seed: int = HfArg(default=0, help="seed of the samples and of the classifier")


class NoisyClassifier(nn.Module):
    """The logits (B, 10) of noisy digits x_t, (B, 1, 8, 8), at timesteps t, a scalar or (B,)."""

    def __init__(self, diffusion: GaussianDiffusion, width: int = 256):
        super().__init__()
        log_snr = torch.logit(diffusion.alphas_cumprod, eps=1e-9).float()
        self.register_buffer("log_snr", log_snr / 10)
        layers = (nn.Linear(65, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, CLASSES))
        self.layers = nn.Sequential(*layers)

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = self.log_snr[t.long()].reshape(-1, 1).expand(len(x_t), 1)
        return self.layers(torch.cat([x_t.flatten(1), level], 1))


def train_classifier(diffusion: GaussianDiffusion, steps: int, seed: int) -> NoisyClassifier:
    """A classifier of digits of the training split at every noise level."""
    split = digits()["train"]
    images = to_signed(Images(split, ImageFormat((8, 8), channels=1))[range(len(split))]["images"])
    labels, random = torch.tensor(split["label"]), torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = NoisyClassifier(diffusion)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (256,), generator=random)
        t = torch.randint(len(diffusion), (256,), generator=random)
        x_t = diffusion.q_sample(images[chosen], t, torch.randn(256, 1, 8, 8, generator=random))
        loss = nn.functional.cross_entropy(classifier(x_t, t), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval().requires_grad_(False)


def main(arguments: list[str] | None = None) -> dict[float, float]:
    """Prints and returns, for each scale, the share of samples that are the digit asked for."""
    parser = HfArgumentParser(GuidanceArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    pipe = DDPMPipelineCustom.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    classifier = train_classifier(as_ddpm(pipe.scheduler).diffusion, args.training_steps, args.seed)
    judge, wanted = DigitsJudge(digits()), torch.arange(CLASSES * args.per_class) % CLASSES

    shares = {}
    for scale in args.scales:

        def log_probability(x_t, t, scale=scale):
            return scale * classifier(x_t, t).log_softmax(1).gather(1, wanted[:, None]).sum()

        options = {"guidance": log_probability, "guidance_gradient": "x_t"}
        images = sample_images(pipe, range(len(wanted)), args.steps, args.seed, len(wanted), **options)
        recognized, found = judge.recognized(images.reshape(len(images), -1).astype(np.float64))
        shares[scale] = float((found == wanted.numpy()).mean())
        error = math.sqrt(shares[scale] * (1 - shares[scale]) / len(wanted))
        print(
            f"scale {scale:4g}: {shares[scale]:6.1%} ± {error:.1%} are the digit asked for, {recognized:6.1%} recognized"
        )
    return shares


if __name__ == "__main__":
    main(sys.argv[1:])
