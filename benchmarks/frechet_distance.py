"""The Fréchet distance of 50,000 × 2,048 features against pytorch-fid's arithmetic: `python -m benchmarks.frechet_distance`

pytorch-fid keeps its features as float64, takes `numpy.cov` of them and `scipy.linalg.sqrtm` of the product of two
covariances; these calls are made here. First checks that the distances agree. Each side then runs in processes of its
own, in turn, which are timed from the features to the distance and report their peak memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from scipy import linalg

from benchmarks.harness import describe_machine
from ddpm_hf.evaluation.metrics import Moments, frechet_distance, moments

SIDES = ("pytorch-fid's calls", "ddpm_hf")


def make_features(n: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """Features whose variances fall as those of Inception do, written block by block."""
    generator, scale = torch.Generator().manual_seed(0), torch.linspace(0, -4, d).exp()
    features = torch.empty(n, d, dtype=dtype)
    for block in features.split(1000):
        block.copy_(torch.randn(block.shape, generator=generator).mul_(scale).add_(0.5).relu_())
    return features


def make_reference(d: int) -> Moments:
    features = make_features(2 * d, d, torch.float32).flip(1)
    return moments(features)


def by_numpy(features: np.ndarray, reference: Moments) -> float:
    mu, sigma = features.mean(axis=0), np.cov(features, rowvar=False)
    root = linalg.sqrtm(sigma.dot(reference.covariance.numpy()))
    difference = mu - reference.mean.numpy()
    return difference @ difference + np.trace(sigma) + np.trace(reference.covariance.numpy()) - 2 * np.trace(root.real)


def measure(side: str, n: int, d: int) -> None:
    """Print the distance, seconds and peak memory in GiB of one side."""
    reference = make_reference(d)
    features = make_features(n, d, torch.float32 if side == "ddpm_hf" else torch.float64)
    start = time.perf_counter()
    value = (
        frechet_distance(moments(features), reference) if side == "ddpm_hf" else by_numpy(features.numpy(), reference)
    )
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"value": value, "seconds": seconds, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_features", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is not None:
        return measure(args.side, args.num_features, args.dim)
    sizes = [f"--num_features={args.num_features}", f"--dim={args.dim}"]
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.frechet_distance", *sizes, f"--side={side}"]
            found[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    values = [runs[0]["value"] for runs in found.values()]
    if abs(values[1] / values[0] - 1) > 1e-6:
        raise SystemExit(f"The distances differ: {values}.")
    print(
        f"{describe_machine()}; {args.num_features} × {args.dim}: the distances agree to {abs(values[1] / values[0] - 1):.1e}"
    )
    medians = {side: statistics.median(run["seconds"] for run in runs) for side, runs in found.items()}
    for side, runs in found.items():
        ratio = medians[SIDES[0]] / medians[side]
        print(f"  {side:22s} {medians[side]:8.2f} s {ratio:7.2f}×   peak {max(run['peak'] for run in runs):.2f} GiB")
    return None


if __name__ == "__main__":
    main()
