"""Where in the chain training looks: the timesteps of a batch, and the weight that each example's loss then has.

A sampler is called for the whole global batch, with the same generator on every process, and returns the same there.
"""

from collections.abc import Mapping

import torch


class UniformTimesteps:
    """Independent timesteps, uniform over 0..T−1 (DDPM, algorithm 1).

    Also the interface of all samplers: a call, `update` with the losses of a step where `uses_losses` says that they
    are wanted, and a state for checkpoints (empty here).

    Args:
        T: length of the chain. device: of the state.
    """

    uses_losses = False

    def __init__(self, T: int, device: torch.device | str = "cpu"):
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T must be an integer of at least 1, got {T!r}.")
        self.T = T

    def __call__(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B,), int64, and the weight 1/(T·p_t) of each, (B,), float32, on the generator's device: weighted
        so, the mean loss has the expectation that it has over uniform timesteps."""
        t = self.timesteps(batch_size, generator)
        return t, torch.ones(batch_size, device=t.device)

    def timesteps(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.T, (batch_size,), generator=generator, device=generator.device)

    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from a step: timesteps (B,) and losses (B,), not weighted, of the global batch in order of position."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What `load_state_dict` takes, in order to go on as if nothing had happened."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError for the state of another sampler or chain."""
        mine = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in state.items()}
        if mine != theirs:
            raise ValueError(f"the saved state of the timestep sampler must hold {mine}, got {theirs}.")


class StratifiedTimesteps(UniformTimesteps):
    """Timesteps that are each uniform over 0..T−1 and share the range out evenly: one in each B-th of it.

    The loss has the same expectation and less variance. (The low-discrepancy sampler of variational diffusion
    models, Kingma et al. 2021, appendix I.1, on a finite chain.)
    """

    def timesteps(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64)
        position = torch.arange(batch_size, device=generator.device, dtype=torch.float64) / batch_size
        return (((position + offset) % 1) * self.T).long().clamp(max=self.T - 1)


class LossSecondMomentTimesteps(UniformTimesteps):
    """Importance sampling, p_t ∝ √E[L_t²] (Improved DDPM, section 3.3): the second moment of L_t is the mean over the
    last `HISTORY` losses at t. Timesteps are uniform until every t has that many.

    As in the paper's code, a thousandth of the probability stays uniform, so that no t is given up. The state lives
    on the device and nothing of it is read back. Losses that are not finite are left out.
    """

    HISTORY = 10
    UNIFORM_SHARE = 0.001
    uses_losses = True

    def __init__(self, T: int, device: torch.device | str = "cpu"):
        super().__init__(T, device)
        # The last row takes what is to be forgotten.
        self._losses = torch.zeros(T + 1, self.HISTORY, dtype=torch.float64, device=device)
        self._counts = torch.zeros(T + 1, dtype=torch.int64, device=device)

    def probabilities(self) -> torch.Tensor:
        """p_t, (T,), float64."""
        root = self._losses[:-1].square().mean(1).sqrt()
        p = (1 - self.UNIFORM_SHARE) * root / root.sum() + self.UNIFORM_SHARE / self.T
        # Losses that are all 0 tell nothing.
        known = (self._counts[:-1].min() >= self.HISTORY) & (root.sum() > 0)
        return torch.where(known, p, 1 / self.T)

    def __call__(self, batch_size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.probabilities().to(generator.device)
        cumulative = p.cumsum(0)
        position = torch.rand(batch_size, generator=generator, device=generator.device, dtype=torch.float64)
        t = torch.searchsorted(cumulative, position * cumulative[-1], right=True).clamp(max=self.T - 1)
        return t, (1 / (self.T * p[t])).float()

    @torch.no_grad()
    def update(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        t, losses = t.to(self._counts.device), losses.to(self._losses)
        t = torch.where(losses.isfinite(), t, self.T)
        # Every t's losses go round in its row, in order of position. Of a t that is there several times, a loss's place
        # among them is its position in the sorted batch less that of the first.
        t, order = t.sort(stable=True)
        place = torch.arange(len(t), device=t.device) - torch.searchsorted(t, t)
        number = torch.zeros_like(self._counts).index_add_(0, t, torch.ones_like(t))
        column = (self._counts[t] + place) % self.HISTORY
        # No two may write to one place.
        row = torch.where(number[t] - place <= self.HISTORY, t, self.T)
        self._losses[row, column] = losses[order]
        self._counts += number

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": self._losses[:-1].clone(), "counts": self._counts[:-1].clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        super().load_state_dict(state)
        self._losses[:-1].copy_(state["losses"])
        self._counts[:-1].copy_(state["counts"])


TIMESTEP_SAMPLERS = {
    "uniform": UniformTimesteps,
    "stratified": StratifiedTimesteps,
    "loss_second_moment": LossSecondMomentTimesteps,
}


def make_timestep_sampler(name: str, T: int, device: torch.device | str = "cpu") -> UniformTimesteps:
    """The sampler called `name`, a key of `TIMESTEP_SAMPLERS`. Raises ValueError for another name."""
    if name not in TIMESTEP_SAMPLERS:
        raise ValueError(f"timestep_sampler must be one of {list(TIMESTEP_SAMPLERS)}, got {name!r}.")
    return TIMESTEP_SAMPLERS[name](T, device)
