"""Training against the logic of diffusers' train_unconditional.py: `python -m benchmarks.training [--presets digits photos]`

Both train the network of a preset from the same initial weights, with the same AdamW settings, images, batch size and
precision. The stock side does what diffusers' example does: `UNet2DModel`, `DDPMScheduler.add_noise`, `EMAModel`, a DataLoader
that decodes and transforms every image each time (by default in the main process), and a loop that reads the loss every
step. The other side does what training/train.py does: `training_step`, `MicroBatches`, `EMA`, and a loss that is read every
`log_every_steps`. First both take the same steps with the same images, timesteps and noise: their losses must be equal up to
rounding. Then they are timed in turn, data loading included. The utilization is the arithmetic of the stock network as a
fraction of the machine's measured peak in that precision.

On a GPU, the paper's network on images that need no download:
`python -m benchmarks.training --presets cifar10 --dataset photos --batch_size 512 --mixed_precision bf16 --compile inductor`
"""

import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from benchmarks.harness import PRECISIONS, describe_machine, flops, interleaved_medians, peak_rate, print_ratios
from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.batches import MicroBatches
from ddpm_hf.data.decoding import PILLOW_MODES, ImageFormat, to_signed
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.data.images import Images
from ddpm_hf.diffusion.timestep_samplers import make_timestep_sampler
from ddpm_hf.training.build import build
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.presets import load_preset
from ddpm_hf.training.step import StepReport, training_step
from ddpm_hf.training.step_randomness import draw_randomness

ADAMW = {"lr": 1e-4, "betas": (0.95, 0.999), "weight_decay": 1e-6, "eps": 1e-8}  # defaults of the example
CHECKED_STEPS = 4
STOCK = "train_unconditional.py's logic"
ENDLESS = 10**9


@dataclass
class BenchmarkArguments:
    presets: list[str] = field(default_factory=lambda: ["digits", "photos"])
    dataset: str | None = field(default=None, metadata={"help": "None: the preset's"})
    batch_size: int | None = field(default=None, metadata={"help": "None: the preset's"})
    steps: int = field(default=20, metadata={"help": "training steps per round"})
    rounds: int = field(default=7, metadata={"help": "the median of this many rounds is printed"})
    mixed_precision: Literal["no", "bf16", "fp16"] = field(default="no", metadata={"help": "precision of both sides"})
    num_workers: int = field(
        default=0, metadata={"help": "workers of the stock DataLoader; the example's default is 0"}
    )
    compile: str | None = field(
        default=None, metadata={"help": "torch.compile backend; both sides are also timed compiled"}
    )


def transform(image: Image.Image, config: TrainingConfig) -> torch.Tensor:
    """What the example asks of torchvision: Resize, CenterCrop, ToTensor, Normalize([0.5], [0.5])."""
    image = image.convert(PILLOW_MODES[config.channels])
    height, width = config.resolution
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    values = torch.from_numpy(np.array(image).reshape(height, width, config.channels))
    return values.permute(2, 0, 1).contiguous().float().div(255).sub(0.5).div(0.5)


