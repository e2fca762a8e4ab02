"""Runs whose images have a number or a vector as their condition: trained, resumed, streamed, sampled and measured."""

import copy
import json

import datasets
import numpy as np
import pytest
import torch
from ddpm_hf.scripts import choose_ema, evaluate, sample, train
from PIL import Image
from transformers import CLIPImageProcessorPil, Dinov2Config, Dinov2Model

from ddpm_hf import DDPMPipelineCustom
from ddpm_hf.data.finding import open_dataset
from ddpm_hf.evaluation import bounds, measures
from ddpm_hf.training.build import build
from ddpm_hf.training.presets import parse_config
from tests.conftest import flags
from tests.training.helpers import TINY, assert_bit_identical, drop_checkpoints_after, run

KINDS = ("timestep", "identity")
WIDTH = 32  # 4 × the first of TINY's block_out_channels
NUM_IMAGES = 128
CONDITIONAL = ["--label_column", "condition", "--class_embed_type"]
NETWORK = flags(
    config="custom",
    channels=1,
    resolution=8,
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    num_train_timesteps=20,
    beta_schedule="squaredcos_cap_v2",
    prediction_type="sample",
)


def condition(kind, brightness):
    return 1000 * brightness if kind == "timestep" else [2 * brightness - 1] + [0.5] * (WIDTH - 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of images of one gray value each, with a condition that is linear in it."""
    made = {}
    for kind in KINDS:
        made[kind] = tmp_path_factory.mktemp(kind)
        rows = []
        for i in range(NUM_IMAGES):
            Image.new("L", (8, 8), 2 * i).save(made[kind] / f"{i:03d}.png")
            rows.append({"file_name": f"{i:03d}.png", "condition": condition(kind, 2 * i / 255)})
        (made[kind] / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def options(folders, kind):
    return [*NETWORK, "--dataset", str(folders[kind]), *CONDITIONAL, kind]


@pytest.fixture(scope="module", params=KINDS)
def trained(request, folders, tmp_path_factory):
    """The kind of condition, and the folder of a model that has learned it."""
    folder = tmp_path_factory.mktemp("trained")
    learning = flags(total_images=130 * 32, batch_size=32, learning_rate=5e-3, warmup_steps=10, ema_halflife_images=640)
    learning += flags(sample_steps=4, checkpoint_every_steps=130)
    train.main([*TINY, *options(folders, request.param), *learning, "--output_dir", str(folder)])
    return request.param, folder


def test_the_brightness_of_samples_follows_the_condition(trained):
    kind, folder = trained
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    brightness = np.linspace(0.05, 0.95, 10)
    images = pipe(10, seed=0, class_labels=[condition(kind, b) for b in brightness], output_type="np").images
    np.testing.assert_allclose(images.mean((1, 2, 3)), brightness, atol=0.1)
    one = pipe(2, seed=0, class_labels=condition(kind, 0.5), output_type="np").images
    np.testing.assert_allclose(one.mean((1, 2, 3)), 0.5, atol=0.1)


def test_the_card_says_how_to_give_a_condition(trained):
    kind, folder = trained
    card = (folder / "README.md").read_text()
    assert f"class_labels={'0.0' if kind == 'timestep' else '[0.0] * 32'}).images" in card
    assert "`condition` of the data set, for all images" in card and " classes " not in card.split("## Training")[0]
    assert ("torch.zeros(16)," if kind == "timestep" else "torch.zeros(16, 32),") in card


def test_conditions_of_sampling_are_a_number_or_rows_of_a_file(trained, tmp_path):
    kind, folder = trained
    brightness = [0.2, 0.8]
    np.save(tmp_path / "rows.npy", np.float32([condition(kind, b) for b in brightness]))
    command = ["--model", str(folder), "--output_dir", str(tmp_path / "out"), "--num_images=3", "--format=parquet"]
    sample.main([*command, "--class_label", str(tmp_path / "rows.npy")])
    rows = datasets.Dataset.from_parquet(str(tmp_path / "out" / "seed0-3.parquet"), cache_dir=str(tmp_path / "cache"))
    expected = [condition(kind, b) for b in (0.2, 0.8, 0.2)]
    np.testing.assert_allclose(rows["label"][:], expected, rtol=1e-6)
    np.testing.assert_allclose([np.asarray(row["image"]).mean() / 255 for row in rows], [0.2, 0.8, 0.2], atol=0.1)
    np.save(tmp_path / "rows.npy", np.float32([condition(kind, 0.5)]))
    for given, message in (
        (["--class_label", str(tmp_path / "rows.npy")], "made with other options .*class_label 'sha256"),
        (
            ["--class_label", "bright"],
            "class_label must be a class of the model, a number or a .npy file, got 'bright'",
        ),
        ([], "class_labels must be given"),
    ):
        with pytest.raises(SystemExit, match=f"sample.py: error: .*{message}"):
            sample.main([*command, *given])
    if kind == "timestep":
        sample.main([*command, "--class_label=250.5", "--seed=1"])
        assert json.loads((tmp_path / "out" / "seed1.json").read_text())["class_label"] == 250.5
    else:
        with pytest.raises(SystemExit, match=r"class_labels must be a vector of \(32,\) numbers"):
            sample.main([*command, "--class_label=250.5", "--seed=1"])


@pytest.fixture(scope="module")
def halves(folders, tmp_path_factory):
    """Of each kind, a data set with a training and a test split, saved in a folder."""
    saved = {}
    for kind in KINDS:
        saved[kind] = tmp_path_factory.mktemp(f"{kind}_halves")
        everything = datasets.load_dataset("imagefolder", data_dir=str(folders[kind]), split="train")
        everything.train_test_split(test_size=0.5, seed=0).save_to_disk(saved[kind])
    return saved


def test_the_bound_is_that_of_the_conditions_of_the_images(trained, halves):
    kind, folder = trained
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    images = measures.model_images(open_dataset(str(halves[kind])), pipe.unet.config, {}, None, "condition")
    wrong = copy.copy(images)
    labels = images.dataset["condition"][:]
    wrong.dataset = images.dataset.remove_columns("condition").add_column("condition", labels[1:] + labels[:1])
    right, wrong = (
        bounds.measure_bound(pipe, pipe.scheduler.diffusion, part, 20, 5, 0, "bound", 20).bits_per_dim
        for part in (images, wrong)
    )
    assert right < 0.8 * wrong


def test_conditions_of_samples_are_drawn_from_the_images(trained, halves):
    kind, folder = trained
    pipe = DDPMPipelineCustom.from_pretrained(folder)
    images = measures.model_images(open_dataset(str(halves[kind])), pipe.unet.config, {}, None, "condition")
    drawn = measures.draw_conditions(pipe, images, 30, seed=1)
    everything = [tuple(row) for row in images.first_labels(64).reshape(64, -1).tolist()]
    found = [tuple(row) for row in drawn.reshape(30, -1).tolist()]
    assert len(set(found)) == 30 and set(found) < set(everything) and found != everything[:30]
    assert len(measures.draw_conditions(pipe, images, 100, seed=1)) == 64


@pytest.mark.parametrize("trained", ["identity"], indirect=True)
def test_evaluation_says_where_the_conditions_are_from(trained, halves, tmp_path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tmp_path / "dinov2")
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPImageProcessorPil(**size).save_pretrained(tmp_path / "dinov2")
    given = ["--model", str(trained[1]), "--dataset", str(halves["identity"]), "--features", str(tmp_path / "dinov2")]
    small = ["--num_samples=20", "--steps=5", "--bound_images=10", "--bound_stride=5", f"--output_dir={tmp_path}"]
    evaluate.main([*given, *small, f"--cache_dir={tmp_path / 'cache'}"])
    protocol = json.loads((tmp_path / "metrics.json").read_text())["evaluation"]["protocol"]
    assert (protocol["labels"], protocol["conditions"]) == ("condition", "drawn from the train split")


@pytest.mark.parametrize(
    ("kind", "streaming"), [("timestep", ["--streaming", "--shuffle_buffer=50"]), ("identity", [])]
)
def test_a_conditional_run_resumes_bit_identically(folders, tmp_path, kind, streaming):
    given = [*options(folders, kind), *streaming, "--validation_fraction", "0.2", "--validate_every_steps", "4"]
    given += ["--sample_every_steps", "8"]
    expected = run(tmp_path, *given)
    drop_checkpoints_after(tmp_path, 4)
    assert_bit_identical(run(tmp_path, *given), expected)
    assert (tmp_path / "samples" / "step-00000008.png").is_file()


def test_the_average_of_a_conditional_run_can_be_chosen(folders, tmp_path):
    run(tmp_path, *options(folders, "timestep"), "--ema_snapshot_every_images", "16", "--validation_fraction", "0.2")
    choose_ema.main(["--model", str(tmp_path), "--lengths", "0.1", "--criterion", "loss"])
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["steps"] == 12


@pytest.mark.parametrize(
    ("kind", "labels", "found"),
    [
        ("timestep", [1.0, float("nan")], "finite numbers, got nan for image 1 of the data set"),
        ("timestep", [1.0, None], "finite numbers, got (nan|None)"),
        ("timestep", ["1", "x"], "finite numbers, got '1'"),
        ("timestep", [[1.0], [2.0]], "finite numbers, got 1: 1.0 for image 0"),
        ("identity", [[0.0] * WIDTH, [0.0] * 31], "lists of 32 finite numbers.*got 31: 0.0, .* 0.0 for image 1"),
        ("identity", [1.0, 2.0], "lists of 32 finite numbers, the width of the time embedding, got 1.0"),
        (None, [1.5, 2.0], "integers in 0..num_classes−1 = 1, got 1.5, 2.0"),
        (None, [[1], [2]], r"integers in 0..num_classes−1 = 1, got \[1\], \[2\]"),
    ],
)
def test_labels_of_another_kind_are_refused_before_training(tmp_path, kind, labels, found):
    for i, label in enumerate(labels):
        Image.new("L", (8, 8)).save(tmp_path / f"{i}.png")
        with open(tmp_path / "metadata.jsonl", "a") as file:
            file.write(json.dumps({"file_name": f"{i}.png", "condition": label}) + "\n")
    given = [*NETWORK, "--dataset", str(tmp_path), "--label_column", "condition"]
    given += ["--num_classes", "2"] if kind is None else ["--class_embed_type", kind]
    with pytest.raises(SystemExit, match=f"train.py: error: the labels in the column 'condition' must be {found}"):
        run(tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_of_a_run_takes_the_condition_and_no_class(kind):
    unet, _ = build(
        parse_config([*TINY, *NETWORK, "--dataset", "digits", "--label_column", "label", *CONDITIONAL[2:], kind])
    )
    assert (unet.config.class_embed_type, unet.config.num_class_embeds) == (kind, None)
    assert unet(torch.zeros(1, 1, 8, 8), 3, torch.tensor([condition(kind, 0.5)])).sample.shape == (1, 1, 8, 8)
