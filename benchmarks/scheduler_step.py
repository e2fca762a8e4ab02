"""`DDPMSchedulerCustom.step` against `diffusers.DDPMScheduler.step`: `python -m benchmarks.scheduler_step`

A whole chain of 50 steps on a 16×3×32×32 batch, int timesteps after `set_timesteps(50)`; per step. The samples are
compared first. Both draw the same noise by the same `torch.randn`, which takes longer than all the rest of a step: so
the steps are timed whole, and once more with the noise given to both.
"""

from functools import partial

import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from benchmarks.harness import describe_machine, interleaved_medians, print_ratios
from ddpm_hf import DDPMSchedulerCustom

SHAPE, STEPS, ROUNDS = (16, 3, 32, 32), 50, 40


def chain(step, outputs: torch.Tensor, x: torch.Tensor, timesteps: list, seed: int | None = None, **options):
    """All steps of a chain, the model's outputs being given."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for output, t in zip(outputs, timesteps):
        x = step(output, t, x, generator=generator, return_dict=False, **options)[0]
    return x


def per_step(candidates: dict) -> dict[str, float]:
    return {name: seconds / STEPS for name, seconds in interleaved_medians(candidates, ROUNDS).items()}


def main() -> None:
    torch.manual_seed(0)
    outputs, x, noise = torch.randn(STEPS, *SHAPE), torch.randn(SHAPE), torch.randn(SHAPE)
    stock, ours = DDPMScheduler(), DDPMSchedulerCustom()
    for scheduler in (stock, ours):
        scheduler.set_timesteps(STEPS)
    ints = ours.timesteps.tolist()
    tensors = list(ours.timesteps)
    compiled = torch.compile(ours.step, fullgraph=True)
    expected = chain(stock.step, outputs, x, ints, seed=0)
    check("samples", chain(ours.step, outputs, x, ints, seed=0), expected)

    run = partial(chain, outputs=outputs, x=x)
    whole = {
        "diffusers": lambda: run(stock.step, timesteps=ints),
        "ddpm_hf": lambda: run(ours.step, timesteps=ints),
        "ddpm_hf, 0-d tensor timesteps": lambda: run(ours.step, timesteps=tensors),
        "the noise alone (torch.randn)": lambda: [torch.randn(SHAPE) for _ in range(STEPS)],
    }
    medians = per_step(whole)
    print(describe_machine())
    print_ratios("one step, noise drawn in it", medians, "diffusers")
    noise_alone = medians["the noise alone (torch.randn)"]
    print(f"  with a step of no cost but the noise it would be {medians['diffusers'] / noise_alone:.2f}×")

    # diffusers' step takes no noise, so that it is handed to it where it draws it.
    scheduling_ddpm.randn_tensor = lambda *_, **__: noise
    expected = chain(stock.step, outputs, x, ints)
    for name, step in {"eager": ours.step, "compiled": compiled}.items():
        check(f"{name} samples, noise given", chain(step, outputs, x, ints, variance_noise=noise), expected)
    given = {
        "diffusers": lambda: run(stock.step, timesteps=ints),
        "ddpm_hf": lambda: run(ours.step, timesteps=ints, variance_noise=noise),
        "ddpm_hf, 0-d tensor timesteps": lambda: run(ours.step, timesteps=tensors, variance_noise=noise),
        "ddpm_hf, compiled": lambda: run(compiled, timesteps=ints, variance_noise=noise),
        "ddpm_hf, compiled, 0-d tensor timesteps": lambda: run(compiled, timesteps=tensors, variance_noise=noise),
    }
    print_ratios("one step, noise given", per_step(given), "diffusers")


def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (got - expected).abs().max().item()
    if not difference < 1e-4:
        raise SystemExit(f"{what}: they differ by {difference:g}: nothing to time")
    print(f"{what}: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
