"""The definitions of the β schedules, evaluated with 50 digits."""

import functools

import mpmath
from mpmath import mpf

START, END = 1e-4, 0.02
ZERO_SNR = ("linear+zero_snr", "squaredcos_cap_v2+zero_snr")


def exact_line(start, end, T):
    return [mpf(start) + (mpf(end) - mpf(start)) * i / max(T - 1, 1) for i in range(T)]


def exact_from_alpha_bar(alpha_bar, T):
    values = [alpha_bar(mpf(i) / T) for i in range(T + 1)]
    return [min(1 - b / a, mpf("0.999")) for a, b in zip(values[:-1], values[1:])]


def laplace_alpha_bar(u):
    sign = 1 if u <= 0.5 else -1
    log_snr = mpf(-0.5) * sign * mpmath.log(1 - 2 * abs(mpf(0.5) - u) + mpf("1e-6"))
    return mpmath.sqrt(mpmath.exp(log_snr) / (1 + mpmath.exp(log_snr)))


def exact_warmup(T, rising):
    return exact_line(START, END, rising) + [mpf(END)] * (T - rising)


def exact_quad(T):
    return [root**2 for root in exact_line(mpmath.sqrt(mpf(START)), mpmath.sqrt(mpf(END)), T)]


DEFINITIONS = {
    "linear": lambda T: exact_line(START, END, T),
    "scaled_linear": exact_quad,
    "quad": exact_quad,
    "quadratic": exact_quad,
    "squaredcos_cap_v2": lambda T: exact_from_alpha_bar(
        lambda u: mpmath.cos((u + mpf("0.008")) / mpf("1.008") * mpmath.pi / 2) ** 2, T
    ),
    "sigmoid": lambda T: [mpf(START) + (mpf(END) - mpf(START)) / (1 + mpmath.exp(-x)) for x in exact_line(-6, 6, T)],
    "laplace": lambda T: exact_from_alpha_bar(laplace_alpha_bar, T),
    "const": lambda T: [mpf(END)] * T,
    "constant": lambda T: [mpf(END)] * T,
    "jsd": lambda T: [1 / mpf(T - i) for i in range(T)],
    "warmup10": lambda T: exact_warmup(T, T // 10),
    "warmup50": lambda T: exact_warmup(T, T // 2),
}


def exact_zero_snr(betas):
    """Lin et al. 2023, algorithm 1, line by line."""
    root = [mpmath.sqrt(a) for a in exact_cumprod([1 - b for b in betas])]
    shifted = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
    alphas_cumprod = [r * r for r in shifted]
    alphas = [alphas_cumprod[0]] + [b / a for a, b in zip(alphas_cumprod[:-1], alphas_cumprod[1:])]
    return [1 - a for a in alphas]


def exact_cumprod(values):
    product, products = mpf(1), []
    for value in values:
        product *= value
        products.append(product)
    return products


@functools.cache
def exact_betas(name, T):
    with mpmath.workdps(50):
        base = DEFINITIONS[name.removesuffix("+zero_snr")](T)
        return exact_zero_snr(base) if name.endswith("+zero_snr") else base


def relative_error(value, exact):
    return float(abs(mpf(value) - exact) / abs(exact)) if exact else abs(value)
