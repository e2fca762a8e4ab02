"""The static Space: the page's files, and a card that the Hub reads."""

import yaml

from ddpm_hf.demo.site import WEB
from ddpm_hf.demo.static_space import space_files


def test_the_space_has_the_page_its_model_and_a_card(exports):
    files = space_files(exports[1], "Digits", "user/digits")
    assert files.keys() >= {"index.html", "model.json", "model.onnx", "README.md"}
    assert {path.name for path in WEB.iterdir() if path.is_file()} <= files.keys()
    _, metadata, text = files["README.md"].decode().split("---\n")
    card = yaml.safe_load(metadata)
    assert (card["title"], card["sdk"], card["app_file"], card["models"]) == (
        *("Digits", "static", "index.html"),
        ["user/digits"],
    )
    assert "https://huggingface.co/user/digits" in text


def test_a_model_that_is_not_on_the_hub_has_no_link(exports):
    card = space_files(exports[1], "Digits")["README.md"].decode()
    assert "models" not in yaml.safe_load(card.split("---\n")[1]) and "huggingface.co" not in card
