"""Distill a model into one that samples in few steps (Salimans and Ho 2022):

    python training/distill.py --teacher outputs/mnist --from_steps 64 --to_steps 4 --output_dir outputs/mnist-4-steps

Trains students of 32, 16, 8 and 4 steps, each taught by the one before it, and the first by the teacher. Each is a run of
training/train.py with `--distill_steps`, in its folder of `output_dir`: with its options, which follow those of this
script, and its checkpoints. The same command resumes. The last student's folder holds the result, a pipeline whose
scheduler is DDIM. On several processes, launch train.py for one student after the other.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path

from ddpm_hf.scripts import train

from ddpm_hf.options import check_options, option
from ddpm_hf.training.option_parser import OptionParser
from ddpm_hf.training.presets import parse_config
from ddpm_hf.training.processes import fail

OWN = ("init_from", "distill_steps")  # options of train.py that this script sets


@dataclass
class DistillOptions:
    teacher: str = option(MISSING, "model to distill, which predicts x_0 or v: a folder, or a name on the Hub")
    from_steps: int = option(64, "steps in which the teacher samples: 2, 4, 8, ... times to_steps", "[2, inf)")
    to_steps: int = option(4, "steps in which the last student samples", "[1, inf)")
    output_dir: str = option("outputs/distilled", "folder of the students' folders")

    def __post_init__(self):
        check_options(self)
        ratio = self.from_steps / self.to_steps
        if ratio < 2 or ratio != 2 ** (int(ratio).bit_length() - 1):
            given = f"from_steps = {self.from_steps} and to_steps = {self.to_steps}"
            raise ValueError(f"from_steps must be 2, 4, 8, ... times to_steps, got {given}.")

    def students(self) -> list[tuple[int, list[str]]]:
        """The steps of each student, and the options of its run."""
        students, teacher, steps = [], self.teacher, self.from_steps
        while steps > self.to_steps:
            steps //= 2
            folder = str(Path(self.output_dir) / f"{steps}_steps")
            words = ["--init_from", teacher, "--distill_steps", str(steps), "--output_dir", folder]
            students.append((steps, words))
            teacher = folder
        return students


def main(arguments: Sequence[str] | None = None) -> None:
    parser = OptionParser(DistillOptions, __doc__.splitlines()[0] + " Further options are those of train.py.")
    try:
        options, rest = parser.parse_known(arguments)
        if given := [name for name in OWN if f"--{name}" in rest]:
            raise ValueError(f"--{given[0]} is set by this script: give --teacher, --from_steps and --to_steps.")
        students = options.students()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # a run ends its process group
            command = " ".join(["training/train.py", *rest, *students[0][1]])
            raise ValueError(f"on several processes, launch train.py for each student, and first: {command}")
        config = parse_config([*rest, *students[0][1]])  # before any work; the others differ in their teacher alone
    except (ValueError, TypeError, OSError) as error:
        fail("distill.py", error)
    for steps, words in students[:1] if config.dry_run else students:  # the others have no teacher yet
        print(f"Student of {steps} step{'s' * (steps > 1)}, taught by {words[1]}", flush=True)
        train.main([*rest, *words])


if __name__ == "__main__":
    main(sys.argv[1:])
