"""Which of the backends samples faster on this machine."""

import itertools
import statistics
import time

from ddpm_hf.pipelines.ddpm import DDPMPipelineCustom

SECONDS = 1.0  # of measuring each


def faster_pipeline(pipe: DDPMPipelineCustom, model: str, batch_size: int, **options) -> tuple[DDPMPipelineCustom, str]:
    """`pipe`, or its model in ONNX Runtime if that needs less time for a step of so many images; and a sentence that says why.

    `options` are those of `pipe.denoise`. ONNX Runtime is for the CPU, and needs its file beside the model.
    """
    if pipe.device.type != "cpu":
        return pipe, "Backend: torch, because onnxruntime is for the CPU."
    try:
        other = DDPMPipelineCustom.from_pretrained(model, backend="onnxruntime", scheduler=pipe.scheduler)
    except (OSError, ValueError, ImportError) as error:
        return pipe, f"Backend: torch, because there is no other: {error}"
    pipes = {"torch": pipe, "onnxruntime": other}
    seconds = {name: seconds_per_step(each, batch_size, **options) for name, each in pipes.items()}
    best = min(seconds, key=seconds.get)
    measured = ", ".join(f"{name} {1000 * value:.3g} ms" for name, value in seconds.items())
    return pipes[best], f"Backend: {best} (a step of {batch_size} images: {measured})."


def seconds_per_step(pipe: DDPMPipelineCustom, batch_size: int, seconds: float = SECONDS, **options) -> float:
    """Median seconds of a sampling step, measured for so long, after a first step."""
    chains = (pipe.denoise(batch_size, seed=0, **options) for _ in itertools.count())
    steps, times = itertools.chain.from_iterable(chains), []
    next(steps)
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
