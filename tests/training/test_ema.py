"""EMA against its closed form, for any batch size and dtype."""

import pytest
import torch

from ddpm_hf.training.ema import EMA, load_parameters


def linear(value=0.0, dtype=torch.float32):
    model = torch.nn.Linear(3, 2).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def test_the_average_of_a_constant_model_is_that_model():
    model = linear(1.5)
    ema = EMA(model, halflife_images=100)
    for step in range(1, 20):
        ema.update(model, step * 8, 8)
    assert all((average == 1.5).all() for average in ema.state_dict().values())


@pytest.mark.parametrize("batch_size", [1, 10, 50])
def test_half_life_is_in_images_at_any_batch_size(batch_size):
    model = linear(0.0)
    ema = EMA(model, halflife_images=100, warmup=False)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
    for images_seen in range(batch_size, 301, batch_size):
        ema.update(model, images_seen, batch_size)
    for average in ema.state_dict().values():
        torch.testing.assert_close(average, torch.full_like(average, 1 - 0.5**3))


def test_warmup_limits_the_half_life_to_5_percent_of_images_seen():
    ema = EMA(linear(), halflife_images=1000)
    assert ema.decay(images_seen=200, batch_size=10) == pytest.approx(0.5 ** (10 / 10))
    assert ema.decay(images_seen=10**6, batch_size=10) == pytest.approx(0.5 ** (10 / 1000))


def test_the_average_of_a_bf16_model_accumulates_small_updates():
    model = linear(1.0, torch.bfloat16)
    ema = EMA(model, halflife_images=1000, warmup=False)
    for parameter in model.parameters():
        parameter.data.fill_(2.0)
    for step in range(5000):
        ema.update(model, step + 1, 1)
    for average in ema.state_dict().values():
        torch.testing.assert_close(average, torch.full_like(average, 2 - 0.5**5), rtol=1e-3, atol=0)


def test_a_loaded_average_continues_bit_identically():
    torch.manual_seed(0)
    model, steps = torch.nn.Linear(4, 4), [torch.randn(4, 4) for _ in range(6)]
    straight, stopped = EMA(model, 50), EMA(model, 50)
    for i, step in enumerate(steps):
        model.weight.data.copy_(step)
        straight.update(model, (i + 1) * 5, 5)
        stopped.update(model, (i + 1) * 5, 5)
        if i == 2:
            saved = {name: value.clone() for name, value in stopped.state_dict().items()}
            stopped = EMA(model, 50)
            stopped.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(straight.state_dict().values(), stopped.state_dict().values()))


def test_loaded_parameters_keep_the_dtype_of_the_model():
    ema, target = EMA(linear(0.25), 10), linear(9.0, torch.bfloat16)
    load_parameters(target, ema.state_dict().values())
    assert all((p == 0.25).all() and p.dtype == torch.bfloat16 for p in target.parameters())


def test_the_average_of_another_model_is_rejected():
    ema = EMA(linear(), 10)
    with pytest.raises(ValueError, match="other parameters"):
        ema.load_state_dict({"weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"other parameters: \[\('weight', \(2, 3\)\), \('weight', \(2, 4\)\)\]"):
        ema.load_state_dict({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"halflife_images": 0}, r"halflife_images must be a finite number in \(0, inf\), got 0"),
        ({"decay": 1.0}, r"decay must be a finite number in \(0, 1\), got 1.0"),
        ({"decay": 0.0}, r"decay must be a finite number in \(0, 1\)"),
        ({}, "either halflife_images or decay"),
        ({"halflife_images": 5, "decay": 0.9}, "either halflife_images or decay"),
    ],
)
def test_invalid_lengths_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(linear(), **arguments)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_fixed_decay_is_per_step_at_any_batch_size(batch_size):
    torch.manual_seed(0)
    values, model = torch.randn(30).tolist(), linear(0.5)
    ema = EMA(model, decay=0.9, warmup=False)
    for step, value in enumerate(values, start=1):
        for parameter in model.parameters():
            parameter.data.fill_(value)
        ema.update(model, step * batch_size, batch_size)
    expected = 0.9**30 * 0.5 + sum(0.1 * 0.9 ** (29 - i) * value for i, value in enumerate(values))
    for average in ema.state_dict().values():
        torch.testing.assert_close(average, torch.full_like(average, expected))


def test_warmup_of_a_fixed_decay_ends_at_that_decay():
    ema = EMA(linear(), decay=0.99)
    assert [ema.decay(8 * (step + 1), 8) for step in (0, 8, 10**6)] == pytest.approx([1 / 10, 9 / 18, 0.99])


def test_in_place_of_restores_the_weights_after_an_error():
    model = linear(0.1, torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    ema = EMA(linear(0.75), 10)
    with pytest.raises(KeyError), ema.in_place_of(model):
        assert all((p == 0.75).all() for p in model.parameters())
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_does_not_change_the_average(dtype):
    ema, model = EMA(linear(0.3), 100), linear(0.7, dtype)
    before = {name: value.clone() for name, value in ema.state_dict().items()}
    ema.update(model, 8, 8, skipped=torch.tensor(1.0))
    assert all(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
    ema.update(model, 8, 8, skipped=torch.tensor(0.0))
    assert not any(torch.equal(value, before[name]) for name, value in ema.state_dict().items())
