"""Progressive distillation against its paper's equations, and against the exact student of Gaussian data."""

import copy

import pytest
import torch

from ddpm_hf import DDIMSchedulerCustom, DDPMSchedulerCustom
from ddpm_hf.diffusion.distillation import DistillationObjective
from ddpm_hf.diffusion.timesteps import spaced_timesteps

MEAN, STD = 0.3, 0.2
each_target = pytest.mark.parametrize("target", ["sample", "v_prediction"])


def chain(T=1000, target="v_prediction", **options):
    return DDPMSchedulerCustom(T, beta_schedule="squaredcos_cap_v2", prediction_type=target, **options).diffusion


class Network(torch.nn.Module):
    """Predicts what a function of (x_t, t) says of x_0, in the terms of the chain."""

    def __init__(self, diffusion, x_0):
        super().__init__()
        self.diffusion, self.x_0 = diffusion, x_0

    def forward(self, x_t, t, class_labels=None, return_dict=False):
        return (self.diffusion.convert(self.x_0(x_t, t), x_t, t, "sample", self.diffusion.prediction_type),)


def gaussian_teacher(diffusion):
    """E[x_0 | x_t] for pixels N(MEAN, STD²)."""

    def x_0(x_t, t):
        bar = diffusion.alphas_cumprod[t][:, None, None, None]
        return MEAN + bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar) * (x_t - bar.sqrt() * MEAN)

    return Network(diffusion, x_0)


def any_teacher(diffusion):
    """A teacher without a form that an error could hide in."""
    return Network(diffusion, lambda x_t, t: (3 * x_t + t[:, None, None, None] / 100).sin() + x_t.roll(1, -1) / 2)


def two_steps(teacher, diffusion, x_t, times):
    """x_t'' after two steps of DDIM from times[0] by times[1] to times[2], of which None is the image (eq. 12 of DDIM)."""
    for now, then in zip(times, times[1:]):
        t = torch.full((len(x_t),), now)
        bar, bar_then = (
            diffusion.alphas_cumprod[now],
            diffusion.alphas_cumprod[then] if then is not None else torch.ones(()),
        )
        x_0 = diffusion.predict_x_0(teacher(x_t, t)[0], x_t, t)
        noise = (x_t - bar.sqrt() * x_0) / (1 - bar).sqrt()
        x_t = bar_then.sqrt() * x_0 + (1 - bar_then).sqrt() * noise
    return x_t


