"""The CIFAR-10 network of DDPM as other repositories wrote it, against this package's and diffusers': `python -m
benchmarks.peers --improved_diffusion path/to/improved-diffusion --pytorch_ddpm path/to/pytorch-ddpm`

Each path is a clone of openai/improved-diffusion or w86763777/pytorch-ddpm. The three networks of a comparison have the
same weights, converted by `ddpm_hf.convert`. First checks that their outputs agree, then times a forward pass and a
training step (forward, backward, AdamW) of each.
"""

import copy
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers.hf_argparser import HfArg, HfArgumentParser

from benchmarks.harness import describe_machine, interleaved_medians, print_ratios
from benchmarks.unet import check, in_onnx, training_step
from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.convert.pipeline import convert


@dataclass
class PeerArguments:
    improved_diffusion: str | None = HfArg(default=None, help="folder of a clone of openai/improved-diffusion")
    pytorch_ddpm: str | None = HfArg(default=None, help="folder of a clone of w86763777/pytorch-ddpm")
    batch_sizes: list[int] = HfArg(default_factory=lambda: [1, 4], help="images of a forward pass")
    rounds: int = HfArg(default=10, help="number of timed calls of each candidate")
    onnx: bool = HfArg(default=False, help="time the network in ONNX Runtime too")


def load(name: str, file: Path) -> ModuleType:
    """A module of a clone, or a package if the file is its __init__.py."""
    spec = importlib.util.spec_from_file_location(name, file)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def improved_diffusion(folder: str) -> nn.Module:
    load("improved_diffusion", Path(folder, "improved_diffusion", "__init__.py"))
    unet = importlib.import_module("improved_diffusion.unet")
    shape = {"in_channels": 3, "model_channels": 128, "out_channels": 3, "num_res_blocks": 2, "num_heads": 1}
    return unet.UNetModel(**shape, attention_resolutions=(2,), channel_mult=(1, 2, 2, 2))


def pytorch_ddpm(folder: str) -> nn.Module:
    model = load("pytorch_ddpm_model", Path(folder, "model.py"))
    return model.UNet(T=1000, ch=128, ch_mult=[1, 2, 2, 2], attn=[1], num_res_blocks=2, dropout=0.0)


PEERS = {"improved-diffusion": (improved_diffusion, {"num_heads": 1}), "pytorch-ddpm": (pytorch_ddpm, {})}


def compare(name: str, folder: str, args: PeerArguments) -> None:
    build, options = PEERS[name]
    torch.manual_seed(0)
    peer = build(folder).eval()
    for weight in peer.parameters():
        if not weight.any():  # layers that begin at 0 would hide a difference
            nn.init.normal_(weight, std=0.02)
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(peer.state_dict(), f"{scratch}/weights.pt")
        given = {"checkpoint": f"{scratch}/weights.pt", "source": name, "output_dir": scratch, "resolution": 32}
        pipe = convert(ConvertOptions(**given, **options))
    ours, stock = pipe.unet.eval(), copy.deepcopy(pipe.to_diffusers().unet).eval()  # which shares its weights
    stock = stock.to(memory_format=torch.contiguous_format)
    networks = {name: peer, "diffusers": lambda x, t: stock(x, t).sample, "ddpm_hf": lambda x, t: ours(x, t).sample}
    runtimes = {}
    if args.onnx:
        runtime = in_onnx(ours)
        runtimes["ddpm_hf, ONNX Runtime"] = lambda x, t: runtime(x, t).sample
    for size in args.batch_sizes:
        x, t = torch.randn(size, 3, 32, 32), torch.randint(0, 1000, (size,))
        candidates = {who: partial(network, x, t) for who, network in (networks | runtimes).items()}
        with torch.no_grad():
            expected = candidates[name]()
            for who in list(candidates)[1:]:
                check(who, (candidates[who]() - expected).abs().max().item(), 2e-5 * expected.abs().max().item())
            print_ratios(f"forward, batch {size}", interleaved_medians(candidates, args.rounds), name)
    x, t = torch.randn(4, 3, 32, 32), torch.randint(0, 1000, (4,))
    steps = {
        who: training_step(model.train(), partial(networks[who], x, t), x, fused=who == "ddpm_hf")
        for who, model in {name: peer, "diffusers": stock, "ddpm_hf": ours}.items()
    }
    print_ratios("training step, batch 4", interleaved_medians(steps, args.rounds), name)


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(PeerArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    folders = {"improved-diffusion": args.improved_diffusion, "pytorch-ddpm": args.pytorch_ddpm}
    if not any(folders.values()):
        parser.error("give the folder of a clone: --improved_diffusion or --pytorch_ddpm")
    print(describe_machine())
    for name, folder in folders.items():
        if folder is not None:
            print(f"\n{name}")
            compare(name, folder, args)


if __name__ == "__main__":
    main(sys.argv[1:])
