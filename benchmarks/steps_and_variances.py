"""Compare step counts and variances: `python -m benchmarks.steps_and_variances --model outputs/digits --dataset digits`.

Runs training/evaluate.py for each number of sampling steps and each variance of the reverse process, and prints a table
of the chain's bound in bits/dim, FD, precision and recall. Each evaluation is written to its own folder in --output_dir.
The table is added to the metrics and the card of a model that training/train.py made.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from ddpm_hf.scripts import evaluate
from transformers.hf_argparser import HfArg, HfArgumentParser

from ddpm_hf.training.artifacts import read_metrics, write_metrics_and_card


@dataclass
class TableArguments:
    model: str = HfArg(help="folder, or repository on the Hub")
    dataset: str = HfArg(help="as for training/evaluate.py")
    output_dir: str = HfArg(default="outputs/steps_and_variances", help="folder for the evaluations")
    steps: list[int] = HfArg(default_factory=lambda: [1000, 100, 50, 25], help="numbers of sampling steps")
    features: str | None = HfArg(default=None, help="as for training/evaluate.py")
    validation_split: str = HfArg(default="test", help="as for training/evaluate.py")
    num_samples: int = HfArg(default=500, help="samples of each evaluation")
    bound_images: int = HfArg(default=120, help="maximum number of images for each bound")
    bound_stride: int = HfArg(default=20, help="full chain: take each image at every n-th timestep")
    seed: int = HfArg(default=0, help="seed of all evaluations")
    cache_dir: str | None = HfArg(default=None, help="as for training/evaluate.py")


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(TableArguments, description=__doc__.splitlines()[0], allow_abbrev=False)
    (args,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    options = {k: v for k, v in vars(args).items() if k not in ("output_dir", "steps")}
    PartialState(cpu=True)
    rows = []
    for steps in args.steps:
        for variance in evaluate.VARIANCES:
            folder = Path(args.output_dir) / f"{variance}-{steps}"
            one = evaluate.EvaluateArguments(**options, steps=steps, variance_type=variance, output_dir=str(folder))
            results = evaluate.evaluate(one)
            evaluate.write(folder, results["evaluation"], results["pictures"])
            evaluation = results["evaluation"]
            bound = evaluation["bits_per_dim"][f"validation, {steps} steps"]
            values = {figure["name"].split("-")[0]: figure["value"] for figure in evaluation["figures"]}
            if "FD" not in values:
                raise ValueError(f"num_samples must be more than the features, for FD, got {args.num_samples}.")
            row = {"steps": steps, "variance_type": variance} | {
                k: bound[k] for k in ("bits_per_dim", "standard_error")
            }
            rows.append(row | {name: values[name] for name in ("FD", "precision", "recall")})
    table = {
        "distance": evaluation["figures"][0]["name"],
        "seed": args.seed,
        "bound_images": bound["num_images"],
        "validation_split": args.validation_split,
        "rows": rows,
    }
    run = Path(args.model)
    if (run / "config.yaml").is_file() and (run / "metrics.json").is_file():
        metrics = read_metrics(run) | {"steps_and_variances": table}
        write_metrics_and_card(run, (run / "config.yaml").read_text(), metrics)
    print(f"{table['distance']}, seed {args.seed}; bits/dim of {table['bound_images']} validation images")
    print(f"{'steps':>6s}  {'variance':12s} {'bits/dim':>18s} {'FD':>10s} {'precision':>10s} {'recall':>8s}")
    for row in rows:
        line = (
            f"{row['steps']:6d}  {row['variance_type']:12s} {row['bits_per_dim']:9.3f} ± {row['standard_error']:6.3f}"
        )
        print(f"{line} {row['FD']:10.3f} {row['precision']:10.3f} {row['recall']:8.3f}")


if __name__ == "__main__":
    main()
