"""`UNet2DModelCustom` against `diffusers.UNet2DModel` with the same weights: `python -m benchmarks.unet [network ...]`

First checks that the outputs agree, then times the forward pass, eager, in ONNX Runtime (`--onnx`) and compiled
(`--compile`), and a training step (forward, backward, AdamW; fused for this package, as in its training script). Each time
comes with the FLOP/s of the diffusers network as a share of the machine's fastest convolution: near 100 %, only less arithmetic makes it faster.
`--compile` also compares compiled gradients of both networks with eager ones.
"""

import argparse
import copy
import tempfile
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel

from benchmarks.harness import describe_machine, flops, interleaved_medians, peak_rate
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.export.onnx_files import export_onnx
from ddpm_hf.models.onnx_unet import OnnxUNet

TINY = {
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": None,
}
NETWORKS = {
    "tiny": TINY,
    "gray": {**TINY, "sample_size": 32, "block_out_channels": (64, 128, 128), "norm_num_groups": 32},
    "cifar10": {
        "sample_size": 32,
        "block_out_channels": (128, 256, 256, 256),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    },
}
FORWARD = {"tiny": (1, 16, 64), "gray": (16,), "cifar10": (1, 4)}
TRAINING = {"tiny": 64, "gray": 16, "cifar10": 4}


def networks(name: str) -> tuple[UNet2DModel, UNet2DModelCustom]:
    torch.manual_seed(0)
    stock, ours = UNet2DModel(**NETWORKS[name]).eval(), UNet2DModelCustom(**NETWORKS[name]).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def batch(name: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    config = NETWORKS[name]
    x = torch.randn(size, config.get("in_channels", 3), config["sample_size"], config["sample_size"])
    return x, torch.randint(0, 1000, (size,))


def gradient_difference(model: torch.nn.Module, reference: torch.nn.Module, x, t) -> float:
    """Largest difference of any parameter's gradient, relative to the network's largest gradient."""
    for net in (model, reference):
        net.zero_grad()
        F.mse_loss(net(x, t).sample, x).backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    got = {name.removeprefix("_orig_mod."): p.grad for name, p in model.named_parameters()}
    largest = max(grad.abs().max() for grad in expected.values())
    return max(((got[name] - grad).abs().max() / largest).item() for name, grad in expected.items())


def check(what: str, difference: float, bound: float, fatal: bool = True) -> None:
    print(f"  {what}: largest difference {difference:.1e}{'' if difference < bound else '  WRONG'}")
    if fatal and not difference < bound:
        raise SystemExit("timing networks that differ is pointless")


def table(title: str, candidates: dict, work: int, peak: float, rounds: int) -> None:
    medians = interleaved_medians(candidates, rounds)
    stock = medians["diffusers"]
    print(f"\n{title}")
    for name, seconds in medians.items():
        share = work / seconds / peak
        print(f"  {name:30s} {seconds * 1e3:10.2f} ms   {stock / seconds:5.2f}×   {share:5.0%} of the peak")
    if "diffusers, compiled" in medians:
        ratio = medians["diffusers, compiled"] / medians["ddpm_hf, compiled"]
        print(f"  compiled against compiled: {ratio:.2f}×")


def in_onnx(unet: UNet2DModelCustom) -> OnnxUNet:
    with tempfile.TemporaryDirectory() as folder:
        (file,) = export_onnx(DDPMPipelineCustom(unet, DDPMSchedulerCustom()), folder)
        return OnnxUNet(file.path)


def forward(name: str, size: int, peak: float, rounds: int, compile: bool, onnx: bool) -> None:
    stock, ours = networks(name)
    x, t = batch(name, size)[0], 500
    channels_last = copy.deepcopy(stock).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    candidates = {
        "diffusers": lambda: stock(x, t),
        "diffusers, channels_last": lambda: channels_last(x_last, t),
        "ddpm_hf": lambda: ours(x, t),
    }
    with torch.no_grad():
        expected = stock(x, t).sample
        check(f"{name}, batch {size}", (ours(x, t).sample - expected).abs().max().item(), 2e-5)
        if onnx:
            runtime = in_onnx(ours)
            check("ONNX Runtime", (runtime(x, t).sample - expected).abs().max().item(), 2e-5)
            candidates["ddpm_hf, ONNX Runtime"] = lambda: runtime(x, t)
        if compile:
            torch._dynamo.reset()  # torch stops compiling after eight networks
            fast_stock, fast_ours = torch.compile(stock), torch.compile(ours)
            check("compiled", (fast_ours(x, t).sample - expected).abs().max().item(), 2e-5)
            candidates |= {
                "diffusers, compiled": lambda: fast_stock(x, t),
                "ddpm_hf, compiled": lambda: fast_ours(x, t),
            }
        table(f"{name}, forward, batch {size}", candidates, flops(candidates["diffusers"]), peak, rounds)


def training_step(model: torch.nn.Module, predict: Callable[[], torch.Tensor], target: torch.Tensor, **options):
    """A function that takes one step of training; `options` are those of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)

    def step() -> None:
        F.mse_loss(predict(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training(name: str, peak: float, rounds: int, compile: bool) -> None:
    stock, ours = (model.train() for model in networks(name))
    x, t = batch(name, TRAINING[name])
    check(f"{name}, gradients", gradient_difference(ours, stock, x, t), 1e-4)
    if compile:
        torch._dynamo.reset()
        for who, model in {"diffusers": stock, "ddpm_hf": ours}.items():
            difference = gradient_difference(torch.compile(copy.deepcopy(model)), model, x, t)
            check(f"{who}, compiled gradients", difference, 1e-4, fatal=who == "ddpm_hf")

    candidates = {
        "diffusers": training_step(stock, lambda: stock(x, t).sample, x),
        "ddpm_hf": training_step(ours, lambda: ours(x, t).sample, x, fused=True),
    }
    if compile:
        for who, model, options in (("diffusers", stock, {}), ("ddpm_hf", ours, {"fused": True})):
            model = copy.deepcopy(model)
            run = torch.compile(model)
            candidates[f"{who}, compiled"] = training_step(model, lambda run=run: run(x, t).sample, x, **options)
    title = f"{name}, training step, batch {TRAINING[name]}"
    table(title, candidates, flops(candidates["diffusers"]), peak, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"of {list(NETWORKS)}; default: all")
    parser.add_argument(
        "--compile", action="store_true", help="time compiled networks too, which takes minutes for each network"
    )
    parser.add_argument("--onnx", action="store_true", help="time the network in ONNX Runtime too")
    parser.add_argument("--rounds", type=int, default=20, help="number of timed calls of each candidate")
    args = parser.parse_args()
    if unknown := set(args.networks) - set(NETWORKS):
        parser.error(f"unknown networks {sorted(unknown)}: networks must be of {list(NETWORKS)}")
    peak = peak_rate(torch.device("cpu"), torch.float32)
    print(f"{describe_machine()}; best convolution {peak / 1e9:.0f} GFLOP/s")
    for name in args.networks or NETWORKS:
        for size in FORWARD[name]:
            forward(name, size, peak, args.rounds, args.compile, args.onnx)
        training(name, peak, max(args.rounds // 2, 3), args.compile)


if __name__ == "__main__":
    main()
