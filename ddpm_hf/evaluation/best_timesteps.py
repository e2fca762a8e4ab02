"""The table of best timesteps in a model's metrics.json: made when the model is evaluated, read when it is sampled."""

import json
from pathlib import Path

from ddpm_hf.diffusion.gaussian import FIXED_VARIANCES, GaussianDiffusion
from ddpm_hf.diffusion.likelihood import VariationalBound
from ddpm_hf.diffusion.timestep_search import best_timesteps, jump_costs, predicted_bound

TABLE_STEPS = (5, 10, 20, 50, 100, 200)


def best_timesteps_table(
    diffusion: GaussianDiffusion, training: VariationalBound, validation: VariationalBound, steps: int
) -> dict | None:
    """The best timesteps for `steps` and for those of `TABLE_STEPS` below T; None for a learned variance, which has none.

    They are chosen by the full chain's bound on training images, and `predicted_bits_per_dim` is computed from the terms of
    validation images: errors that came out too low by chance then do not make the prediction too optimistic.
    """
    if diffusion.variance_type not in FIXED_VARIANCES:
        return None
    costs, validation_costs = (jump_costs(diffusion, bound) for bound in (training, validation))
    rows = []
    for n in sorted({*TABLE_STEPS, steps}):
        if 2 <= n < len(diffusion):
            timesteps = best_timesteps(costs, n)
            predicted = predicted_bound(validation_costs, timesteps)
            rows.append({"steps": n, "predicted_bits_per_dim": predicted, "timesteps": timesteps})
    return {"variance_type": diffusion.variance_type, "rows": rows}


def timesteps_in_table(table: dict | None, steps: int) -> list[int] | None:
    """The timesteps of a table's row for `steps`; None if there is none."""
    return next((row["timesteps"] for row in table["rows"] if row["steps"] == steps), None) if table else None


def read_best_timesteps(folder: Path, steps: int, variance_type: str) -> list[int]:
    """The best `steps` timesteps in the metrics.json of a model's folder.

    Raises ValueError if there are none, or if they were chosen for another variance of the reverse process.
    """
    file = folder / "metrics.json"
    metrics = json.loads(file.read_text()) if file.is_file() else {}
    table = metrics.get("evaluation", {}).get("best_timesteps")
    if not table:
        found = (
            f"got {file}, which holds none" if file.is_file() else f"got {str(folder)!r}, where there is no such file"
        )
        make = "evaluate.py writes it for a model with a fixed variance"
        raise ValueError(f"model must be a folder whose metrics.json has a table of best timesteps, {found}: {make}.")
    if table["variance_type"] != variance_type:
        chosen = f"{file} has the best timesteps for variance_type={table['variance_type']!r}"
        raise ValueError(f"{chosen}, not for the model's {variance_type!r}: evaluate it without --variance_type.")
    timesteps = timesteps_in_table(table, steps)
    if timesteps is None:
        known = ", ".join(str(row["steps"]) for row in table["rows"])
        raise ValueError(
            f"steps must be one of {known}, the best timesteps in {file}, got {steps}: evaluate with --steps."
        )
    return timesteps
