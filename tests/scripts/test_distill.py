"""distill.py: students that halve the steps, each a run of train.py, and what their folders are for this package and stock."""

import shutil
import subprocess
import sys

import pytest
import torch
from ddpm_hf.scripts import distill, evaluate
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from ddpm_hf import DDIMSchedulerCustom, DDPMPipelineCustom, DDPMSchedulerCustom
from ddpm_hf.pipelines.guidance import mark_null_class
from ddpm_hf.training.artifacts import read_metrics
from tests.conftest import TINY_SCHEDULER, TINY_TRAINING, flags
from tests.training.helpers import ROOT, assert_bit_identical, checkpoint

SHORT = flags(
    **{name: TINY_TRAINING[name] for name in ("batch_size", "quality_samples", "report_to", "cpu_threads")},
    dataset="digits", total_images=192, checkpoint_every_steps=4, keep_checkpoints=10, warmup_steps=0, from_steps=4,
    to_steps=1,
)  # fmt: skip


@pytest.fixture
def teacher(make_pipeline, tmp_path):
    make_pipeline(in_channels=1, out_channels=1).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def run(teacher, folder, *options):
    distill.main([*SHORT, "--teacher", str(teacher), "--output_dir", str(folder), *options])


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_each_student_is_a_model_that_samples_in_its_steps(teacher, tmp_path):
    run(teacher, tmp_path / "students")
    for steps in (2, 1):
        folder = tmp_path / "students" / f"{steps}_steps"
        pipe = DDPMPipelineCustom.from_pretrained(folder)
        assert type(pipe.scheduler) is DDIMSchedulerCustom and len(pipe.denoise(2, seed=0)) == steps
        stock = DDIMPipeline.from_pretrained(folder)
        assert type(stock.scheduler) is DDIMScheduler and type(stock.unet) is UNet2DModel
        ours, theirs = (p(4, torch.Generator().manual_seed(1), num_inference_steps=steps, output_type="np").images
                        for p in (pipe, stock))  # fmt: skip
        assert abs(ours - theirs).max() < 1e-5
        saved = tmp_path / "saved again"
        pipe.save_pretrained(saved)
        assert len(DDPMPipelineCustom.from_pretrained(saved).denoise(2, seed=0)) == steps
    assert any((weights(folder)[k] != w).any() for k, w in weights(teacher).items())


def test_stock_is_silent_about_the_scheduler_of_a_student(teacher, tmp_path):
    run(teacher, tmp_path / "students", "--from_steps", "2")
    code = f"from diffusers import DDIMPipeline; DDIMPipeline.from_pretrained({str(tmp_path / 'students/1_steps')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "expected" not in done.stderr and "ignored" not in done.stderr, done.stderr


def test_training_brings_the_student_closer_to_its_teacher(teacher, tmp_path):
    run(teacher, tmp_path / "students", "--from_steps", "2", "--total_images", "6400", "--learning_rate", "5e-3",
        "--validate_every_steps", "20")  # fmt: skip
    log = [line for line in (tmp_path / "students/1_steps/log.jsonl").read_text().splitlines() if "validation" in line]
    losses = [float(line.split('"validation_loss_ema": ')[1].split("}")[0].split(",")[0]) for line in log]
    assert losses[-1] < 0.5 * losses[0], losses


def test_a_student_resumes_bit_for_bit(teacher, tmp_path):
    run(teacher, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "b/2_steps/checkpoints").iterdir():
        if folder.name > "checkpoint-00000004":
            shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "b/1_steps")
    run(teacher, tmp_path / "b", "--overwrite", "false")
    assert_bit_identical(checkpoint(tmp_path / "a/2_steps", 12), checkpoint(tmp_path / "b/2_steps", 12))
    assert all(torch.equal(w, weights(tmp_path / "b/1_steps")[k]) for k, w in weights(tmp_path / "a/1_steps").items())


def test_a_student_of_a_conditional_model_keeps_labels_and_guidance(make_pipeline, tmp_path):
    pipe = make_pipeline(in_channels=1, out_channels=1, num_class_embeds=11)
    mark_null_class(pipe.unet)
    pipe.save_pretrained(tmp_path / "teacher")
    labels = ("--label_column", "label", "--label_dropout", "0.1")
    run(tmp_path / "teacher", tmp_path / "students", *labels, "--from_steps", "2")
    student = DDPMPipelineCustom.from_pretrained(tmp_path / "students/1_steps")
    assert len(student(2, seed=0, class_labels=[3, 4], guidance_scale=2.0, output_type="np").images) == 2


def test_evaluation_of_a_student_uses_its_steps_and_has_no_bound(teacher, tmp_path, capsys):
    run(teacher, tmp_path / "students", "--from_steps", "2")
    folder = tmp_path / "students/1_steps"
    evaluate.main(["--model", str(folder), "--dataset", "digits", "--num_samples", "120", "--cache_dir", str(tmp_path)])
    evaluation = read_metrics(folder)["evaluation"]
    assert evaluation["bits_per_dim"] == {} and evaluation["figures"][0]["protocol"]["steps"] == 1
    assert "A distilled model has no bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--from_steps", "12"], "from_steps must be 2, 4, 8, ... times to_steps"),
        (["--init_from", "x"], "--init_from is set by this script"),
        (["--distill_steps", "3"], "--distill_steps is set by this script"),
        (["--from_steps", "32"], "distill_steps must be an integer in 1..10"),
        (["--loss_weighting", "p2"], "loss_weighting = p2 is for distill_steps=None only"),
        (["--lora_rank", "2"], "lora_rank = 2 is for distill_steps=None only"),
        (["--teacher", "nowhere"], "init_from must be the folder of a pipeline"),
        (["--learning_rat", "2"], "did you mean --learning_rate?"),
    ],
)
def test_wrong_options_are_refused_before_any_work(teacher, tmp_path, options, words):
    with pytest.raises(SystemExit, match=words):
        run(teacher, tmp_path / "students", *options)
    assert not (tmp_path / "students").exists()


@pytest.mark.parametrize("options", [{"prediction_type": "epsilon"}, {"variance_type": "learned_range"}])
def test_a_teacher_that_cannot_teach_is_refused(make_pipeline, tmp_path, options):
    channels = {"in_channels": 1, "out_channels": 2 if "variance_type" in options else 1}
    make_pipeline(DDPMSchedulerCustom(**TINY_SCHEDULER | options), **channels).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="distill_steps needs a model"):
        run(tmp_path / "teacher", tmp_path / "students")


@pytest.mark.parametrize("classes", [10, None])
def test_a_teacher_without_the_runs_labels_is_refused(make_pipeline, tmp_path, classes):
    make_pipeline(in_channels=1, out_channels=1, num_class_embeds=classes).save_pretrained(tmp_path / "teacher")
    with pytest.raises(SystemExit, match="a teacher must know the labels of the run: it has num_class_embeds"):
        run(tmp_path / "teacher", tmp_path / "students", "--label_column", "label", "--label_dropout", "0.1")


def test_several_processes_are_told_to_launch_train_py(tmp_path):
    command = [
        sys.executable,
        "training/distill.py",
        *SHORT,
        "--teacher",
        "outputs/x",
        "--output_dir",
        str(tmp_path / "s"),
    ]
    environment = {"WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environment)
    assert done.returncode == 1 and "launch train.py for each student, and first: training/train.py" in done.stderr
