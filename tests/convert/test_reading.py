"""Weights are found in checkpoints of any form, and no code is run."""

import pytest
import torch
from safetensors.torch import save_file

from ddpm_hf.convert.reading import read_weights

AVERAGED, LAST = {"a": torch.ones(2)}, {"a": torch.zeros(2)}
FORMS = {
    "pytorch-ddpm": {"net_model": LAST, "ema_model": AVERAGED, "step": 3, "optim": {"state": {}}, "x_T": torch.ones(1)},
    "ddpm-torch": {"model": LAST, "ema": {"decay": 0.9, "shadow": AVERAGED, "num_updates": 5}, "epoch": 1},
    "parallel": {"model": {"module.a": LAST["a"]}, "ema": {"module.a": AVERAGED["a"]}},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_averaged_weights_are_read_unless_others_are_asked_for(tmp_path, form):
    torch.save(FORMS[form], tmp_path / "c.pt")
    for which, expected in ((None, AVERAGED), ("ema", AVERAGED), ("model", LAST)):
        found = read_weights(tmp_path / "c.pt", which)
        assert found.keys() == {"a"} and torch.equal(found["a"], expected["a"])


def test_a_plain_dict_of_tensors_is_what_it_is(tmp_path):
    torch.save(LAST, tmp_path / "c.pt")
    save_file(LAST, tmp_path / "c.safetensors")
    for name in ("c.pt", "c.safetensors"):
        for which in (None, "ema", "model"):
            assert torch.equal(read_weights(tmp_path / name, which)["a"], LAST["a"])


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path):
    torch.save({"model": LAST, "epoch": 1}, tmp_path / "c.pt")
    assert torch.equal(read_weights(tmp_path / "c.pt")["a"], LAST["a"])
    with pytest.raises(ValueError, match=r"must hold weights 'ema', .* it has \['model', 'epoch'\]"):
        read_weights(tmp_path / "c.pt", "ema")
    torch.save({"epoch": 1}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="must hold weights, tensors by their names"):
        read_weights(tmp_path / "none.pt")


class Trap:
    def __reduce__(self):
        return (print, ("code was run",))


def test_code_in_a_checkpoint_is_not_run(tmp_path, capfd):
    torch.save({"model": LAST, "args": Trap()}, tmp_path / "c.pt")
    with pytest.raises(OSError, match="damaged, or reading it could run code"):
        read_weights(tmp_path / "c.pt")
    assert "code was run" not in capfd.readouterr().out


def test_files_that_are_missing_or_no_weights_are_named(tmp_path):
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(OSError, match="page.pt does not hold weights: it is a web page"):
        read_weights(tmp_path / "page.pt")
    with pytest.raises(FileNotFoundError, match="nothing.pt is no file"):
        read_weights(tmp_path / "nothing.pt")