class Stock:
    """The training loop of diffusers' example. With a `label_column`, the network gets labels. With `total_steps`, the rate
    falls along a cosine after 500 steps, which is the example's default."""

    def __init__(
        self,
        config: TrainingConfig,
        unet,
        scheduler,
        args: BenchmarkArguments,
        backend: str | None,
        total_steps: int = 0,
    ):
        self.config = config
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        pipe = DDPMPipelineCustom(unet, scheduler).to_diffusers()
        # The example's memory format: channels-last weights are one of the differences that are measured.
        unet = copy.deepcopy(pipe.unet).to(memory_format=torch.contiguous_format).train()
        self.scheduler = pipe.scheduler
        self.ema = EMAModel(unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
        optimizer = torch.optim.AdamW(unet.parameters(), **ADAMW)
        self.dataset = open_dataset(config.dataset, config.dataset_config, config.split)

        def transform_images(examples: dict) -> dict:
            labels = {} if config.label_column is None else {"labels": examples[config.label_column]}
            return {"input": [transform(image, config) for image in examples["image"]], **labels}

        self.dataset.set_transform(transform_images)
        loader = torch.utils.data.DataLoader(
            self.dataset, batch_size=config.batch_size, shuffle=True, num_workers=args.num_workers, drop_last=True
        )
        rate = get_scheduler("constant", optimizer=optimizer)
        if total_steps:
            rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=total_steps)
        if backend:
            unet = torch.compile(unet, backend=backend)
        self.model, self.optimizer, self.loader, self.rate = self.accelerator.prepare(unet, optimizer, loader, rate)
        self.ema.to(self.accelerator.device)
        self.step, self.batches = 0, self._batches()
        self.bar = tqdm(disable=True)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from self.loader

    def images_of(self, indices: list[int]) -> torch.Tensor:
        return torch.stack(self.dataset[indices]["input"]).to(self.accelerator.device)

    def loss_of(self, indices: list[int]) -> float:
        """A step with these images, and the timesteps and noise that training/train.py draws."""
        sampler = make_timestep_sampler(self.config.timestep_sampler, self.config.num_train_timesteps)
        draws = draw_randomness(self.config, self.step, range(len(indices)), self.accelerator.device, sampler)
        return self.train({"input": self.images_of(indices)}, (draws.t, draws.noise))

    def train(self, batch: dict[str, torch.Tensor], draws: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        """A step; `draws` replaces its timesteps and noise."""
        clean = batch["input"]
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
        t = torch.randint(0, self.scheduler.config.num_train_timesteps, (len(clean),), device=clean.device).long()
        if draws is not None:
            t, noise = draws
        noisy = self.scheduler.add_noise(clean, noise, t)
        with self.accelerator.accumulate(self.model):
            output = self.model(noisy, t, batch.get("labels")).sample
            loss = F.mse_loss(output.float(), noise.float())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.ema.step(self.model.parameters())
            self.bar.update(1)
            self.step += 1
        logs = {"loss": loss.detach().item(), "lr": self.rate.get_last_lr()[0], "ema_decay": self.ema.cur_decay_value}
        self.bar.set_postfix(**logs)
        self.accelerator.log(logs, step=self.step)
        return logs["loss"]

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.train(next(self.batches))


class Ours:
    """The loop of training/train.py."""

    def __init__(self, config: TrainingConfig, unet, scheduler, args: BenchmarkArguments, backend: str | None):
        self.config, self.diffusion = config, scheduler.diffusion
        self.timestep_sampler = make_timestep_sampler(config.timestep_sampler, config.num_train_timesteps)
        self.accelerator = Accelerator(mixed_precision=args.mixed_precision)
        device = self.accelerator.device
        self.unet = unet.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(self.unet.parameters(), **ADAMW, fused=True)
        self.ema = EMA(self.unet, config.ema_halflife_images)
        model = torch.compile(self.unet, backend=backend) if backend else self.unet
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        source = open_dataset(config.dataset, config.dataset_config, config.split)
        self.images = Images(source, ImageFormat(config.resolution, config.channels))
        self.images.keep_in_memory(device)
        self.batches = MicroBatches(self.images, config.batch_size, config.seed, 0, ENDLESS, device=device)
        self.step, self.loss_sum, self.bar = 0, torch.zeros((), device=device), tqdm(disable=True)

    def images_of(self, indices: list[int]) -> torch.Tensor:
        return to_signed(self.images[indices]["images"])

    def loss_of(self, indices: list[int]) -> float:
        """A step with these images."""
        return self.train([self.images[indices]]).losses.mean().item()

    def train(self, micro_batches) -> StepReport:
        step = (self.config, self.step, micro_batches, self.timestep_sampler)
        report = training_step(self.accelerator, self.model, self.optimizer, self.diffusion, *step)
        self.step += 1
        self.ema.update(self.unet, self.step * self.config.batch_size, self.config.batch_size)
        return report

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.loss_sum += self.train(self.batches.step()).losses.mean()
            self.bar.update(self.config.batch_size)
            if self.step % self.config.log_every_steps == 0:
                loss = (self.loss_sum / self.config.log_every_steps).item()
                self.loss_sum = torch.zeros_like(self.loss_sum)
                self.bar.set_postfix(loss=f"{loss:.4f}")
                self.accelerator.log({"loss": loss}, step=self.step)


def compare(preset: str, args: BenchmarkArguments) -> dict[str, float]:
    """Median seconds of a round of each."""
    changes = {"learning_rate": ADAMW["lr"], "warmup_steps": 0, "learning_rate_schedule": "constant"}
    # The example predicts ε and does not mirror images by default. The two sides draw dropout masks differently.
    changes |= {
        "mixed_precision": args.mixed_precision,
        "dropout": 0.0,
        "random_flip": False,
        "prediction_type": "epsilon",
    }
    changes |= {name: getattr(args, name) for name in ("dataset", "batch_size") if getattr(args, name) is not None}
    config = TrainingConfig(**(load_preset(preset) | changes))
    torch.manual_seed(0)
    unet, scheduler = build(config)
    for parameter in unet.parameters():
        if not parameter.any():  # layers that start at zero would hide errors in the layers before them
            torch.nn.init.normal_(parameter, std=0.02)
    trainers = {}
    for backend in (None, args.compile) if args.compile else (None,):
        for kind, name in ((Stock, STOCK), (Ours, "ddpm_hf")):
            name = f"{name}, compiled" if backend else name
            trainers[name] = kind(config, copy.deepcopy(unet), scheduler, args, backend)
    size, allowed = len(trainers["ddpm_hf"].images), 1e-4 if args.mixed_precision == "no" else 2e-2
    batches = torch.arange(CHECKED_STEPS * config.batch_size).remainder(size).view(CHECKED_STEPS, -1).tolist()
    for indices in batches:
        ours, theirs = (trainers[name].images_of(indices) for name in ("ddpm_hf", STOCK))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    losses = {name: [trainer.loss_of(indices) for indices in batches] for name, trainer in trainers.items()}
    for name, trainer in trainers.items():
        apart = max(abs(loss - expected) / expected for loss, expected in zip(losses[name], losses[STOCK], strict=True))
        if isinstance(trainer, Ours) and not apart < allowed:
            raise SystemExit(f"{preset}: {name}'s losses are off by {apart:.1e} of their size: nothing to time")
        print(f"{preset}: {name}: losses of the same draws differ by {apart:.1e} of stock's at most")
    candidates = {name: functools.partial(trainer.run, args.steps) for name, trainer in trainers.items()}
    medians = interleaved_medians(candidates, args.rounds, warmup=1)
    title = f"{preset}: {args.steps} steps of {config.batch_size} images, {args.mixed_precision} mixed precision"
    print_ratios(title, medians, STOCK)
    device = trainers[STOCK].accelerator.device
    peak = peak_rate(device, PRECISIONS[args.mixed_precision])
    work = flops(functools.partial(trainers[STOCK].loss_of, batches[0])) / config.batch_size
    print(f"  at best {peak / 1e12:.2f} TFLOP/s, {work / 1e9:.3f} GFLOP an image")
    for name, seconds in medians.items():
        speed = args.steps * config.batch_size / seconds
        print(f"  {name:44s} {speed:10.1f} images/s   {speed * work / peak:4.0%} of the best")
    return medians


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    print(describe_machine())
    for preset in args.presets:
        compare(preset, args)


if __name__ == "__main__":
    main()
