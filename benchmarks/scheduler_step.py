"""The steps of this package's schedulers against those of diffusers: `python -m benchmarks.scheduler_step`

Time per step in a chain of 50 steps on a 16×3×32×32 batch, with int timesteps after `set_timesteps(50)`. First checks
that the samples agree. Both schedulers draw the same noise with `torch.randn`, which takes longer than the rest of the
step, so steps are timed once with this draw and once with noise that is passed in. DDIM draws none with η = 0.
"""

from functools import partial

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm

from benchmarks.harness import describe_machine, interleaved_medians, print_ratios
from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom

SHAPE, STEPS, ROUNDS = (16, 3, 32, 32), 50, 40


def chain(step, outputs: torch.Tensor, x: torch.Tensor, timesteps: list, seed: int | None = None, **options):
    """All steps of a chain, with given model outputs."""
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
        "noise alone (torch.randn)": lambda: [torch.randn(SHAPE) for _ in range(STEPS)],
    }
    medians = per_step(whole)
    print(describe_machine())
    print_ratios("one step, with drawing the noise", medians, "diffusers")
    noise_alone = medians["noise alone (torch.randn)"]
    print(f"  the limit, a step that only draws noise, is {medians['diffusers'] / noise_alone:.2f}×")

    # diffusers' step has no argument for noise, so its drawing function is replaced.
    scheduling_ddpm.randn_tensor = lambda *_, **__: noise
    expected = chain(stock.step, outputs, x, ints)
    for name, step in {"eager": ours.step, "compiled": compiled}.items():
        check(f"{name} samples, given noise", chain(step, outputs, x, ints, variance_noise=noise), expected)
    given = {
        "diffusers": lambda: run(stock.step, timesteps=ints),
        "ddpm_hf": lambda: run(ours.step, timesteps=ints, variance_noise=noise),
        "ddpm_hf, 0-d tensor timesteps": lambda: run(ours.step, timesteps=tensors, variance_noise=noise),
        "ddpm_hf, compiled": lambda: run(compiled, timesteps=ints, variance_noise=noise),
        "ddpm_hf, compiled, 0-d tensor timesteps": lambda: run(compiled, timesteps=tensors, variance_noise=noise),
    }
    print_ratios("one step, with given noise", per_step(given), "diffusers")
    compare_ddim(outputs, x, noise, run)


def compare_ddim(outputs: torch.Tensor, x: torch.Tensor, noise: torch.Tensor, run) -> None:
    stock, ours, ddpm = DDIMScheduler(), DDIMSchedulerCustom(), DDPMSchedulerCustom()
    for scheduler in (stock, ours, ddpm):
        scheduler.set_timesteps(STEPS)
    ints = ours.timesteps.tolist()
    check("DDIM samples", chain(ours.step, outputs, x, ints), chain(stock.step, outputs, x, ints))
    eta = {"eta": 0.5, "variance_noise": noise}
    check("DDIM samples, η = 0.5", *(chain(s.step, outputs, x, ints, **eta) for s in (ours, stock)))
    steps = {
        "diffusers, DDIM, η = 0": lambda: run(stock.step, timesteps=ints),
        "ddpm_hf, DDIM, η = 0": lambda: run(ours.step, timesteps=ints),
        "diffusers, DDIM, η = 0.5": lambda: run(stock.step, timesteps=ints, **eta),
        "ddpm_hf, DDIM, η = 0.5": lambda: run(ours.step, timesteps=ints, **eta),
        "ddpm_hf, DDPM": lambda: run(ddpm.step, timesteps=ints, variance_noise=noise),
    }
    print_ratios("one step of DDIM, with given noise", per_step(steps), "ddpm_hf, DDPM")


def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (got - expected).abs().max().item()
    if not difference < 1e-4:
        raise SystemExit(f"{what}: they differ by {difference:g}, so timing them is pointless")
    print(f"{what}: largest difference {difference:.1e}")


if __name__ == "__main__":
    main()
