"""Defects of diffusers' DDPMScheduler that DDPMSchedulerCustom does not have.

A case takes a scheduler class and fails if it has the defect. Every case must fail on stock with the exception it names,
and pass on DDPMSchedulerCustom. A case that passes on stock was fixed in diffusers and can be deleted.
"""

import logging
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_hf import DDPMSchedulerCustom

CASES = []


def defect(*failures: type[Exception]) -> Callable:
    """Mark a case. `failures` are the exceptions that stock raises, by default AssertionError."""

    def mark(case: Callable) -> Callable:
        CASES.append(pytest.param(case, failures or (AssertionError,), id=case.__name__))
        return case

    return mark


@pytest.mark.parametrize(("case", "failures"), CASES)
def test_defect_of_stock_is_absent_here(case, failures):
    with pytest.raises(failures):
        case(DDPMScheduler)
    case(DDPMSchedulerCustom)


def refuses(error: type[Exception], call: Callable, *args, **kwargs) -> None:
    """Assert that a call raises `error`: both accepting the arguments and any other exception are defects."""
    try:
        call(*args, **kwargs)
    except error:
        return
    except Exception as other:
        raise AssertionError(f"raised {other!r}") from other
    raise AssertionError("accepted")


def warns(call: Callable) -> None:
    """Assert that a call logs a warning."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    loggers = [logging.getLogger(name) for name in ("diffusers", "ddpm_hf")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        call()
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert records, "no warning"


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


IMAGE = (2, 3, 8, 8)


# ---------------------------------------------------------------------- tables


def cosine_betas(T: int) -> list[float]:
    """1 − cos²b/cos²a without cancellation, in angles from π/2."""
    angles = [(T - i) / T / 1.008 * math.pi / 2 for i in range(T + 1)]
    return [min(math.sin(a - b) * math.sin(a + b) / math.sin(a) ** 2, 0.999) for a, b in zip(angles[:-1], angles[1:])]


def linear_betas(T: int) -> list[float]:
    return [1e-4 + (0.02 - 1e-4) * i / (T - 1) for i in range(T)]


def worst_error_of_the_noise(cls, T: int, beta_schedule: str, betas: list[float]) -> float:
    """The largest relative error of the β̃_t in `step`, which gives √β̃_t·z for x_t = x_0 = 0."""
    scheduler = cls(T, beta_schedule=beta_schedule, prediction_type="sample")
    zero, worst, log_prev = torch.zeros(1, 1, 1, 1), 0.0, math.log1p(-betas[0])
    z = torch.randn(zero.shape, generator=seeded()).item()
    for t in range(1, T):
        log_bar = log_prev + math.log1p(-betas[t])
        exact = math.expm1(log_prev) / math.expm1(log_bar) * betas[t]
        if t < 50 or t % (T // 50) == 0:
            used = scheduler.step(zero, t, zero, generator=seeded()).prev_sample.item() / z
            worst = max(worst, abs(used**2 / exact - 1))
        log_prev = log_bar
    return worst


@defect()
def posterior_variance_has_float32_precision_linear(cls):
    assert worst_error_of_the_noise(cls, 1000, "linear", linear_betas(1000)) < 1e-6


@defect()
def posterior_variance_has_float32_precision_cosine(cls):
    assert worst_error_of_the_noise(cls, 1000, "squaredcos_cap_v2", cosine_betas(1000)) < 1e-6


@defect()
def posterior_variance_has_float32_precision_at_ten_thousand_steps(cls):
    assert worst_error_of_the_noise(cls, 10000, "linear", linear_betas(10000)) < 1e-6


@defect()
def the_first_noise_level_has_float32_precision(cls):
    one = torch.ones(1, 1, 1, 1)
    noised = cls().add_noise(torch.zeros_like(one), one, torch.tensor([0]))
    assert noised.item() ** 2 == pytest.approx(1e-4, rel=1e-6)


def noise_in_bfloat16(cls, beta_schedule: str, betas: list[float]) -> list[float]:
    scheduler, T = cls(beta_schedule=beta_schedule), 1000
    one = torch.ones(T, 1, 1, 1, dtype=torch.bfloat16)
    noised = scheduler.add_noise(torch.zeros_like(one), one, torch.arange(T)).flatten().tolist()
    log_bar, errors = 0.0, []
    for beta, value in zip(betas, noised):
        log_bar += math.log1p(-beta)
        errors.append(abs(value / math.sqrt(-math.expm1(log_bar)) - 1))
    return errors


@defect()
def noising_in_bfloat16_adds_noise_from_the_first_step(cls):
    assert max(noise_in_bfloat16(cls, "linear", linear_betas(1000))[:10]) < 2**-7


@defect()
def noising_in_bfloat16_is_correct_up_to_rounding_linear(cls):
    assert max(noise_in_bfloat16(cls, "linear", linear_betas(1000))) < 2**-7


@defect()
def noising_in_bfloat16_is_correct_up_to_rounding_cosine(cls):
    assert max(noise_in_bfloat16(cls, "squaredcos_cap_v2", cosine_betas(1000))) < 2**-7


# ---------------------------------------------------------------------- variances and chains


@defect()
def fixed_large_log_gives_no_nan(cls):
    x = torch.randn(IMAGE, generator=seeded())
    for t in (1, 500, 999):
        assert bool(cls(variance_type="fixed_large_log").step(x, t, x).prev_sample.isfinite().all())


@defect()
def trailing_spacing_gives_the_requested_number_of_steps(cls):
    scheduler = cls(timestep_spacing="trailing")
    wrong = []
    for n in range(1, 1001):
        scheduler.set_timesteps(n)
        if len(scheduler.timesteps) != n or scheduler.timesteps[-1] < 0:
            wrong.append(n)
    assert not wrong


def spread_of_samples(cls, steps: int, **arguments) -> float:
    """Standard deviation of samples of the optimal denoiser of N(0.6, 0.2²)."""
    scheduler = cls(timestep_spacing="trailing", prediction_type="sample", clip_sample=False, **arguments)
    scheduler.set_timesteps(steps)
    bars = torch.tensor([1 - b for b in linear_betas(1000)], dtype=torch.float64).cumprod(0).tolist()
    generator = seeded()
    x = torch.randn(1, 1, 1, 10_000, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        bar = bars[int(t)]
        x_0 = 0.6 + math.sqrt(bar) * 0.04 / (bar * 0.04 + 1 - bar) * (x - math.sqrt(bar) * 0.6)
        x = scheduler.step(x_0, t, x, generator=generator).prev_sample
    return x.std().item()


@defect()
def sixty_one_trailing_steps_have_the_spread_of_sixty(cls):
    around = [spread_of_samples(cls, n) for n in (60, 61, 62)]
    assert around[1] == pytest.approx((around[0] + around[2]) / 2, rel=0.05)


@defect()
def an_offset_cannot_leave_the_chain(cls):
    refuses(ValueError, cls(steps_offset=1).set_timesteps, 1000)


@defect()
def starting_from_a_partly_noised_image_logs_a_warning(cls):
    warns(lambda: cls().set_timesteps(600))


@defect()
def the_last_step_of_fixed_large_adds_no_noise(cls):
    scheduler = cls(variance_type="fixed_large", timestep_spacing="trailing", prediction_type="sample")
    scheduler.set_timesteps(10)
    last = scheduler.timesteps[-1]
    assert last > 0
    x_0 = torch.zeros(IMAGE)
    assert scheduler.step(x_0, last, torch.zeros(IMAGE)).prev_sample.std() < 1e-6


@defect(AssertionError, IndexError)
def step_works_at_every_timestep_after_set_timesteps(cls):
    scheduler, fresh = cls(), cls()
    scheduler.set_timesteps(10)
    x = torch.randn(IMAGE, generator=seeded())
    ours = scheduler.step(x, 555, x, generator=seeded()).prev_sample
    assert torch.equal(ours, fresh.step(x, 555, x, generator=seeded()).prev_sample)


# ---------------------------------------------------------------------- compilation, devices, batches


@defect(torch._dynamo.exc.Unsupported)
def step_compiles_to_one_graph(cls):
    torch._dynamo.reset()
    scheduler = cls()
    scheduler.set_timesteps(50)
    x = torch.zeros(IMAGE)
    torch.compile(scheduler.step, fullgraph=True, backend="eager")(x, scheduler.timesteps[3], x)


# On the meta device, where tensors have no values, every read raises: it detects synchronization on any device.
@defect(RuntimeError, NotImplementedError)
def step_reads_nothing_back_from_the_device(cls):
    scheduler = cls()
    scheduler.set_timesteps(50, device="meta")
    x = torch.empty(IMAGE, device="meta")
    assert scheduler.step(x, scheduler.timesteps[3], x).prev_sample.shape == x.shape


@defect(RuntimeError, IndexError)
def step_accepts_a_timestep_per_sample(cls):
    scheduler = cls()
    scheduler.set_timesteps(50)
    x = torch.randn(IMAGE, generator=seeded())
    both = scheduler.step(x, torch.tensor([980, 0]), x)
    alone = scheduler.step(x[1:], 0, x[1:])
    torch.testing.assert_close(both.prev_sample[1:], alone.prev_sample)


@defect()
def a_list_of_generators_longer_than_the_batch_is_refused(cls):
    x = torch.zeros(IMAGE)
    refuses(ValueError, cls().step, x, 500, x, generator=[seeded() for _ in range(3)])


@defect()
def a_list_of_one_generator_is_refused_for_a_batch(cls):
    x = torch.zeros(IMAGE)
    refuses(ValueError, cls().step, x, 500, x, generator=[seeded()])


@defect(RuntimeError)
def dynamic_thresholding_accepts_large_images(cls):
    scheduler = cls(thresholding=True, prediction_type="sample")
    x = torch.randn(1, 1, 4200, 4200, generator=seeded())
    assert scheduler.step(x, 500, x).pred_original_sample.abs().max() <= 1


# ---------------------------------------------------------------------- arguments


@defect()
def a_short_chain_that_does_not_end_in_noise_logs_a_warning(cls):
    warns(lambda: cls(num_train_timesteps=100))


@defect()
def trained_betas_of_another_length_are_refused(cls):
    refuses(ValueError, cls, num_train_timesteps=1000, trained_betas=[0.1] * 10)


@defect()
def a_misspelled_variance_type_is_refused(cls):
    refuses(ValueError, cls, variance_type="fixed_smal")


@defect()
def a_misspelled_prediction_type_is_refused_at_once(cls):
    refuses(ValueError, cls, prediction_type="eps")


@defect()
def a_misspelled_spacing_is_refused_at_once(cls):
    refuses(ValueError, cls, timestep_spacing="trailling")


@defect()
def epsilon_prediction_at_zero_terminal_snr_is_refused(cls):
    """Zero terminal SNR: stock's first step divides by √ᾱ_T = 0."""
    refuses(ValueError, cls, rescale_betas_zero_snr=True)


