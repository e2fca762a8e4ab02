"""Measure the quality of a model of the digits: `python -m benchmarks.digits_quality --model outputs/digits`

Compares samples with validation digits by the same classifier and the same distances, prints both with the thresholds
for the `digits` preset, and updates the folder's metrics.json and model card. The exit code is 1 if a threshold is
missed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.evaluation.digits import judge
from ddpm_hf.evaluation.sampling import sample_images
from ddpm_hf.training.artifacts import read_metrics, write_metrics_and_card


@dataclass
class QualityArguments:
    model: str = HfArg(help="output folder of training/train.py --config digits")
    num_samples: int = HfArg(default=500, help="number of samples")
    steps: int = HfArg(default=100, help="sampling steps")
    seed: int = HfArg(default=0, help="seed of the samples")


def main(arguments: list[str] | None = None) -> int:
    parser = HfArgumentParser(QualityArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    folder = Path(args.model)
    if not (folder / "metrics.json").is_file():
        sys.exit(
            f"digits_quality.py: error: {folder} holds no metrics.json: model must be the output folder of training/train.py."
        )
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    samples = sample_images(pipe, range(args.num_samples), args.steps, args.seed, batch_size=250)
    quality = judge(samples, args.steps, args.seed)
    metrics = read_metrics(folder) | {"quality": quality}
    write_metrics_and_card(folder, (folder / "config.yaml").read_text(), metrics)

    closer, p_value = quality["closer_than_5_percent_of_validation"], quality["closer_p_value"]
    checks = [
        ("recognized with probability > 0.9", f"{quality['recognized']:.1%}", quality["recognized_ratio"] >= 0.8),
        ("  the same for validation digits", f"{quality['recognized_validation']:.1%}", None),
        ("  ratio (at least 80 %)", f"{quality['recognized_ratio']:.1%}", quality["recognized_ratio"] >= 0.8),
        (
            "least frequent class (at least 4 %)",
            f"{quality['smallest_class_share']:.1%}",
            quality["smallest_class_share"] >= 0.04,
        ),
        (
            "most frequent class (at most 20 %)",
            f"{quality['largest_class_share']:.1%}",
            quality["largest_class_share"] <= 0.2,
        ),
        ("closer to training than 95 % of validation", f"{closer:.1%}", None),
        ("p-value, small for copies (at least 0.01)", f"{p_value:.2f}", p_value >= 0.01),
    ]
    distances, validation = quality["nearest_distance_quantiles"], quality["nearest_distance_quantiles_validation"]
    print(f"{args.num_samples} samples, {args.steps} steps, seed {args.seed}")
    for name, value, passed in checks:
        print(f"{name:48s} {value:>8s}  {'' if passed is None else 'ok' if passed else 'MISSED'}")
    for q in distances:
        print(
            f"nearest training digit, {float(q):.0%} quantile".ljust(48),
            f"{distances[q]:8.3f}  validation {validation[q]:.3f}",
        )
    return int(any(passed is False for _, _, passed in checks))


if __name__ == "__main__":
    sys.exit(main())
