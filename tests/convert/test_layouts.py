"""Layouts name every place of a network once, and count levels and layers."""

from typing import get_args

import pytest

from ddpm_hf.convert.layouts import LAYOUTS, layout_of
from ddpm_hf.convert.options import OPENAI, Source

ATTENDS = (False, True, True)
# Weights whose names tell the kind of resampling.
OF_BLOCKS = {"guided-diffusion": {"output_blocks.1.1.in_layers.0.weight": None}}


@pytest.mark.parametrize("source", [*LAYOUTS, *OPENAI])
@pytest.mark.parametrize("n", [1, 3])
def test_places_are_different_and_are_those_of_our_network(source, n):
    layout = layout_of(source, OF_BLOCKS.get(source, {}))
    pairs = list(layout.places(3, n, ATTENDS.__getitem__))
    for side in zip(*pairs):
        assert len(set(side)) == len(side)
    ours = {place for place, _ in pairs}
    resnets = {f"down_blocks.{i}.resnets.{j}" for i in range(3) for j in range(n)}
    resnets |= {f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(n + 1)}
    assert resnets | {"mid_block.resnets.0", "mid_block.resnets.1"} == {p for p in ours if ".resnets." in p}
    attended = {p.split(".attentions")[0] for p in ours if ".attentions." in p}
    assert attended == {"mid_block", "down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1"}
    assert {p.split(".conv")[0] for p in ours if "samplers" in p} == {
        "down_blocks.0.downsamplers.0", "down_blocks.1.downsamplers.0",
        "up_blocks.0.upsamplers.0", "up_blocks.1.upsamplers.0",
    }  # fmt: skip


@pytest.mark.parametrize("source", [*LAYOUTS, *OPENAI])
@pytest.mark.parametrize(("L", "n"), [(1, 2), (3, 1), (4, 3)])
def test_levels_and_layers_are_counted_from_the_names(source, L, n):
    layout = layout_of(source, OF_BLOCKS.get(source, {}))
    pairs = layout.places(L, n, lambda i: i == 0)
    kinds = {place: "norm.weight" if ".attentions." in ours else "in_layers.0.weight" for ours, place in pairs}
    if source != "guided-diffusion":
        kinds = dict.fromkeys(kinds, "weight")
    assert layout.counts([f"{place}.{kind}" for place, kind in kinds.items()]) == (L, n)


def test_every_source_has_a_layout():
    assert {*LAYOUTS, *OPENAI} == set(get_args(Source))
