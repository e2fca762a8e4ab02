"""`DDPMPipelineCustom` against `diffusers.DDPMPipeline`: `python benchmarks/pipeline.py`

Images per second at equal steps, of one network with one set of weights (a small one of 32×32 RGB, or `--model`). The
images of both are compared first. `--compile` adds the compiled step.
"""

import copy
from dataclasses import dataclass, field

import torch
from harness import describe_machine, interleaved_medians, print_ratios
from transformers import HfArgumentParser

from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom


@dataclass
class BenchmarkArguments:
    model: str | None = field(default=None, metadata={"help": "a saved pipeline; None: a small network of 32×32 RGB"})
    batch_size: int = 16
    steps: int = 10
    rounds: int = 5
    compile: bool = False


def small_pipeline() -> DDPMPipelineCustom:
    torch.manual_seed(0)
    unet = UNet2DModelCustom(
        sample_size=32,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    return DDPMPipelineCustom(unet.eval(), DDPMSchedulerCustom())


def main() -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses()
    ours = small_pipeline() if args.model is None else DDPMPipelineCustom.from_pretrained(args.model)
    ours.to("cuda" if torch.cuda.is_available() else "cpu")
    stock = ours.to_diffusers()
    # As it would have loaded them: weights laid out for channels-last images are a part of what is compared.
    stock.unet = copy.deepcopy(stock.unet).to(memory_format=torch.contiguous_format).eval()
    pipes = {"diffusers": stock, "ddpm_hf": ours}
    if args.compile:
        pipes["ddpm_hf, compiled"] = DDPMPipelineCustom(ours.unet, ours.scheduler)
        pipes["ddpm_hf, compiled"].compile()

    def images(name: str):
        generator = torch.Generator().manual_seed(0)
        return pipes[name](args.batch_size, generator, args.steps, output_type="np").images

    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    difference = max(abs(images(name) - images("diffusers")).max() for name in pipes)
    if not difference < 0.01:
        raise SystemExit(f"the images differ by {difference:g}: nothing to time")
    print(f"{describe_machine()}; {args.batch_size} images, {args.steps} steps, largest difference {difference:.1e}")
    medians = interleaved_medians({name: lambda name=name: images(name) for name in pipes}, args.rounds, warmup=1)
    print_ratios("a batch", medians, "diffusers")
    for name, seconds in medians.items():
        print(f"  {name:44s} {args.batch_size / seconds:10.2f} images/s")


if __name__ == "__main__":
    main()
