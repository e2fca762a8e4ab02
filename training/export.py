"""Write a trained model for other runtimes: `ddpm-export outputs/mnist --variants fp16 int8`.

onnx/model.onnx in the model's folder has the network, its guidance, and what a program needs to sample with it. Each file is
compared with PyTorch before it is written. In a clone, `python training/export.py` is the same command. It needs
`pip install ddpm_hf[export]`.
"""

import sys
from pathlib import Path

from ddpm_hf.export.options import ExportOptions
from ddpm_hf.files import check_output_folder
from ddpm_hf.training.option_parser import OptionParser


def calibration(options: ExportOptions, pipe) -> dict:
    """The images that calibrate int8, with their labels, as arguments of `export_onnx`; samples of the model are its own matter."""
    if options.dataset is None:
        return {"num_images": options.calibration_images}
    from ddpm_hf.evaluation.bounds import load_batch
    from ddpm_hf.evaluation.measures import open_images, random_indices
    from ddpm_hf.training.artifacts import run_folder
    from ddpm_hf.training.config_file import read_run

    run = read_run(run_folder(options.model))
    images = open_images(options, pipe.unet.config, run, options.split)
    chosen = random_indices(images, 0, "calibration")[: options.calibration_images]
    x_0, labels = load_batch(images, chosen, "cpu")
    return {"images": x_0, "labels": labels}


def export(options: ExportOptions) -> None:
    from ddpm_hf import DDPMPipelineCustom
    from ddpm_hf.export.onnx_files import export_onnx, export_program
    from ddpm_hf.models.onnx_unet import ONNX_FOLDER

    folder = Path(options.output_dir or options.model)
    check_output_folder("output_dir", folder, ["model.pt2"], [ONNX_FOLDER])
    pipe = DDPMPipelineCustom.from_pretrained(options.model)
    if options.format == "torch":
        print(f"Written: {export_program(pipe, folder)}")
        return
    written = export_onnx(pipe, folder, options.variants or (), **calibration(options, pipe))
    print(f"{'file':40s} {'MB':>6s}   difference from PyTorch: largest, root mean square")
    for file in written:
        megabytes = file.path.stat().st_size / 1e6
        print(f"{file.path!s:40s} {megabytes:6.2f}   {file.largest_difference:.1e}   {file.relative_error:.1e}")


def main(arguments: list[str] | None = None) -> None:
    try:
        export(OptionParser(ExportOptions, __doc__.splitlines()[0]).parse_model_first(arguments))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"export.py: error: {error}")


if __name__ == "__main__":
    main()
