"""`UNet2DModelCustom` against `diffusers.UNet2DModel`."""

import json
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from safetensors.torch import load_file, load_model, save_file, save_model
from torch._inductor.cpp_builder import get_cpp_compiler

from ddpm_hf import DDPMSchedulerCustom, UNet2DModelCustom
from ddpm_hf.models.layers import AttentionBlock, ResnetBlock

LEVELS_3 = {
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
ATTENTION_ABOVE = {
    "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
}
# Every argument that changes the computed function, as changes to the tiny network.
CONFIGURATIONS = {
    "two levels": {},
    "one level": {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)},
    "three levels, two layers": LEVELS_3,
    "attention where the size changes": ATTENTION_ABOVE,
    "resnet sampling and attention": {
        **LEVELS_3,
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
    "sampling type left to the default": {**LEVELS_3, "downsample_type": None, "upsample_type": None},
    "resnet sampling blocks": {
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
    },
    "resnet sampling blocks, scale_shift": {
        "down_block_types": ("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        "resnet_time_scale_shift": "scale_shift",
    },
    "old block names": {
        "down_block_types": ("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        "up_block_types": ("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
    },
    "no middle": {"mid_block_type": None},
    "no attention in the middle": {"add_attention": False},
    "scaled middle": {"mid_block_scale_factor": 2**0.5},
    "google/ddpm's time embedding": {"flip_sin_to_cos": False, "freq_shift": 1},
    "fourier time embedding": {"time_embedding_type": "fourier"},
    "learned time embedding": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "custom width of the time embedding": {"time_embedding_dim": 20},
    "odd channels": {"block_out_channels": (7, 14), "norm_num_groups": 7, "attention_head_dim": 7},
    "class table": {"num_class_embeds": 5},
    "class as timestep": {"class_embed_type": "timestep"},
    "class as timestep, fourier": {"class_embed_type": "timestep", "time_embedding_type": "fourier"},
    "class given as an embedding": {"class_embed_type": "identity"},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "scale_shift, normed attention": {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "attention norm with other groups": {"attn_norm_num_groups": 8},
    "dropout, in eval mode": {"dropout": 0.3},
    "padding 0": {**LEVELS_3, "downsample_padding": 0},
    "one head": {"attention_head_dim": None},
    "four heads": {"attention_head_dim": 4},
    "heads that do not divide the channels": {"attention_head_dim": 6},
    "eps and groups": {"norm_eps": 1e-2, "norm_num_groups": 2},
    "relu": {"act_fn": "relu"},
    "gelu": {"act_fn": "gelu"},
    "mish": {"act_fn": "mish"},
    "centered input": {"center_input_sample": True},
    "1 channel": {"in_channels": 1, "out_channels": 1},
    "2 channels": {"in_channels": 2, "out_channels": 2},
    "4 channels": {"in_channels": 4, "out_channels": 4},
    "5 channels": {"in_channels": 5, "out_channels": 5},
    "6 channels": {"in_channels": 6, "out_channels": 6},
    "twice the channels out": {"out_channels": 6},
    "not square": {**LEVELS_3, "sample_size": (8, 16)},
}
each_configuration = pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())

_GOOGLE_256 = {
    "sample_size": 256,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}
# Configuration, millions of parameters, number of tensors.
GOOGLE = {
    "ddpm-cifar10-32": (
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        35.746,
        328,
    ),
    **{f"ddpm-{name}-256": (_GOOGLE_256, 113.673, 450) for name in ("celebahq", "bedroom", "cat", "church")},
}
GOOGLE_COMMON = {
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "norm_num_groups": 32,
}


@pytest.fixture
def pair(unet_config):
    """A U-Net of this package and one of diffusers with the same random weights."""

    def make(**changes) -> tuple[UNet2DModelCustom, UNet2DModel]:
        config = {**unet_config, **changes}
        stock, mine = UNet2DModel(**config).eval(), UNet2DModelCustom(**config).eval()
        loaded = mine.load_state_dict(stock.state_dict(), strict=False)
        assert (loaded.missing_keys, loaded.unexpected_keys) == ([], [])
        return mine, stock

    return make


def inputs(model: UNet2DModel, batch: int = 3, dtype=torch.float32) -> dict:
    """A batch with a timestep per image, and class labels if the model is class-conditional."""
    config = model.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    given = {
        "sample": torch.randn(batch, config.in_channels, *size, dtype=dtype),
        "timestep": torch.tensor([1, 250, 999][:batch]),
    }
    if config.class_embed_type == "identity":
        given["class_labels"] = torch.randn(batch, model.time_embedding.linear_2.out_features, dtype=dtype)
    elif config.class_embed_type == "timestep":
        given["class_labels"] = torch.tensor([3, 40, 500][:batch])
    elif config.num_class_embeds is not None:
        given["class_labels"] = torch.arange(batch) % config.num_class_embeds
    return given


def gradients(model: torch.nn.Module, given: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (model(**given).sample * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_gradients(mine: dict, theirs: dict, rounding: float) -> None:
    """Compare by name. Some gradients are zero in exact arithmetic (to_k.bias), so that the absolute tolerance is relative
    to the largest gradient of the network."""
    assert mine.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    assert largest > 0
    for name, g in theirs.items():
        torch.testing.assert_close(
            mine[name], g, rtol=10 * rounding, atol=rounding * largest.item(), msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------ the same function


# float64 shows any real difference; in float32 the order of summation differs.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@each_configuration
def test_outputs_and_gradients_equal_those_of_stock(pair, changes, dtype, rounding):
    mine, stock = (model.to(dtype) for model in pair(**changes))
    if changes.get("class_embed_type") == "timestep":  # stock keeps the projection of labels in float32, and raises
        stock.time_proj.register_forward_hook(lambda module, args, output: output.to(dtype))
    given = inputs(stock, dtype=dtype)
    expected = stock(**given).sample
    assert expected.std() > 1e-4  # not a trivial prediction
    torch.testing.assert_close(mine(**given).sample, expected, rtol=rounding, atol=rounding)
    weights = torch.randn_like(expected)
    assert_same_gradients(gradients(mine, given, weights), gradients(stock, given, weights), rounding)


@each_configuration
def test_a_seed_gives_the_random_weights_of_stock(unet_config, changes):
    weights, random_states = [], []
    for cls in (UNet2DModel, UNet2DModelCustom):
        torch.manual_seed(0)
        weights.append(cls(**{**unet_config, **changes}).state_dict())
        random_states.append(torch.get_rng_state())
    stock, mine = weights
    assert stock.keys() == mine.keys() and torch.equal(*random_states)
    assert [key for key in stock if not torch.equal(stock[key], mine[key])] == []


@each_configuration
def test_outputs_without_gradients_are_the_same_and_keep_the_inputs(pair, changes):
    """In-place operations are used without gradients."""
    mine, stock = pair(**changes)
    given = inputs(stock)
    expected = mine(**given).sample
    with torch.no_grad():
        kept = {name: value.clone() for name, value in given.items()}
        torch.testing.assert_close(mine(**given).sample, expected, rtol=0, atol=0)
        torch.testing.assert_close(given, kept, rtol=0, atol=0)


@each_configuration
def test_saved_network_loads_in_stock_with_the_same_output(make_unet, tmp_path, diffusers_log, changes):
    mine = make_unet(**changes)
    mine.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stock, report = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert diffusers_log.messages == []
    given = inputs(stock)
    torch.testing.assert_close(mine(**given).sample, stock(**given).sample, rtol=1e-5, atol=1e-5)


@each_configuration
def test_stock_network_loads_and_keeps_its_configuration(pair, tmp_path, diffusers_log, changes):
    stock = pair(**changes)[1]
    stock.save_pretrained(tmp_path / "stock")
    mine, report = UNet2DModelCustom.from_pretrained(tmp_path / "stock", output_loading_info=True)
    assert not any(report.values()), report
    assert diffusers_log.messages == []
    mine.save_pretrained(tmp_path / "mine")
    first, second = (json.loads((tmp_path / who / "config.json").read_text()) for who in ("stock", "mine"))
    assert first == second
    weights = [load_file(tmp_path / who / "diffusion_pytorch_model.safetensors") for who in ("stock", "mine")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize(
    "timestep",
    [7, torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7, 7]), torch.tensor(7.0), torch.tensor([0.5, 7.5, 999])],
    ids=["int", "0-d", "one", "one per image", "float", "fractions"],
)
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_every_form_of_a_timestep_gives_the_output_of_stock(pair, embedding, timestep):
    mine, stock = pair(time_embedding_type=embedding)
    sample = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(mine(sample, timestep).sample, stock(sample, timestep).sample, rtol=1e-5, atol=1e-5)


def test_dropout_masks_equal_those_of_stock(pair):
    # Without attention and with the same memory format, both draw their masks in the same order.
    plain = {
        "down_block_types": ("DownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D"),
        "add_attention": False,
        "dropout": 0.4,
    }
    mine, stock = (model.train().to(memory_format=torch.channels_last) for model in pair(**plain))
    given = inputs(stock)
    results = []
    for model in (mine, stock):
        torch.manual_seed(5)
        results.append(model(**given).sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results[0], mine.eval()(**given).sample, atol=1e-2)


def test_output_is_contiguous_and_a_tuple_on_request(tiny_unet):
    given = inputs(tiny_unet)
    (result,) = tiny_unet(**given, return_dict=False)
    assert torch.equal(result, tiny_unet(**given).sample)
    assert result.is_contiguous()


@pytest.mark.parametrize("name", GOOGLE)
def test_google_networks_have_their_published_size_and_stock_keys(name):
    config, millions, tensors = GOOGLE[name]
    with torch.device("meta"):
        mine, stock = (cls(**GOOGLE_COMMON, **config) for cls in (UNet2DModelCustom, UNet2DModel))
    shapes = {key: value.shape for key, value in mine.state_dict().items()}
    assert shapes == {key: value.shape for key, value in stock.state_dict().items()}
    assert len(shapes) == tensors
    assert round(mine.num_parameters() / 1e6, 3) == millions
    assert list(mine.buffers()) == []


@pytest.mark.parametrize("name", ["ddpm-cifar10-32", "ddpm-cat-256"])
def test_narrow_google_networks_give_the_output_of_stock(pair, name):
    config = {**GOOGLE_COMMON, **GOOGLE[name][0], "norm_num_groups": 4, "sample_size": 32}
    config["block_out_channels"] = tuple(c // 16 for c in config["block_out_channels"])
    mine, stock = (model.double() for model in pair(**config))
    given = inputs(stock, batch=2, dtype=torch.float64)
    torch.testing.assert_close(mine(**given).sample, stock(**given).sample, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ files


def legacy(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the keys of attention as in files of 2022."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for key, value in state.items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        renamed[key] = value.contiguous()
    return renamed


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_legacy_attention_keys_are_loaded(pair, tmp_path, diffusers_log, kind):
    stock = pair(**ATTENTION_ABOVE)[1]
    stock.save_config(tmp_path)
    state = legacy(stock.state_dict())
    assert (
        sum("proj_attn" in key for key in state) == 2 * 4
    )  # weight and bias: one layer down, two up, one in the middle
    if kind == "safetensors":
        save_file(state, tmp_path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    mine, report = UNet2DModelCustom.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    given = inputs(stock)
    torch.testing.assert_close(mine(**given).sample, stock(**given).sample, rtol=1e-5, atol=1e-5)


class Malicious:
    """Unpickling it creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_safetensors": False}])
def test_pickle_with_code_is_refused_and_its_code_does_not_run(tiny_unet, tmp_path, zipped, options):
    trace, folder = tmp_path / "trace", tmp_path / "model"
    tiny_unet.save_config(folder)
    weights = folder / "diffusion_pytorch_model.bin"
    state = {**tiny_unet.state_dict(), "payload": Malicious(trace)}
    torch.save(state, weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises((OSError, ValueError), match="diffusion_pytorch_model.bin"):
        UNet2DModelCustom.from_pretrained(folder, **options)
    assert not trace.exists()
    torch.load(weights, weights_only=False)  # the payload works if the file is trusted
    assert trace.exists()


def test_weights_are_never_written_as_pickle(tiny_unet, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization"):
        tiny_unet.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_saved_configurations_contain_no_local_path(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "first")
    loaded = UNet2DModelCustom.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    assert str(tmp_path) not in (tmp_path / "second" / "config.json").read_text()


@pytest.mark.parametrize("reader", [UNet2DModelCustom, UNet2DModel])
def test_sharded_weights_load_here_and_in_stock(tiny_unet, tmp_path, reader):
    tiny_unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 2
    loaded = reader.from_pretrained(tmp_path)
    given = inputs(tiny_unet)
    torch.testing.assert_close(loaded(**given).sample, tiny_unet(**given).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", [None, "ema"])
@pytest.mark.parametrize("sizes", [("20KB", "10GB"), ("10GB", "20KB"), ("20KB", "40KB")])
def test_save_replaces_a_previous_one_sharded_or_not(make_unet, tmp_path, sizes, variant):
    for size in sizes:
        unet = make_unet()
        unet.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
    loaded = UNet2DModelCustom.from_pretrained(tmp_path, variant=variant)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), unet.parameters(), strict=True))


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_load_with_and_without_low_cpu_mem_usage(tiny_unet, tmp_path, low_cpu_mem_usage):
    tiny_unet.save_pretrained(tmp_path)
    loaded = UNet2DModelCustom.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in loaded.parameters())
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), tiny_unet.parameters(), strict=True))
    assert not loaded.training


@pytest.mark.parametrize(
    "name",
    [
        "two levels",
        "fourier time embedding",
        "learned time embedding",
        "class table",
        "class as timestep",
        "class as timestep, fourier",
        "class given as an embedding",
        "scale_shift",
        "scaled middle",
    ],
)
def test_half_precision_output_is_close_to_full_precision(make_unet, tmp_path, name):
    changes = CONFIGURATIONS[name]
    full = make_unet(**changes)
    full.save_pretrained(tmp_path)
    half = UNet2DModelCustom.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    given = inputs(full)
    if changes.get("time_embedding_type") == "fourier":
        given["timestep"] = torch.tensor([1, 1, 1])  # log 1 = 0: other phases are too large for bfloat16
        if "class_labels" in given:
            given["class_labels"] = torch.tensor([1, 1, 1])
    expected = full(**given).sample
    given = {k: v.bfloat16() if k != "timestep" and v.is_floating_point() else v for k, v in given.items()}
    error = half(**given).sample.float() - expected
    assert error.square().mean() < 0.05**2 * expected.square().mean()


# ------------------------------------------------------------------ training


def test_zero_initialized_network_predicts_zero(make_unet):
    unet = make_unet(**LEVELS_3, zero_init_output=True)
    scheduler = DDPMSchedulerCustom()
    x_0, noise = torch.rand(64, 3, 8, 8) * 2 - 1, torch.randn(64, 3, 8, 8)
    t = torch.randint(0, 1000, (64,))
    prediction = unet(scheduler.add_noise(x_0, noise, t), t).sample
    assert torch.equal(prediction, torch.zeros_like(noise))
    # The mean of n squared standard normals is 1 with standard deviation √(2/n).
    assert abs(F.mse_loss(prediction, noise).item() - 1) < 4 * (2 / noise.numel()) ** 0.5


def test_zero_initialized_network_trains_every_parameter(make_unet):
    unet = make_unet(**LEVELS_3, zero_init_output=True).train()
    for module in unet.modules():
        if isinstance(module, (ResnetBlock, AttentionBlock)):
            last = module.conv2 if isinstance(module, ResnetBlock) else module.to_out[0]
            assert not last.weight.any() and not last.bias.any()
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-3)
    given, target = inputs(unet), torch.randn(3, 3, 8, 8)
    for _ in range(3):  # gradients reach one more layer in each step
        optimizer.zero_grad()
        F.mse_loss(unet(**given).sample, target).backward()
        optimizer.step()
    still = [name for name, p in unet.named_parameters() if not p.grad.any()]
    assert still == []


def test_zero_initialization_is_not_saved_nor_applied_on_loading(make_unet, tmp_path):
    unet = make_unet(zero_init_output=True)
    torch.nn.init.ones_(unet.conv_out.weight)
    unet.save_pretrained(tmp_path)
    assert "zero_init_output" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(UNet2DModelCustom.from_pretrained(tmp_path).conv_out.weight, unet.conv_out.weight)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("changes", [LEVELS_3, CONFIGURATIONS["resnet sampling blocks"]])
def test_gradient_checkpointing_recomputes_with_the_same_gradients(make_unet, changes, dropout):
    unet = make_unet(**changes, dropout=dropout).train()
    given = inputs(unet)
    weights = torch.randn(3, 3, 8, 8)
    calls = []
    for stage in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for resnet in stage.resnets:
            resnet.norm1.register_forward_hook(lambda *_: calls.append(1))
    results, counts = [], []
    for enable in (False, True):
        (unet.enable_gradient_checkpointing if enable else unet.disable_gradient_checkpointing)()
        calls.clear()
        torch.manual_seed(3)
        results.append(gradients(unet, given, weights))
        counts.append(len(calls))
    assert_same_gradients(results[1], results[0], 1e-6)
    assert counts[1] == 2 * counts[0]


# ------------------------------------------------------------------ diffusers' tools


def assert_stocks_output(mine: UNet2DModelCustom, stock: UNet2DModel) -> None:
    given = inputs(stock)
    with torch.no_grad():
        torch.testing.assert_close(mine(**given).sample, stock(**given).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
@pytest.mark.parametrize("changes", [{}, {"mid_block_scale_factor": 2.0, "attention_head_dim": 4}])
def test_diffusers_attention_processors_give_the_same_output(pair, processor, changes):
    mine, stock = pair(**changes)
    mine.set_attn_processor(processor())
    assert {type(p) for p in mine.attn_processors.values()} == {processor}
    assert_stocks_output(mine, stock)


def test_custom_processor_is_called_once_per_attention_block(pair):
    mine, stock = pair(**LEVELS_3)
    calls = []

    class Counting(AttentionBlock._default_processor_cls):
        def __call__(self, attn, x):
            calls.append(attn)
            return super().__call__(attn, x)

    mine.set_attn_processor(Counting())
    assert_stocks_output(mine, stock)
    assert calls == [
        m
        for part in (mine.down_blocks, mine.mid_block, mine.up_blocks)
        for m in part.modules()
        if isinstance(m, AttentionBlock)
    ]


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends_give_the_same_output(pair, backend):
    mine, stock = pair()
    # diffusers makes a network's backend that of every other network in the process: others of this suite round otherwise.
    with attention_backend("native"):
        mine.set_attention_backend(backend)
        assert {p._attention_backend.value for p in mine.attn_processors.values()} == {backend}
        assert_stocks_output(mine, stock)
        mine.reset_attention_backend()
        assert_stocks_output(mine, stock)


def test_fused_projections_give_the_same_output_and_are_not_saved(pair, tmp_path):
    mine, stock = pair()
    mine.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name in mine.state_dict())
    assert_stocks_output(mine, stock)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        mine.save_pretrained(tmp_path)
    mine.unfuse_qkv_projections()
    assert mine.state_dict().keys() == stock.state_dict().keys()
    assert_stocks_output(mine, stock)


def test_attention_slicing_is_accepted_and_changes_nothing(pair):
    mine, stock = pair()
    for module in mine.modules():
        if hasattr(module, "set_attention_slice"):
            module.set_attention_slice(1)
    assert_stocks_output(mine, stock)


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers may be installed")
def test_missing_xformers_is_reported(tiny_unet):
    with pytest.raises((ModuleNotFoundError, ValueError), match="xformers"):
        tiny_unet.enable_xformers_memory_efficient_attention()


def test_layerwise_casting_gives_the_output_of_stock(pair):
    """8-bit weights except in norms, float32 arithmetic."""
    mine, stock = pair()
    for model in (mine, stock):
        model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.float8_e4m3fn in {p.dtype for p in mine.parameters()}
    assert {n: p.dtype for n, p in mine.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
    assert_stocks_output(mine, stock)


@pytest.mark.parametrize(
    "placement",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"device_map": "auto", "max_memory": {"cpu": "40KB"}}],
)
def test_device_map_gives_the_same_output(pair, tmp_path, placement):
    mine, stock = pair(**LEVELS_3)
    mine.save_pretrained(tmp_path / "model")
    placed = UNet2DModelCustom.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "disk", **placement).eval()
    if "max_memory" in placement:
        assert "disk" in placed.hf_device_map.values()
    assert_stocks_output(placed, stock)


def test_lora_adapter_trains_alone_and_is_saved_and_loaded(pair, tmp_path):
    mine, stock = pair()
    mine.requires_grad_(False)
    mine.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    given = inputs(stock)
    output = mine(**given).sample
    assert (output - stock(**given).sample).abs().max() > 1e-3
    output.square().mean().backward()
    trained = [name for name, p in mine.named_parameters() if p.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    mine.save_lora_adapter(tmp_path)
    other = UNet2DModelCustom(**{k: v for k, v in mine.config.items() if not k.startswith("_")}).eval()
    other.load_state_dict(stock.state_dict())
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(other(**given).sample, output, rtol=1e-5, atol=1e-5)
    mine.disable_adapters()
    assert_stocks_output(mine, stock)


# ------------------------------------------------------------------ how it is computed


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_are_in_channels_last_memory(tiny_unet, tmp_path, low_cpu_mem_usage):
    tiny_unet.save_pretrained(tmp_path)
    loaded, _ = UNet2DModelCustom.from_pretrained(
        tmp_path, low_cpu_mem_usage=low_cpu_mem_usage, output_loading_info=True
    )
    for unet in (tiny_unet, loaded):
        kernels = [p for p in unet.parameters() if p.ndim == 4]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_state_dict_shares_memory_with_the_parameters(tiny_unet):
    """For averages of weights that are copied into the tensors of a state dict."""
    for tensor in tiny_unet.state_dict().values():
        tensor.fill_(0.25)
    assert all((p == 0.25).all() for p in tiny_unet.parameters())


@pytest.mark.parametrize("reader", [UNet2DModelCustom, UNet2DModel])
def test_save_model_of_safetensors_writes_weights_for_both(tiny_unet, unet_config, tmp_path, reader):
    save_model(tiny_unet, tmp_path / "weights.safetensors")
    loaded = reader(**unet_config).eval()
    assert load_model(loaded, tmp_path / "weights.safetensors") == (set(), [])
    assert_stocks_output(tiny_unet, loaded)
    tiny_unet.save_pretrained(tmp_path)
    saved, whole = (
        load_file(tmp_path / "weights.safetensors"),
        load_file(tmp_path / "diffusion_pytorch_model.safetensors"),
    )
    assert saved.keys() == whole.keys() and all(torch.equal(saved[name], whole[name]) for name in whole)


def has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except Exception:
        return False
    return True


def assert_compiled_is_eager(unet: UNet2DModelCustom, backend: str) -> None:
    given = inputs(unet)
    expected = unet(**given).sample
    weights = torch.randn_like(expected)
    expected_gradients = gradients(unet, given, weights)
    torch._dynamo.reset()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    unet.zero_grad()
    result = compiled(**given).sample
    (result * weights).sum().backward()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    found = {name: p.grad for name, p in unet.named_parameters() if p.requires_grad}
    assert_same_gradients(found, expected_gradients, 1e-5)


@pytest.mark.skipif(not has_compiler(), reason="torch.compile on the CPU needs a C++ compiler, none was found")
def test_compiled_outputs_and_gradients_equal_the_eager_ones(make_unet):
    # A small network, because every kernel takes seconds to compile. The next test traces the other blocks.
    network = {
        "block_out_channels": (8,),
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    assert_compiled_is_eager(make_unet(**network).train(), "inductor")


@pytest.mark.parametrize("name", ["resnet sampling blocks, scale_shift", "class as timestep, fourier"])
def test_network_traces_into_one_graph_forward_and_backward(make_unet, name):
    assert_compiled_is_eager(make_unet(**CONFIGURATIONS[name]).train(), "aot_eager")


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, ["down_block_types", "SkipDown", "AttnDownBlock2D"]),
        ({"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, ["up_block_types", "CrossAttn", "ResnetUpsample"]),
        ({"down_block_types": ("DownBlock2D",)}, ["down_block_types", "block_out_channels"]),
        ({"up_block_types": ("UpBlock2D",) * 3}, ["up_block_types", "block_out_channels"]),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, ["mid_block_type", "'UNetMidBlock2D'"]),
        ({"time_embedding_type": "rotary"}, ["time_embedding_type", "'positional', 'fourier', 'learned'"]),
        ({"time_embedding_type": "learned"}, ["num_train_timesteps"]),
        ({"class_embed_type": "text"}, ["class_embed_type", "'timestep', 'identity'"]),
        ({"resnet_time_scale_shift": "spatial"}, ["resnet_time_scale_shift", "'default', 'scale_shift'"]),
        ({"downsample_type": "fir"}, ["downsample_type", "'conv', 'resnet'"]),
        ({"upsample_type": "fir"}, ["upsample_type", "'conv', 'resnet'"]),
        ({"downsample_padding": 2}, ["downsample_padding", "[0, 1]"]),
        ({"norm_num_groups": 5}, ["norm_num_groups", "block_out_channels", "(8, 16)", "5"]),
        ({"norm_num_groups": None}, ["norm_num_groups", "None"]),
        ({"attn_norm_num_groups": 5}, ["attn_norm_num_groups", "16"]),
        ({"attention_head_dim": 32}, ["attention_head_dim", "32"]),
        ({"act_fn": "tanhshrink"}, ["tanhshrink", "silu"]),
    ],
)
def test_bad_configuration_is_refused_by_name(unet_config, changes, named):
    with pytest.raises(ValueError) as error:
        UNet2DModelCustom(**{**unet_config, **changes})
    assert all(part in str(error.value) for part in named), error.value


@pytest.mark.parametrize(
    ("config", "given", "named"),
    [
        (LEVELS_3, {"sample": torch.zeros(2, 3, 8, 10)}, ["multiples of 4", "8×10"]),
        (LEVELS_3, {"sample": torch.zeros(2, 3, 6, 8)}, ["multiples of 4", "6×8"]),
        ({}, {"sample": torch.zeros(2, 3, 9, 8)}, ["multiples of 2", "9×8"]),
        ({}, {"sample": torch.zeros(2, 1, 8, 8)}, ["sample", "(B, 3, H, W)", "(2, 1, 8, 8)"]),
        ({}, {"sample": torch.zeros(3, 8, 8)}, ["sample", "(3, 8, 8)"]),
        ({}, {"timestep": torch.tensor([1, 2, 3])}, ["timestep", "2", "3"]),
        ({}, {"class_labels": torch.tensor([1, 2])}, ["class_labels", "unconditional"]),
        ({"num_class_embeds": 5}, {}, ["class_labels", "class-conditional"]),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 5])}, ["class_labels", "0..4", "[1, 5]"]),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([-1, 0])}, ["class_labels", "0..4", "-1"]),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 2, 3])}, ["class_labels", "(3,)"]),
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1.0, 2.0])}, ["class_labels", "integers"]),
        ({"num_class_embeds": 5}, {"class_labels": torch.eye(5)[:2].long()}, ["class_labels", "(2, 5)"]),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 10},
            {"timestep": torch.tensor([3, 10])},
            ["timestep", "0..9", "10"],
        ),
    ],
)
def test_bad_input_is_refused_by_name(make_unet, config, given, named):
    with pytest.raises(ValueError) as error:
        make_unet(**config)(**{"sample": torch.zeros(2, 3, 8, 8), "timestep": 1, **given})
    assert all(part in str(error.value) for part in named), error.value


def test_size_multiple_is_the_smallest_size_that_fits(make_unet):
    unet = make_unet(**LEVELS_3)
    assert unet.size_multiple == 4
    assert unet(torch.zeros(1, 3, 4, 4), 1).sample.shape == (1, 3, 4, 4)


def test_folder_of_another_kind_of_network_is_refused(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D", "CrossAttnDownBlock2D"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="CrossAttnDownBlock2D"):
        UNet2DModelCustom.from_pretrained(tmp_path)


def test_missing_weights_are_named(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "bare")
    (tmp_path / "bare" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        UNet2DModelCustom.from_pretrained(tmp_path / "bare")


def rewrite(folder, change) -> None:
    """Save the weights of a folder again after `change(weights)`."""
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("conv_in.bias"), "it lacks conv_in.bias"),
        (lambda w: w.clear(), "it lacks conv_in.bias, conv_in.weight.* and 139 others"),
        (lambda w: w.update({"foo": torch.ones(1)}), "it has the unknown foo"),
        (lambda w: w.update({"conv_in.bias": torch.ones(9)}), r"conv_in.bias must have shape \(8,\), got \(9,\)"),
        (
            lambda w: w.update({"conv_in.bias": torch.ones(8, dtype=torch.int64)}),
            "conv_in.bias must hold floating-point",
        ),
        (lambda w: w.update({"conv_in.bias": torch.ones(8, dtype=torch.complex64)}), "conv_in.bias must hold floating"),
        (lambda w: w["conv_in.bias"].fill_(torch.nan), "conv_in.bias holds NaN"),
        (lambda w: w["conv_out.weight"][0, 0, 0].fill_(-torch.inf), "conv_out.weight holds NaN or infinite"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"low_cpu_mem_usage": False}, {"torch_dtype": torch.float16}, {"shards": True}]
)
def test_weights_that_do_not_fit_are_refused_by_name(tiny_unet, tmp_path, change, words, options):
    tiny_unet.save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    source = tmp_path / "diffusion_pytorch_model.safetensors"
    if options == {"shards": True}:
        options, weights = {}, load_file(source)
        source.rename(tmp_path / "shard.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys([*weights, "w"], "shard.safetensors")}
        (tmp_path / f"{source.name}.index.json").write_text(json.dumps(index))
        source = tmp_path / "shard.safetensors"
    with pytest.raises(ValueError, match=words) as error:
        UNet2DModelCustom.from_pretrained(tmp_path, **options)
    assert str(source) in str(error.value) and torch.get_default_dtype() == torch.float32


def test_other_shapes_are_drawn_only_where_that_is_asked_for(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda w: w.update({"conv_out.bias": torch.ones(6)}))
    options = {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": False}
    loaded = UNet2DModelCustom.from_pretrained(tmp_path, **options)
    assert loaded.conv_out.bias.shape == (3,)
    assert torch.equal(loaded.conv_in.weight, tiny_unet.conv_in.weight)


@pytest.mark.parametrize("shard", ["../shard.safetensors", "missing.safetensors"])
def test_shards_elsewhere_or_missing_are_refused(tiny_unet, tmp_path, shard):
    folder = tmp_path / "model"
    tiny_unet.save_pretrained(folder)
    shutil.move(folder / "diffusion_pytorch_model.safetensors", tmp_path / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tiny_unet.state_dict(), shard)}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=shard) as error:
        UNet2DModelCustom.from_pretrained(folder)
    assert str(path) in str(error.value)


def test_an_error_leaves_the_default_precision(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dropout": 7}))
    with pytest.raises(ValueError, match="dropout must be") as error:
        UNet2DModelCustom.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert str(tmp_path / "config.json") in str(error.value) and torch.get_default_dtype() == torch.float32


def test_unknown_configuration_entries_are_named_in_a_warning(tiny_unet, tmp_path, diffusers_log):
    """As in diffusers: entries of later versions must not make a model useless."""
    tiny_unet.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "foo": 1}))
    UNet2DModelCustom.from_pretrained(tmp_path)
    assert any("'foo'" in message and "config.json" in message for message in diffusers_log.messages)
