"""How far a file of ONNX is from a pipeline's network."""

from ddpm_hf.export.onnx_files import compare, predictions


def errors(file, pipe, batches) -> tuple[float, float]:
    """The largest difference and the root mean square, relative to the predictions."""
    return compare(file, batches, [predictions(pipe.unet, inputs) for inputs in batches])
