"""Averages of the weights whose length is chosen after training (Karras et al. 2024, EDM2, section 3 and appendix C).

The profile of such an average at time t, counted here in images seen, is a power function:

    θ̂_γ(t) = ∫₀ᵗ p_{γ,t}(τ) θ(τ) dτ,    p_{γ,t}(τ) = (γ + 1) τ^γ / t^(γ+1).

It forgets the random initialization by itself, and its length is a fixed share of the run: the standard deviation of
the profile relative to t is σ_rel = (γ + 1)^½ (γ + 2)^(−1) (γ + 3)^(−½) (EDM2, eq. 15). Training tracks two such
averages and saves snapshots of them. Almost any other profile is close to a weighted sum of the profiles of the
snapshots, and its average is the same weighted sum of the snapshots.

The weights x minimize ‖Σ x_i p_i − p‖² in L²(0, t) under Σ x_i = 1. The constraint, which EDM2 does not have, makes the
average of constant weights these weights. For s ≤ t the inner products are

    ⟨p_{α,s}, p_{β,t}⟩ = ∫₀ˢ (α + 1)(β + 1) τ^(α+β) / (s^(α+1) t^(β+1)) dτ = (α + 1)(β + 1)/(α + β + 1) · (s/t)^β / t.

With G_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, p⟩, the solution is that of the linear system G x + λ 1 = b, 1ᵀx = 1, in float64.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ddpm_hf.checks import check_float, check_int, check_list
from ddpm_hf.files import atomic_file
from ddpm_hf.training.ema import check_network, float32_parameters, lerp_parameters, load_averages

SIGMAS = (0.05, 0.10)  # σ_rel of the two tracked averages (EDM2, section 3.2)
MAX_SIGMA = 12**-0.5  # σ_rel of γ = 0, the mean over the whole run
MIN_SIGMA = 1e-6  # γ is about 1/σ_rel, and the profiles are computed in float64
MAX_PROFILE_ERROR = 0.2  # relative to ‖p‖; a rebuilt profile with a larger error is not the requested one
PREFIX = "images-"


def gamma_from_sigma(sigma: float) -> float:
    """The exponent γ ≥ 0 of a length σ_rel: the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻² = 0.

    Raises ValueError unless 0 < σ_rel ≤ 12^(−½) = 0.2887, the length of the mean over the whole run.
    """
    a = _check_sigma("length σ_rel", sigma) ** -2
    return max(float(np.roots([1, 7, 16 - a, 12 - a]).real.max()), 0.0)


def _check_sigma(name: str, sigma: float) -> float:
    return check_float(name, sigma, f"({MIN_SIGMA}, {MAX_SIGMA}]")


class PowerEMA:
    """Averages of a model's parameters with power-function profiles, float32, from which `rebuild` makes others.

    θ̂(t) = β θ̂(t − B) + (1 − β) θ(t) with β = (1 − B/t)^(γ+1) for a step of B images that ends at t (EDM2, eq. 16). This
    is exactly the integral above for weights that are θ(t) throughout the step. β of the first step is 0.
    """

    def __init__(self, model: nn.Module, sigmas: Sequence[float] = SIGMAS):
        check_network(model)
        self.gammas = {sigma: gamma_from_sigma(sigma) for sigma in check_list("sigmas", sigmas, _check_sigma)}
        self._averages = {sigma: float32_parameters(model) for sigma in self.gammas}

    def update(self, model: nn.Module, images_seen: int, batch_size: int, skipped: Tensor | None = None) -> None:
        """Update the averages. Call it after every optimizer step, from the first on. `skipped`: as in `EMA.update`."""
        for sigma, average in self._averages.items():
            decay = (1 - batch_size / images_seen) ** (self.gammas[sigma] + 1)
            lerp_parameters(average.values(), model, 1 - decay, skipped)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters with keys "<σ_rel>/<parameter name>", float32."""
        averages = self._averages.items()
        return {f"{sigma!r}/{name}": value for sigma, average in averages for name, value in average.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        load_averages(self.state_dict(), state)


class Snapshot(NamedTuple):
    """A file of averages, the images seen when it was saved, and the lengths σ_rel of its averages."""

    file: Path
    images_seen: int
    sigmas: tuple[float, ...]


def save_snapshot(folder: Path, images_seen: int, averages: Mapping[str, Tensor]) -> Path:
    """Save what `PowerEMA.state_dict` returns, as full tensors on the CPU, with a SHA-256 checksum of them."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{PREFIX}{images_seen:012d}.safetensors"
    atomic_file(file, save(dict(averages), {"sha256": _digest(averages), "images_seen": str(images_seen)}))
    return file


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, oldest first; [] if there is no such folder. Reads no weights.

    Raises ValueError for a file that is not a snapshot.
    """
    found = []
    for file in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            with safe_open(file, "pt") as saved:
                sigmas = sorted({float(name.split("/", 1)[0]) for name in saved.keys()})  # noqa: SIM118
                found.append(Snapshot(file, int(saved.metadata()["images_seen"]), tuple(sigmas)))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a snapshot of averages, or it is damaged ({error}).") from error
    return found


def read_snapshot(snapshot: Snapshot) -> dict[str, Tensor]:
    """The averages of a snapshot. Raises ValueError if the file is damaged."""
    try:
        with safe_open(snapshot.file, "pt") as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
            digest = saved.metadata()["sha256"]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{snapshot.file} cannot be read ({error}).") from error
    if _digest(tensors) != digest:
        raise ValueError(f"{snapshot.file} is damaged: it does not have the checksum it was written with.")
    return tensors


def drop_snapshots_after(folder: Path, images_seen: int) -> None:
    """Delete the snapshots that a run resumed at `images_seen` images will save again."""
    for file in folder.glob(f"{PREFIX}*.safetensors"):
        if int(file.stem.removeprefix(PREFIX)) > images_seen:
            file.unlink()


def inner_products(gamma_1: Tensor, t_1: Tensor, gamma_2: Tensor, t_2: Tensor) -> Tensor:
    """⟨p_{γ₁,t₁}, p_{γ₂,t₂}⟩ in units of 1/time, for tensors of any shapes that broadcast."""
    later_gamma = torch.where(t_1 <= t_2, gamma_2, gamma_1)
    earlier, later = torch.minimum(t_1, t_2), torch.maximum(t_1, t_2)
    return (gamma_1 + 1) * (gamma_2 + 1) / (gamma_1 + gamma_2 + 1) * (earlier / later) ** later_gamma / later


def profile_weights(gammas: Tensor, times: Tensor, gamma: float, time: float) -> tuple[Tensor, float]:
    """The weights x (n,), float64, for which Σ x_i p_i is closest to the profile p of (γ, t) under Σ x_i = 1.

    Also returns the relative error ‖Σ x_i p_i − p‖/‖p‖. `gammas` and `times` (n,) are those of the p_i, float64.
    """
    # In units of `time`, for numbers near 1. The profiles are normalized because the Gram matrix is nearly singular.
    times, p, n = times / time, torch.tensor([gamma, 1.0], dtype=torch.float64), len(times)
    gram, b = inner_products(gammas[:, None], times[:, None], gammas, times), inner_products(gammas, times, *p)
    norms = gram.diagonal().sqrt()
    scale = (1 / norms).norm()
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n] = gram / norms / norms[:, None]
    system[n, :n] = system[:n, n] = 1 / norms / scale
    right = torch.cat([b / norms, 1 / scale[None]])
    x = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution[:n, 0] / norms
    x = x / x.sum()
    squared = inner_products(*p, *p)
    error = (squared - 2 * b @ x + x @ gram @ x) / squared
    return x, math.sqrt(max(error.item(), 0.0))


