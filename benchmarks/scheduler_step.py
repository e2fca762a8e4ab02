"""`DDPMSchedulerCustom.step` against `diffusers.DDPMScheduler.step`: `python benchmarks/scheduler_step.py`

A whole chain of 50 steps on a 16×3×32×32 batch, int timesteps; per step. The samples are compared first.
"""

import torch
from diffusers import DDPMScheduler
from harness import describe_machine, interleaved_medians, print_ratios

from ddpm_hf import DDPMSchedulerCustom

SHAPE, STEPS = (16, 3, 32, 32), 50


def chain(scheduler, step, outputs: torch.Tensor, x: torch.Tensor, timesteps: list[int], seed: int | None = None):
    """All steps of a chain, the model's outputs being given."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for output, t in zip(outputs, timesteps):
        x = step(output, t, x, generator=generator, return_dict=False)[0]
    return x


def main() -> None:
    torch.manual_seed(0)
    outputs, x = torch.randn(STEPS, *SHAPE), torch.randn(SHAPE)
    stock, ours = DDPMScheduler(), DDPMSchedulerCustom()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(STEPS)
    timesteps = ours.timesteps.tolist()
    expected, got = (chain(s, s.step, outputs, x, timesteps, seed=0) for s in (stock, ours))
    difference = (expected - got).abs().max().item()
    if not difference < 1e-4:
        raise SystemExit(f"the samples differ by {difference:g}: nothing to time")
    print(f"{describe_machine()}; largest difference of the samples {difference:.1e}")

    compiled = torch.compile(ours.step, fullgraph=True)
    tensors = list(ours.timesteps)
    candidates = {
        "diffusers": lambda: chain(stock, stock.step, outputs, x, timesteps),
        "ddpm_hf": lambda: chain(ours, ours.step, outputs, x, timesteps),
        "ddpm_hf, 0-d tensor timesteps": lambda: chain(ours, ours.step, outputs, x, tensors),
        "ddpm_hf, compiled, 0-d tensor timesteps": lambda: chain(ours, compiled, outputs, x, tensors),
        "the noise alone (torch.randn)": lambda: [torch.randn(SHAPE) for _ in range(STEPS)],
    }
    medians = interleaved_medians(candidates, rounds=30)
    print_ratios("one step", {name: seconds / STEPS for name, seconds in medians.items()}, "diffusers")


if __name__ == "__main__":
    main()
