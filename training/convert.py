"""Convert a checkpoint of another repository into a pipeline folder, for this package and for diffusers:

    ddpm-convert --source pytorch-ddpm --checkpoint ckpt.pt --resolution 32 --output_dir outputs/converted

In a clone, `python training/convert.py` is the same command. Nothing but tensors is read from the checkpoint.
"""

import sys

from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.training.option_parser import OptionParser


def main(arguments: list[str] | None = None) -> None:
    try:
        options = OptionParser(ConvertOptions, __doc__.splitlines()[0]).parse(arguments)
        from ddpm_hf.convert.pipeline import convert  # after the options: it imports torch

        pipe = convert(options)
        pipe.save_pretrained(options.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: error: {error}")
    print(f"The pipeline, {pipe.unet.num_parameters():,} parameters, is in {options.output_dir}/")
    print(f"  sample:    python training/sample.py --model {options.output_dir} --num_images 16")
    print(f"  fine-tune: python training/train.py --init_from {options.output_dir} --dataset <folder>")


if __name__ == "__main__":
    main()
