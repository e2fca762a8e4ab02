"""The public names, and how the classes match those of diffusers."""

import inspect
import subprocess
import sys

import diffusers
import pytest

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.interop import refuse_pickle, stock_config


def test_every_public_name_is_importable():
    assert {"DDPMPipelineCustom", "DDPMSchedulerCustom", "UNet2DModelCustom", "GaussianDiffusion"} <= set(
        ddpm_hf.__all__
    )
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None


def test_import_does_not_import_torch():
    code = "import sys, ddpm_hf; print(ddpm_hf.__version__, sorted({'torch', 'diffusers', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (ran.stdout.strip(), ran.stderr) == (f"{ddpm_hf.__version__} []", "")


def test_public_names_are_listed_and_unknown_ones_are_named():
    assert set(ddpm_hf.__all__) <= set(dir(ddpm_hf))
    with pytest.raises(AttributeError, match="'ddpm_hf' has no attribute 'DDIMPipelineCustom'"):
        _ = ddpm_hf.DDIMPipelineCustom


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_constructors_have_the_arguments_and_defaults_of_diffusers(tiny_pipeline, part):
    mine = getattr(tiny_pipeline, part)
    taken, stocks = (
        [(p.name, p.default) for p in inspect.signature(cls.__init__).parameters.values()]
        for cls in (type(mine), mine.stock_class)
    )
    assert taken[: len(stocks)] == stocks
    assert [name for name, _ in taken[len(stocks) :]] == list(mine.own_arguments)


@pytest.mark.parametrize(
    ("mine", "stock", "method"),
    [
        (UNet2DModelCustom, diffusers.UNet2DModel, "forward"),
        (UNet2DModelCustom, diffusers.UNet2DModel, "save_pretrained"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "step"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "set_timesteps"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "add_noise"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "get_velocity"),
        (DDPMSchedulerCustom, diffusers.DDPMScheduler, "scale_model_input"),
        (DDPMPipelineCustom, diffusers.DDPMPipeline, "__init__"),
        (DDPMPipelineCustom, diffusers.DDPMPipeline, "__call__"),
    ],
)
def test_positional_arguments_are_those_of_diffusers(mine, stock, method):
    def positional(cls) -> list[str]:
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    # use_flashpack is for another file format than safetensors.
    expected = [name for name in positional(stock) if name != "use_flashpack"]
    assert positional(mine)[: len(expected)] == expected


def test_saved_configurations_hold_no_local_path(tiny_pipeline):
    tiny_pipeline.unet.register_to_config(_name_or_path="/home/somebody/model")
    assert "somebody" not in tiny_pipeline.unet.to_json_string()
    assert "_name_or_path" not in stock_config(tiny_pipeline.unet)
    assert stock_config(diffusers.DDIMScheduler())["_class_name"] == "DDIMScheduler"


def test_pickle_is_refused():
    refuse_pickle(True)
    with pytest.raises(ValueError, match="safe_serialization=False"):
        refuse_pickle(False)


@pytest.mark.parametrize(
    "attribute",
    ["_supports_gradient_checkpointing", "_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"],
)
def test_network_has_the_attributes_that_diffusers_tools_read(tiny_unet, attribute):
    value = getattr(tiny_unet, attribute)
    assert value
    kinds = {type(module).__name__ for module in tiny_unet.modules()}
    if attribute in ("_no_split_modules", "_repeated_blocks"):
        assert set(value) <= kinds


@pytest.mark.parametrize("cls", [UNet2DModelCustom, DDPMSchedulerCustom])
def test_arguments_that_a_class_does_not_have_are_refused(cls, tiny_pipeline, tmp_path):
    part = tiny_pipeline.unet if cls is UNet2DModelCustom else tiny_pipeline.scheduler
    part.save_pretrained(tmp_path)
    for load in (
        lambda **kwargs: cls.from_pretrained(tmp_path, **kwargs),
        lambda **k: cls.from_config(part.config, **k),
    ):
        load()
        with pytest.raises(TypeError, match=f"{cls.__name__} has no argument dropuot"):
            load(dropuot=1)
    assert cls.from_config(part.config, return_unused_kwargs=True, dropuot=1)[1]["dropuot"] == 1


@pytest.mark.parametrize("content", ["[]", "null", '{"_class_name": 5}', '{"num_train_timesteps": "x"}', "{"])
def test_configurations_that_describe_no_scheduler_are_refused(tmp_path, content):
    path = tmp_path / "scheduler_config.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        DDPMSchedulerCustom.from_pretrained(tmp_path)
    assert str(path) in str(error.value)