class Plan(NamedTuple):
    """The weight of each average in a rebuilt one, by (snapshot, σ_rel); the profile's error; the images seen."""

    weights: dict[tuple[Snapshot, float], float]
    profile_error: float
    images_seen: int


def plan_rebuild(snapshots: Sequence[Snapshot], sigma: float, images_seen: int | None = None) -> Plan:
    """How to make the average of length σ_rel at `images_seen` images (None: at the last snapshot). Reads no weights.

    Raises ValueError without snapshots up to `images_seen`, and for a length outside (0, 0.2887] or with a profile error
    above 20 %.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to rebuild an average from.")
    time = snapshots[-1].images_seen if images_seen is None else check_int("images_seen", images_seen, 1)
    used = [snapshot for snapshot in snapshots if snapshot.images_seen <= time]
    if not used:
        raise ValueError(f"images_seen must be at least {snapshots[0].images_seen}, the first snapshot's, got {time}.")
    keys = [(snapshot, length) for snapshot in used for length in snapshot.sigmas]
    profiles = [(gamma_from_sigma(length), snapshot.images_seen) for snapshot, length in keys]
    gammas, times = torch.tensor(profiles, dtype=torch.float64).T
    x, error = profile_weights(gammas, times, gamma_from_sigma(sigma), time)
    if error > MAX_PROFILE_ERROR:
        problem = f"the length σ_rel = {sigma:g} is out of the range of these {len(used)} snapshots"
        raise ValueError(f"{problem}: its profile error is {error:.0%}, at most {MAX_PROFILE_ERROR:.0%} is accepted.")
    return Plan(dict(zip(keys, x.tolist())), error, time)


def rebuild(plan: Plan) -> dict[str, Tensor]:
    """The planned average by the model's parameter names, float32. Raises ValueError for damaged snapshots."""
    sums: dict[str, Tensor] = {}
    for snapshot in dict.fromkeys(snapshot for snapshot, _ in plan.weights):
        for key, value in read_snapshot(snapshot).items():
            length, name = key.split("/", 1)
            sums[name] = sums.get(name, 0) + value.double() * plan.weights[snapshot, float(length)]
    return {name: value.float() for name, value in sums.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name].numpy()).data)
    return digest.hexdigest()
