"""`DDPMPipelineCustom` against `diffusers.DDPMPipeline`: `python -m benchmarks.pipeline`

Images per second of both pipelines at the same number of steps, with the same network and weights (a network of
`unet.py`, or `--model`). First checks that their images agree. `--compile` adds diffusers' compiled network and this
package's compiled step, `--onnx` this package's pipeline in ONNX Runtime. `--mode reduce-overhead` replays compiled ones as
CUDA graphs. On a GPU:
`python -m benchmarks.pipeline --network cifar10 --batch_size 512 --mixed_precision bf16 --compile --mode reduce-overhead`
"""

import copy
import tempfile
from dataclasses import dataclass
from typing import Literal

import torch
from diffusers import DDPMPipeline
from transformers.hf_argparser import HfArg, HfArgumentParser

from benchmarks.harness import PRECISIONS, describe_machine, flops, interleaved_medians, peak_rate, print_ratios
from benchmarks.unet import NETWORKS
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.export.onnx_files import export_onnx


@dataclass
class BenchmarkArguments:
    model: str | None = HfArg(default=None, help="saved pipeline; None: random weights")
    network: Literal[tuple(NETWORKS)] = HfArg(default="gray", help="network with random weights")
    mixed_precision: Literal["no", "bf16", "fp16"] = HfArg(default="no", help="precision of the network")
    batch_size: int = HfArg(default=16, help="images per batch")
    steps: int = HfArg(default=10, help="sampling steps")
    rounds: int = HfArg(default=5, help="number of timed batches of each candidate")
    onnx: bool = HfArg(default=False, help="time the network in ONNX Runtime too")
    compile: bool = HfArg(default=False, help="time compiled pipelines too")
    mode: str | None = HfArg(default=None, help="mode of torch.compile")


def random_pipeline(network: str) -> DDPMPipelineCustom:
    torch.manual_seed(0)
    return DDPMPipelineCustom(UNet2DModelCustom(**NETWORKS[network]).eval(), DDPMSchedulerCustom())


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(BenchmarkArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), PRECISIONS[args.mixed_precision]
    ours = random_pipeline(args.network) if args.model is None else DDPMPipelineCustom.from_pretrained(args.model)
    ours.to(device)
    stock = ours.to_diffusers()
    # In the memory format that diffusers loads weights in: channels-last weights are part of the comparison.
    stock.unet = copy.deepcopy(stock.unet).to(memory_format=torch.contiguous_format).eval()
    pipes = {"diffusers": stock, "ddpm_hf": ours}
    if args.compile:
        compiled = copy.deepcopy(stock.unet)
        compiled.compile(mode=args.mode)
        pipes["diffusers, compiled"] = DDPMPipeline(compiled, copy.deepcopy(stock.scheduler))
        pipes["ddpm_hf, compiled"] = DDPMPipelineCustom(ours.unet, ours.scheduler)
        pipes["ddpm_hf, compiled"].compile(mode=args.mode)

    if args.onnx:
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(ours, folder)
            pipes["ddpm_hf, ONNX Runtime"] = DDPMPipelineCustom.from_pretrained(folder, backend="onnxruntime")

    def images(name: str, half: bool = dtype != torch.float32) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(0)
        with torch.autocast(device.type, dtype, enabled=half):
            return pipes[name](args.batch_size, generator, args.steps, output_type="pt").images

    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    expected = images("diffusers", half=False)
    # In half precision, diffusers draws its noise in that precision too: its images are other ones.
    checked = [name for name in pipes if dtype == torch.float32 or name.startswith("ddpm_hf")]
    errors = {name: (images(name) - expected).abs().mean().item() for name in checked}
    if not max(errors.values()) < (1e-3 if dtype == torch.float32 else 0.05):
        raise SystemExit(f"the images differ from float32 ones by {errors}, so timing them is pointless")
    print(f"{describe_machine()}; {args.batch_size} images, {args.steps} steps")
    print(
        "mean difference from diffusers' images in float32: "
        + ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
    )
    medians = interleaved_medians({name: lambda name=name: images(name) for name in pipes}, args.rounds, warmup=1)
    print_ratios("a batch", medians, "diffusers")
    peak, work = peak_rate(device, dtype), flops(lambda: images("diffusers"))
    print(f"  at best {peak / 1e12:.2f} TFLOP/s")
    for name, seconds in medians.items():
        print(f"  {name:44s} {args.batch_size / seconds:10.2f} images/s   {work / seconds / peak:4.0%} of the best")


if __name__ == "__main__":
    main()
