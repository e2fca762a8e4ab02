"""Averages of the weights whose length is chosen after training (Karras et al. 2024, EDM2, section 3 and appendix C).

The average with the profile of a power function at time t (in images seen here),

    θ̂_γ(t) = ∫₀ᵗ p_{γ,t}(τ) θ(τ) dτ,    p_{γ,t}(τ) = (γ + 1) τ^γ / t^(γ+1),

forgets the random start by itself, and its length is always the same share of the run: σ_rel, the standard deviation
of the profile over t, is (γ + 1)^½ (γ + 2)^(−1) (γ + 3)^(−½). Two such averages are followed in training, and snapshots
of them are kept. Any other profile is then nearly a weighted sum of the snapshots' profiles, and the average of that
profile is the same weighted sum of the snapshots.

The weights x minimize ‖Σ x_i p_i − p‖² in L²(0, t) under Σ x_i = 1, which makes the average of weights that stand still
those weights (EDM2 leaves the condition out). With the inner products, for s ≤ t,

    ⟨p_{α,s}, p_{β,t}⟩ = ∫₀ˢ (α + 1)(β + 1) τ^(α+β) / (s^(α+1) t^(β+1)) dτ = (α + 1)(β + 1)/(α + β + 1) · (s/t)^β / t,

G_ij = ⟨p_i, p_j⟩ and b_i = ⟨p_i, p⟩, that is the linear system  G x + λ 1 = b,  1ᵀx = 1, solved in float64.
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
from torch import nn

from ddpm_hf.files import atomic_file
from ddpm_hf.training.ema import lerp_parameters, load_averages

SIGMAS = (0.05, 0.10)  # of the two averages that are followed (EDM2, section 3.2)
LONGEST = 12**-0.5  # σ_rel of γ = 0, the plain mean of all of the run
MAX_PROFILE_ERROR = 0.2  # of ‖p‖: above it the rebuilt profile is not the one that was asked for
PREFIX = "images-"


def sigma_rel(gamma: float) -> float:
    """The length σ_rel of the power function of exponent γ > −1 (EDM2, eq. 15)."""
    return (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5


def gamma_of(sigma: float) -> float:
    """The exponent γ ≥ 0 of a length σ_rel: the largest root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻² = 0.

    Raises ValueError unless 0 < σ_rel ≤ 12^(−½) = 0.2887, the length of the plain mean.
    """
    if not 0 < sigma <= LONGEST:
        raise ValueError(f"a length σ_rel must lie in (0, {LONGEST:.4f}], got {sigma!r}.")
    a = sigma**-2
    return max(float(np.roots([1, 7, 16 - a, 12 - a]).real.max()), 0.0)


class PowerEMA:
    """The averages of a model's parameters by power functions, float32, that `rebuild` needs.

    θ̂(t) = β θ̂(t − B) + (1 − β) θ(t) with β = (1 − B/t)^(γ+1) for a step of B images that ends at t (EDM2, eq. 16): the
    integral above, exactly, of weights that are θ(t) throughout the step. The first step's β is 0.
    """

    def __init__(self, model: nn.Module, sigmas: Sequence[float] = SIGMAS):
        self.gammas = {sigma: gamma_of(sigma) for sigma in sigmas}
        self._names = [name for name, _ in model.named_parameters()]
        self._averages = {sigma: [p.detach().float().clone() for p in model.parameters()] for sigma in sigmas}

    def decay(self, sigma: float, images_seen: int, batch_size: int) -> float:
        """β of a step of `batch_size` images that ends at `images_seen`."""
        return (1 - batch_size / images_seen) ** (self.gammas[sigma] + 1)

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int, skipped: torch.Tensor | None = None) -> None:
        """Take in the model's parameters, after every optimizer step from the first one on. `skipped` as in `EMA`."""
        for sigma, average in self._averages.items():
            lerp_parameters(average, model, 1 - self.decay(sigma, images_seen, batch_size), skipped)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averaged parameters as "<σ_rel>/<parameter's name>", float32."""
        return {
            f"{sigma!r}/{name}": average
            for sigma, averages in self._averages.items()
            for name, average in zip(self._names, averages)
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over averages saved by `state_dict`. Raises ValueError for other names or shapes."""
        load_averages(self.state_dict(), state)


class Snapshot(NamedTuple):
    """A file of averages: when they were taken, and their lengths."""

    file: Path
    images_seen: int
    sigmas: tuple[float, ...]


def save_snapshot(folder: Path, images_seen: int, averages: Mapping[str, torch.Tensor]) -> Path:
    """Write what `PowerEMA.state_dict` gives, whole or not at all, with a SHA-256 of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().cpu().contiguous() for name, value in averages.items()}
    file = folder / f"{PREFIX}{images_seen:012d}.safetensors"
    atomic_file(file, save(tensors, metadata={"sha256": _digest(tensors), "images_seen": str(images_seen)}))
    return file


def list_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots in a folder, oldest first; none where there is no folder. Reads names alone, no weights.

    Raises ValueError for a file that is no snapshot.
    """
    found = []
    for file in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            with safe_open(file, "pt") as saved:
                sigmas = sorted({float(name.split("/", 1)[0]) for name in saved.keys()})  # noqa: SIM118
                found.append(Snapshot(file, int(saved.metadata()["images_seen"]), tuple(sigmas)))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no snapshot of averages, or a damaged one ({error}).") from error
    return found