@defect()
def negative_timesteps_do_not_wrap_in_add_noise(cls):
    x = torch.zeros(IMAGE)
    refuses(ValueError, cls().add_noise, x, x, torch.tensor([-1, 5]))


@defect()
def negative_timesteps_do_not_wrap_in_get_velocity(cls):
    x = torch.zeros(IMAGE)
    refuses(ValueError, cls().get_velocity, x, x, torch.tensor([-1, 5]))


@defect()
def negative_timesteps_do_not_wrap_in_step(cls):
    x = torch.zeros(IMAGE)
    refuses(ValueError, cls().step, x, -1, x)


@defect()
def negative_timesteps_are_refused_by_set_timesteps(cls):
    refuses(ValueError, cls().set_timesteps, timesteps=[5, -3])


@defect()
def fractional_timesteps_are_refused_by_set_timesteps(cls):
    """Stock truncates them: both are 5."""
    refuses(ValueError, cls().set_timesteps, timesteps=[5.7, 5.2])


@defect()
def from_config_keeps_arguments_given_by_position(cls):
    config = cls(300, 3e-4, 0.05, "scaled_linear").config
    assert cls.from_config(config).config.num_train_timesteps == 300


@defect()
def uint8_images_are_refused(cls):
    """Stock converts the noise to uint8, which makes it 0."""
    pixels = torch.full(IMAGE, 100, dtype=torch.uint8)
    refuses(TypeError, cls().add_noise, pixels, torch.randn(IMAGE), torch.tensor([500, 500]))
