"""Sampling of training timesteps, with the weights that keep the expectation of the loss.

A sampler draws for the whole global batch. With the same generator it returns the same on every process.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ddpm_hf.checks import check_choice, check_device, check_int
from ddpm_hf.diffusion.timesteps import MAX_TIMESTEPS


class UniformTimesteps:
    """Independent timesteps, uniform over 0..T−1 (DDPM, algorithm 1).

    The base class of all samplers: a call draws timesteps, `update` receives the losses of a step if `uses_losses` is
    True, and `state_dict` is saved in checkpoints (empty here).

    Args:
        T: length of the chain.
        device: of the state.
    """

    uses_losses = False

    def __init__(self, T: int, device: torch.device | str = "cpu"):
        self.T = check_int("T", T, 1, MAX_TIMESTEPS)
        check_device("device", device)

    def __call__(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw timesteps (B,), int64, with their weights 1/(T·p_t), (B,), float32, on the device of the generator.

        The weighted mean loss has the same expectation as over uniform timesteps.
        """
        t = self.timesteps(batch_size, generator)
        return t, torch.ones(batch_size, device=t.device)

    def timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.T, (batch_size,), generator=generator, device=generator.device)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Update the state after a step: timesteps (B,) and unweighted losses (B,) of the global batch, in order."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state, to resume from by `load_state_dict`."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state. Raises ValueError if it belongs to another sampler or another T."""
        mine = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in state.items()}
        if mine != theirs:
            raise ValueError(f"the saved state of the timestep sampler must hold {mine}, got {theirs}.")


class StratifiedTimesteps(UniformTimesteps):
    """Timesteps that are each uniform over 0..T−1 and evenly spread over it, one in each B-th of the range.

    The loss has the same expectation and less variance. This is the low-discrepancy sampler of variational diffusion
    models (Kingma et al. 2021, appendix I.1) with discrete timesteps.
    """

    def timesteps(self, batch_size: int, generator: torch.Generator) -> Tensor:
        offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
        position = torch.arange(batch_size, device=generator.device, dtype=torch.float64) / batch_size
        return (((position + offset) % 1) * self.T).long().clamp(max=self.T - 1)


class LossSecondMomentTimesteps(UniformTimesteps):
    """Importance sampling with p_t ∝ √E[L_t²] (Improved DDPM, section 3.3).

    E[L_t²] is the mean over the last `HISTORY` losses at t. Timesteps are uniform until every t has that many losses.
    As in the paper's code, a thousandth of the probability stays uniform, so that every t continues to be drawn. The
    state stays on its device and is never read back. Losses that are not finite are ignored.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001
    uses_losses = True

    def __init__(self, T: int, device: torch.device | str = "cpu"):
        super().__init__(T, device)
        # The last row is a dummy that receives losses to be discarded.
        self._losses = torch.zeros(T + 1, self.HISTORY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(T + 1, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t, (T,), float64."""
        root = self._losses[:-1].square().mean(1).sqrt()
        p = (1 - self.UNIFORM_SHARE) * root / root.sum() + self.UNIFORM_SHARE / self.T
        # If all losses are 0, the ratio is undefined.
        known = (self._counts[:-1].min() >= self.HISTORY) & (root.sum() > 0)
        return torch.where(known, p, 1 / self.T)

    def __call__(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        p = self.probabilities().to(generator.device)
        cumulative = p.cumsum(0)
        position = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float64)
        t = torch.searchsorted(cumulative, position * cumulative[-1], right=True).clamp(max=self.T - 1)
        return t, (1 / (self.T * p[t])).float()

    @torch.no_grad()
    def update(self, t: Tensor, losses: Tensor) -> None:
        t, losses = t.to(self._counts.device), losses.to(self._losses)
        t = torch.where(losses.isfinite(), t, self.T)
        # Each row is a ring buffer. If t occurs several times in the batch, `place` numbers the occurrences: the position
        # in the sorted batch minus that of the first one.
        t, order = t.sort(stable=True)
        place = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)
        number = torch.zeros_like(self._counts).index_add_(0, t, torch.ones_like(t))
        column = (self._counts[t] + place) % self.HISTORY
        # Only the last HISTORY occurrences are kept, so that no two losses are written to the same entry.
        row = torch.where(number[t] - place <= self.HISTORY, t, self.T)
        self._losses[row, column] = losses[order]
        self._counts += number

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self._losses[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._losses[:-1].copy_(state["losses"])
        self._counts[:-1].copy_(state["counts"])


TIMESTEP_SAMPLERS = {
    "uniform": UniformTimesteps,
    "stratified": StratifiedTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}


def make_timestep_sampler(name: str, T: int, device: torch.device | str = "cpu") -> UniformTimesteps:
    """The sampler called `name`, a key of `TIMESTEP_SAMPLERS`. Raises ValueError for an unknown name."""
    check_choice("timestep_sampler", name, TIMESTEP_SAMPLERS)
    return TIMESTEP_SAMPLERS[name](T, device)
