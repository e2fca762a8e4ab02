"""Any value for any option or constructor argument works, or raises ValueError or TypeError that names it, in short time."""

import contextlib
import inspect
import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import fields

import numpy as np
import pytest
import torch
from ddpm_hf.scripts.choose_ema import EMAArguments
from ddpm_hf.scripts.publish import PublishArguments
from ddpm_hf.scripts.sample import SampleArguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, DDPMSchedulerCustom, GaussianDiffusion
from ddpm_hf.convert.options import ConvertOptions
from ddpm_hf.data.batches import GlobalBatches
from ddpm_hf.data.decoding import ImageFormat
from ddpm_hf.diffusion.likelihood import BoundSums
from ddpm_hf.diffusion.losses import Objective
from ddpm_hf.diffusion.schedules import make_betas, scale_betas_for_timesteps
from ddpm_hf.diffusion.timestep_samplers import TIMESTEP_SAMPLERS, make_timestep_sampler
from ddpm_hf.diffusion.timesteps import parse_timesteps, spaced_timesteps
from ddpm_hf.training.build import check_builds
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.ema import EMA
from ddpm_hf.training.posthoc_ema import PowerEMA
from ddpm_hf.training.presets import parse_config
from ddpm_hf.transfer.downloads import Retries
from tests.conftest import TINY_SCHEDULER, TINY_UNET

SECONDS = 10  # for one example, of which most take milliseconds
PLAIN = [
    None, True, False, -1, 0, 1, 2, 3, 7, 8, 64, 1000, 10**6, 2**31, 2**63, 10**30, 10**400, -1.0, 0.0, 0.5, 1.0, 2.5, 1e300,
    1e-300, float("nan"), float("inf"), -float("inf"), "", "1", "abc", "nan", "None", "true", "cpu", "../x", "a b", "ä",
    [], [1], [8, 8], [0], [-1, 8], [0.5], [float("nan")], ["a"], [[1], [2]], [None], [True], {}, {"a": 1},
]  # fmt: skip
OBJECTS = [
    1j, b"bytes", (), (8, 8), {1}, object(), int, len, range(3), "a\0b", "\udc80", np.int64(3), np.float32(0.5), np.bool_(True),
    np.float64("nan"), np.array([1.0, 2.0]), np.array(["a"]), np.zeros((2, 2)), torch.tensor(3), torch.tensor([0.1, 0.2]),
    torch.tensor([1j]), torch.zeros(2, 2), torch.nn.Linear(2, 2), torch.float16,
]  # fmt: skip
# The digits of these integers alone are too many to print.
ANY = st.sampled_from([*PLAIN, *OBJECTS]) | st.integers() | st.floats() | st.text(max_size=5)
ANY = ANY | st.lists(st.integers(-2, 70) | st.floats() | st.text(max_size=2), max_size=4)
JSON = st.sampled_from([*PLAIN, *map(str, PLAIN)]) | st.lists(st.sampled_from(PLAIN), max_size=3)
EXHAUSTIVE = settings(
    derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck), max_examples=120
)


@contextlib.contextmanager
def time_limit(what: str) -> Iterator[None]:
    def stop(*_):
        pytest.fail(f"{what} took more than {SECONDS} s.")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def assert_works_or_names(make: Callable[[], object], changed: dict) -> None:
    with time_limit(f"an argument of {list(changed)}"):
        try:
            make()
        except (ValueError, TypeError) as error:
            message = str(error)
            assert any(name in message for name in changed), (
                f"{type(error).__name__} names none of {changed}: {message}"
            )
            assert len(message) < 3000


def tiny_scheduler(cls, **changed):
    return cls(**{**TINY_SCHEDULER, **changed})


def network():
    return torch.nn.Linear(2, 2)


def betas() -> torch.Tensor:
    return torch.linspace(0.1, 0.5, 5, dtype=torch.float64)


def pipeline(make_unet_and_scheduler=[], **changed):  # noqa: B006  one pair for all examples
    if not make_unet_and_scheduler:
        from ddpm_hf import UNet2DModelCustom

        make_unet_and_scheduler += [UNet2DModelCustom(**TINY_UNET), DDPMSchedulerCustom(**TINY_SCHEDULER)]
    unet, scheduler = make_unet_and_scheduler
    return DDPMPipelineCustom(**{"unet": unet, "scheduler": scheduler, **changed})