@each_target
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("options", [{}, {"rescale_betas_zero_snr": True}], ids=["cosine", "zero terminal SNR"])
def test_one_step_towards_the_target_is_two_of_the_teacher(steps, target, options):
    diffusion = chain(100, target, **options)
    teacher = any_teacher(diffusion)
    objective = DistillationObjective(teacher, diffusion, steps)
    times = [*spaced_timesteps(100, 2 * steps, "trailing").tolist(), None]
    for i in {0, 1, steps // 2, steps - 1} & set(range(steps)):  # in the order of sampling
        x_t = torch.randn(3, 1, 4, 4, dtype=torch.float64)
        found = objective.target(x_t, torch.full((3,), steps - 1 - i))
        expected = two_steps(teacher, diffusion, x_t, times[2 * i : 2 * i + 3])
        reached = two_steps(
            Network(diffusion, lambda x_t, t, found=found: found), diffusion, x_t, times[2 * i : 2 * i + 3 : 2]
        )
        torch.testing.assert_close(reached, expected, rtol=1e-9, atol=1e-9)


def exact_student(diffusion, steps):
    """The coefficients (a, b) of x̃ = a·x_t + b at each timestep of the student, for Gaussian data: two steps of an affine
    map are one."""
    times, found = [*spaced_timesteps(len(diffusion), 2 * steps, "trailing").tolist(), None], {}
    for start, middle, end in zip(times[::2], times[1::2], times[2::2]):
        slope, offset = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        ends = [diffusion.alphas_cumprod[t] if t is not None else torch.ones(()).double() for t in (start, middle, end)]
        for bar, then in zip(ends, ends[1:]):
            gain = bar.sqrt() * STD**2 / (bar * STD**2 + 1 - bar)  # x̂ = MEAN + gain·(x − √ᾱ·MEAN)
            ratio = ((1 - then) / (1 - bar)).sqrt()
            change = then.sqrt() - ratio * bar.sqrt()  # of x̂ in x_then; that of x is `ratio`
            slope, offset = (
                (ratio + change * gain) * slope,
                (ratio + change * gain) * offset + change * (1 - gain * bar.sqrt()) * MEAN,
            )
        bar, then = ends[0], ends[2]
        ratio = ((1 - then) / (1 - bar)).sqrt()
        scale = then.sqrt() - ratio * bar.sqrt()
        found[start] = ((slope - ratio) / scale, offset / scale)
    return found


class Affine(torch.nn.Module):
    """x̂ = a_t·x_t + b_t, with one pair of parameters for each timestep."""

    def __init__(self, diffusion, coefficients):
        super().__init__()
        self.diffusion, self.rows = diffusion, {t: i for i, t in enumerate(coefficients)}
        self.parameters_of = torch.nn.Parameter(torch.tensor(list(coefficients.values()), dtype=torch.float64))

    def forward(self, x_t, t, class_labels=None, return_dict=False):
        rows = self.parameters_of[[self.rows[int(i)] for i in t]][:, :, None, None, None]
        x_0 = rows[:, 0] * x_t + rows[:, 1]
        return (self.diffusion.convert(x_0, x_t, t, "sample", self.diffusion.prediction_type),)


def losses_of(student, objective, diffusion):
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 400, 1, 2, 2, generator=generator, dtype=torch.float64).unbind()
    t = torch.arange(400) * len(diffusion) // 400
    return objective(student, diffusion, MEAN + STD * x_0, t, noise)


@each_target
@pytest.mark.parametrize("steps", [2, 8])
def test_the_exact_student_of_gaussian_data_is_the_minimum(steps, target):
    diffusion = chain(target=target)
    objective = DistillationObjective(gaussian_teacher(diffusion), diffusion, steps)
    student = Affine(diffusion, exact_student(diffusion, steps))
    losses = losses_of(student, objective, diffusion)
    losses.objective.mean().backward()
    assert losses.objective.max() < 1e-20 and losses.simple.max() < 1e-20
    assert student.parameters_of.grad.abs().max() < 1e-9
    for change in torch.randn(5, *student.parameters_of.shape, dtype=torch.float64):
        other = copy.deepcopy(student)
        other.parameters_of.data += 1e-3 * change
        assert losses_of(other, objective, diffusion).objective.mean() > 1e-9


