"""The public names, and how far the classes are those of diffusers."""

import inspect

import diffusers
import pytest

import ddpm_hf
from ddpm_hf import DDPMPipelineCustom, DDPMSchedulerCustom, UNet2DModelCustom


def test_every_public_name_is_importable():
    assert {"DDPMPipelineCustom", "DDPMSchedulerCustom", "UNet2DModelCustom", "GaussianDiffusion"} <= set(
        ddpm_hf.__all__
    )
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None


@pytest.mark.parametrize("part", ["unet", "scheduler"])
def test_constructors_take_stocks_arguments_in_stocks_order_with_stocks_defaults(tiny_pipeline, part):
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
def test_a_call_written_for_stock_fits(mine, stock, method):
    def positional(cls) -> list[str]:
        parameters = inspect.signature(getattr(cls, method)).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    # use_flashpack is for another file format than safetensors.
    expected = [name for name in positional(stock) if name != "use_flashpack"]
    assert positional(mine)[: len(expected)] == expected


@pytest.mark.parametrize(
    "attribute",
    ["_supports_gradient_checkpointing", "_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"],
)
def test_the_network_tells_diffusers_tools_what_they_ask(tiny_unet, attribute):
    value = getattr(tiny_unet, attribute)
    assert value
    kinds = {type(module).__name__ for module in tiny_unet.modules()}
    if attribute in ("_no_split_modules", "_repeated_blocks"):
        assert set(value) <= kinds