def read_snapshot(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """The averages of a snapshot. Raises ValueError where they are not what was written."""
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
    """Delete what a run that went on from `images_seen` images will write again."""
    for file in folder.glob(f"{PREFIX}*.safetensors"):
        if int(file.stem.removeprefix(PREFIX)) > images_seen:
            file.unlink()


def inner_products(gammas: Sequence[float], times: Sequence[float], gammas_2, times_2) -> torch.Tensor:
    """⟨p_{γ_i,t_i}, p_{γ_j,t_j}⟩ of n profiles with m others: (n, m), float64, in units of 1/time."""
    gamma, t = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (list(gammas), list(times)))
    gamma_2, t_2 = (torch.tensor(x, dtype=torch.float64)[None] for x in (list(gammas_2), list(times_2)))
    of_the_later = torch.where(t <= t_2, gamma_2, gamma)
    earlier, later = torch.minimum(t, t_2), torch.maximum(t, t_2)
    return (gamma + 1) * (gamma_2 + 1) / (gamma + gamma_2 + 1) * (earlier / later) ** of_the_later / later


def profile_weights(
    gammas: Sequence[float], times: Sequence[float], gamma: float, time: float
) -> tuple[torch.Tensor, float]:
    """Weights x (n,), float64, of profiles (γ_i, t_i) that come nearest to (γ, t) under Σ x_i = 1, and ‖Σ x_i p_i − p‖/‖p‖."""
    # In units of the target's time: sizes near 1. Scaled to unit profiles, since the Gram matrix is near singular.
    times = [t / time for t in times]
    gram, b = inner_products(gammas, times, gammas, times), inner_products(gammas, times, [gamma], [1.0])[:, 0]
    norms = gram.diagonal().sqrt()
    ones = (1 / norms) / (1 / norms).norm()
    n = len(times)
    system, right = torch.zeros(n + 1, n + 1, dtype=torch.float64), torch.zeros(n + 1, dtype=torch.float64)
    system[:n, :n], right[:n] = gram / norms / norms[:, None], b / norms
    system[n, :n] = system[:n, n] = ones
    right[n] = 1 / (1 / norms).norm()
    solution = torch.linalg.lstsq(system, right[:, None], rcond=1e-13, driver="gelsd").solution[:n, 0]
    x = solution / norms
    x = x / x.sum()
    squared = inner_products([gamma], [1.0], [gamma], [1.0])[0, 0]
    error = (squared - 2 * b @ x + x @ gram @ x) / squared
    return x, math.sqrt(max(error.item(), 0.0))


class Rebuilt(NamedTuple):
    """An average under the model's own names, float32; ‖p̂ − p‖/‖p‖ of its profile; and the time it is of."""

    state: dict[str, torch.Tensor]
    profile_error: float
    images_seen: int


def rebuild(snapshots: Sequence[Snapshot], sigma: float, images_seen: int | None = None) -> Rebuilt:
    """The average of length σ_rel at `images_seen` (None: the last snapshot's), from the snapshots up to there.

    Raises ValueError where there is no snapshot, for a length out of range, for one that these snapshots cannot
    rebuild (an error of the profile above 20 %), and for damaged snapshots.
    """
    (plan,) = check_lengths(snapshots, [sigma], images_seen)
    sums: dict[str, torch.Tensor] = {}
    for snapshot, weights in plan.weights.items():
        tensors = read_snapshot(snapshot)
        for key, value in tensors.items():
            length, name = key.split("/", 1)
            weighted = value.double() * weights[float(length)]
            sums[name] = sums[name] + weighted if name in sums else weighted
    return Rebuilt({name: value.float() for name, value in sums.items()}, plan.profile_error, plan.images_seen)


class Plan(NamedTuple):
    """By snapshot and length, the weight that an average gets; the error of the profile; the time it is of."""

    weights: dict[Snapshot, dict[float, float]]
    profile_error: float
    images_seen: int


def plan_rebuild(snapshots: Sequence[Snapshot], sigma: float, images_seen: int | None = None) -> Plan:
    """How `rebuild` makes an average; reads no weights. Raises ValueError without snapshots and for lengths out of range."""
    gamma = gamma_of(sigma)
    if not snapshots:
        raise ValueError("there are no snapshots to rebuild an average from.")
    time = snapshots[-1].images_seen if images_seen is None else images_seen
    used = [snapshot for snapshot in snapshots if snapshot.images_seen <= time]
    if not used:
        raise ValueError(
            f"images_seen must be at least {snapshots[0].images_seen}, the first snapshot's, got {images_seen}."
        )
    keys = [(snapshot, length) for snapshot in used for length in snapshot.sigmas]
    x, error = profile_weights([gamma_of(s) for _, s in keys], [k.images_seen for k, _ in keys], gamma, time)
    weights: dict[Snapshot, dict[float, float]] = {}
    for (snapshot, length), weight in zip(keys, x.tolist()):
        weights.setdefault(snapshot, {})[length] = weight
    return Plan(weights, error, time)


def check_lengths(
    snapshots: Sequence[Snapshot], lengths: Sequence[float], images_seen: int | None = None
) -> list[Plan]:
    """The plan of each length. Raises ValueError, as `rebuild` does, if one of them cannot be rebuilt."""
    plans = [plan_rebuild(snapshots, sigma, images_seen) for sigma in lengths]
    for sigma, plan in zip(lengths, plans):
        if plan.profile_error > MAX_PROFILE_ERROR:
            raise ValueError(
                f"the length σ_rel = {sigma:g} is out of the range of these {len(plan.weights)} snapshots: the nearest "
                f"profile is off by {plan.profile_error:.0%}, at most {MAX_PROFILE_ERROR:.0%} is accepted. Lengths near "
                f"{' and '.join(f'{s:g}' for s in snapshots[0].sigmas)} need the fewest snapshots."
            )
    return plans


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}\n".encode())
        digest.update(np.ascontiguousarray(tensors[name].numpy()).data)
    return digest.hexdigest()