def test_training_finds_the_exact_student_of_two_steps():
    diffusion = chain()
    objective, exact = DistillationObjective(gaussian_teacher(diffusion), diffusion, 2), exact_student(diffusion, 2)
    student = Affine(diffusion, {t: (0.0, 0.0) for t in exact})
    optimizer = torch.optim.LBFGS(student.parameters(), line_search_fn="strong_wolfe", max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = losses_of(student, objective, diffusion).objective.mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor(list(exact.values()), dtype=torch.float64)
    torch.testing.assert_close(student.parameters_of.data, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_n_steps_of_the_student_end_where_2n_of_the_teacher_do(steps):
    scheduler = DDIMSchedulerCustom(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    diffusion = scheduler.diffusion
    student = Affine(diffusion, exact_student(diffusion, steps))
    ends, start = [], torch.randn(8, 1, 2, 2, dtype=torch.float64)
    for network, n in ((gaussian_teacher(diffusion), 2 * steps), (student, steps)):
        scheduler.set_timesteps(n)
        x = start
        for t in scheduler.timesteps:
            with torch.no_grad():
                x = scheduler.step(network(x, t.expand(len(x)))[0], t, x).prev_sample
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@each_target
def test_an_error_d_in_x_0_costs_the_truncated_snr_times_d_squared(target):
    diffusion = chain(target=target)
    objective = DistillationObjective(any_teacher(diffusion), diffusion, 20)
    x_0, noise = torch.randn(2, 20, 1, 2, 2, dtype=torch.float64).unbind()
    t = torch.arange(20) * 50
    index = spaced_timesteps(1000, 20, "trailing").flip(0)
    x_t = diffusion.q_sample(x_0, index, noise)
    found = objective.target(x_t, torch.arange(20))
    loss = objective(Network(diffusion, lambda x_t, t: found + 0.1), diffusion, x_0, t, noise)
    snr = diffusion.alphas_cumprod[index] / (1 - diffusion.alphas_cumprod[index])
    torch.testing.assert_close(loss.objective, 0.01 * snr.clamp(min=1), rtol=1e-6, atol=0)
    # In the network's own terms: ‖Δv‖² = (1 + SNR)·‖Δx_0‖².
    own = 0.01 * (1 + snr) if target == "v_prediction" else torch.full_like(snr, 0.01)
    torch.testing.assert_close(loss.simple, own, rtol=1e-6, atol=0)


def test_each_step_of_the_student_gets_its_share_of_timesteps():
    diffusion = chain()
    seen = []

    def x_0(x_t, t):
        seen.append(t)
        return x_t

    for steps in (3, 7, 64):
        seen.clear()
        objective = DistillationObjective(gaussian_teacher(diffusion), diffusion, steps)
        zeros = torch.zeros(1000, 1, 1, 1)
        objective(Network(diffusion, x_0), diffusion, zeros, torch.arange(1000), zeros)
        timesteps, counts = seen[0].unique(return_counts=True)
        assert timesteps.flip(0).tolist() == spaced_timesteps(1000, steps, "trailing").tolist()
        assert counts.max() - counts.min() <= 1


def test_the_teachers_predictions_are_clipped_as_in_sampling():
    diffusion = chain()
    teacher = Network(diffusion, lambda x_t, t: torch.full_like(x_t, 7.0))
    objective = DistillationObjective(teacher, diffusion, 4, clip=lambda x_0: x_0.clamp(-1, 1))
    assert (objective.target(torch.randn(4, 1, 2, 2), torch.arange(4)) - 1).abs().max() < 1e-6


def test_the_teacher_is_given_the_labels_and_gets_no_gradient():
    diffusion = chain()
    weight = torch.nn.Parameter(torch.ones(()))
    seen = []

    class Labelled(torch.nn.Module):
        def forward(self, x_t, t, class_labels=None, return_dict=False):
            seen.append(class_labels)
            return (weight * x_t,)

    labels = torch.tensor([3, 1])
    x_0, noise = torch.randn(2, 2, 1, 2, 2).unbind()
    student = Network(diffusion, lambda x_t, t: x_t.requires_grad_())
    objective = DistillationObjective(Labelled(), diffusion, 4)
    objective(student, diffusion, x_0, torch.tensor([0, 900]), noise, labels).objective.sum().backward()
    assert len(seen) == 2 and all(given is labels for given in seen) and weight.grad is None


@pytest.mark.parametrize(
    ("steps", "options", "words"),
    [
        (501, {}, "distill_steps must be an integer in 1..500"),
        (0, {}, "distill_steps must be"),
        (4, {"prediction_type": "epsilon"}, "needs a model that predicts 'sample' or 'v_prediction'"),
        (4, {"variance_type": "learned_range"}, "needs a model with a fixed variance"),
    ],
)
def test_a_model_that_cannot_teach_is_refused(steps, options, words):
    diffusion = DDPMSchedulerCustom(**{"prediction_type": "v_prediction"} | options).diffusion
    with pytest.raises(ValueError, match=words):
        DistillationObjective(torch.nn.Identity(), diffusion, steps)