# What makes an object from changed arguments, and whose arguments they are.
CLASSES = {
    "DDPMSchedulerCustom": (lambda **k: tiny_scheduler(DDPMSchedulerCustom, **k), DDPMSchedulerCustom),
    "DDIMSchedulerCustom": (lambda **k: tiny_scheduler(DDIMSchedulerCustom, **k), DDIMSchedulerCustom),
    "GaussianDiffusion": (lambda **k: GaussianDiffusion(**{"betas": betas(), **k}), GaussianDiffusion),
    "DDPMPipelineCustom": (pipeline, DDPMPipelineCustom),
    "Objective": (Objective, Objective),
    "EMA": (lambda **k: EMA(**{"model": network(), "halflife_images": 10, **k}), EMA),
    "EMA by decay": (lambda **k: EMA(**{"model": network(), "decay": 0.9, **k}), EMA),
    "PowerEMA": (lambda **k: PowerEMA(**{"model": network(), **k}), PowerEMA),
    "ImageFormat": (lambda **k: ImageFormat(**{"size": (8, 8), **k}), ImageFormat),
    "GlobalBatches": (
        lambda **k: GlobalBatches(**{"num_examples": 9, "batch_size": 4, "seed": 0, **k}), GlobalBatches
    ),
    "BoundSums": (lambda **k: BoundSums(**{"T": 5, **k}), BoundSums),
    "Retries": (lambda **k: Retries(**{"first_wait_seconds": 0, **k}), Retries),
    "make_betas": (make_betas, make_betas),
    "scale_betas_for_timesteps": (
        lambda **k: scale_betas_for_timesteps(**{"num_train_timesteps": 100, **k}), scale_betas_for_timesteps
    ),
    "spaced_timesteps": (
        lambda **k: spaced_timesteps(**{"T": 20, "n": 5, "spacing": "leading", **k}), spaced_timesteps
    ),
    "parse_timesteps": (lambda **k: parse_timesteps(**{"text": "5,0", "T": 20, **k}), None),
    **{
        name: (lambda cls=cls, **k: cls(**{"T": 5, **k}), cls) for name, cls in TIMESTEP_SAMPLERS.items()
    },
}  # fmt: skip
TABLES = {
    SampleArguments: {"model": "somewhere"},
    EMAArguments: {"model": "somewhere"},
    PublishArguments: {},
    ConvertOptions: {"source": "pytorch-ddpm", "checkpoint": "c.pt", "output_dir": "out", "resolution": 32},
    TrainingConfig: {"dataset": "digits", "total_images": 1000, "resolution": [8], "block_out_channels": [32, 32],
                     "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "layers_per_block": 1,
                     "up_block_types": ["AttnUpBlock2D", "UpBlock2D"], "num_train_timesteps": 300},
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_any_argument_of_a_class_works_or_is_named(name):
    make, of = CLASSES[name]
    arguments = ["text", "T"] if of is None else list(inspect.signature(of).parameters)

    @EXHAUSTIVE
    @given(st.dictionaries(st.sampled_from(arguments), ANY, min_size=1, max_size=2))
    def check(changed):
        called = {"timesteps" if name == "parse_timesteps" and key == "text" else key: 0 for key in changed}
        assert_works_or_names(lambda: make(**changed), called or changed)

    check()


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.__name__)
def test_any_option_works_or_is_named(table):
    @settings(EXHAUSTIVE, max_examples=300)
    @given(st.dictionaries(st.sampled_from([spec.name for spec in fields(table)]), ANY, min_size=1, max_size=3))
    def check(changed):
        assert_works_or_names(lambda: table(**TABLES[table] | changed), changed)

    check()


def test_every_option_is_given_every_odd_value():
    for table, base in TABLES.items():
        for spec in fields(table):
            for value in PLAIN + OBJECTS:
                assert_works_or_names(lambda: table(**base | {spec.name: value}), {spec.name: value})  # noqa: B023


def test_any_option_in_a_file_works_or_is_named(tmp_path):
    @settings(EXHAUSTIVE, max_examples=200)
    @given(
        st.dictionaries(st.sampled_from([spec.name for spec in fields(TrainingConfig)]), JSON, min_size=1, max_size=2)
    )
    def check(changed):
        (tmp_path / "my.yaml").write_text(json.dumps(TABLES[TrainingConfig] | changed), encoding="utf-8")
        assert_works_or_names(lambda: parse_config(["--config", str(tmp_path / "my.yaml")]), changed)

    check()


def test_any_option_of_the_command_line_works_or_is_named(tmp_path):
    (tmp_path / "my.yaml").write_text(json.dumps(TABLES[TrainingConfig]), encoding="utf-8")
    words = st.sampled_from(list(map(str, PLAIN))) | st.text(max_size=4)

    @settings(EXHAUSTIVE, max_examples=200)
    @given(st.sampled_from([spec.name for spec in fields(TrainingConfig)]), st.lists(words, max_size=2))
    def check(name, values):
        if not any(value.startswith("-") for value in values):  # another option, or a negative number
            line = ["--config", str(tmp_path / "my.yaml"), f"--{name}", *values]
            # Of too many words, the second is what is not known.
            named = {name: values, "unknown option": 0} if len(values) > 1 else {name: values}
            assert_works_or_names(lambda: parse_config(line), named)

    check()


def test_a_network_of_every_size_in_range_is_built_or_refused():
    @settings(EXHAUSTIVE, max_examples=40)
    @given(
        st.fixed_dictionaries(
            {
                "block_out_channels": st.lists(st.sampled_from([1, 8, 32, 48, 65536]), min_size=2, max_size=2),
                "layers_per_block": st.sampled_from([1, 2, 9]),
                "norm_num_groups": st.integers(1, 40),
                "attention_head_dim": st.none() | st.integers(1, 64),
                "dropout": st.floats(0, 0.999),
                "num_train_timesteps": st.sampled_from([250, 1000, 100_000]),
                "beta_schedule": st.sampled_from(["linear", "jsd", "laplace", "warmup10"]),
                "prediction_type": st.sampled_from(["epsilon", "v_prediction"]),
            }
        )
    )
    def check(changed):
        assert_works_or_names(lambda: check_builds(TrainingConfig(**TABLES[TrainingConfig] | changed)), changed)

    check()


def test_make_timestep_sampler_refuses_any_other_name():
    for value in PLAIN + OBJECTS:
        assert_works_or_names(lambda: make_timestep_sampler(value, 5), {"timestep_sampler": value})  # noqa: B023
