"""Sample images from a trained model: `python training/sample.py --model outputs/digits --num_images 64`.

Writes one PNG per image, named by its index. Image i of a seed is the same however many are made at once, so that
running it again with a larger `--num_images` goes on where the last run ended.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from finish import SAMPLE_BATCH, sample
from transformers import HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.checkpoints import write_whole
from ddpm_hf.plots import png_bytes


@dataclass
class SampleArguments:
    model: str = field(metadata={"help": "a folder, or a repository on the Hub"})
    num_images: int = 64
    steps: int | None = field(default=None, metadata={"help": "sampling steps; None: the model's own T"})
    seed: int = 0
    output_dir: str | None = field(default=None, metadata={"help": "where to write; None: samples/ under the model"})
    device: str | None = field(default=None, metadata={"help": "None: a GPU if there is one"})


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(SampleArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        if args.num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {args.num_images}.")
        pipe = DDPMPipelineCustom.from_pretrained(args.model)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: error: {error}")
    pipe.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.output_dir is None and not Path(args.model).is_dir():
        args.output_dir = "samples"
    folder = Path(args.output_dir or Path(args.model) / "samples")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"seed{args.seed}-{i:06d}.png" for i in range(args.num_images)]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    for start in range(0, len(missing), SAMPLE_BATCH):
        indices = missing[start : start + SAMPLE_BATCH]
        for i, image in zip(indices, sample(pipe, indices, args.steps, args.seed)):
            write_whole(files[i], png_bytes(image))
    print(f"{len(missing)} images written to {folder}/ ({args.num_images - len(missing)} were there).")


if __name__ == "__main__":
    main()
