"""The printed report."""

from ddpm_hf.evaluation.report import report

BOUND = {"bits_per_dim": 3.5, "standard_error": 0.1, "prior": 1e-5, "terms": [2.0], "num_images": 12, "stride": 3}
FIGURE = {"name": "FD-DINOv2, n = 20", "value": 1.25, "validation": None}
RESULT = {
    "bits_per_dim": {"validation, 20 steps": BOUND},
    "best_timesteps": {"rows": [{"steps": n, "predicted_bits_per_dim": 4.25} for n in (5, 10)]},
    "figures": [FIGURE, FIGURE | {"name": "KD-DINOv2, n = 20", "validation": 0.5, "standard_error": 0.01}],
    "memorization": {"pixels": {"closer_than_5_percent_of_validation": 0.04, "closer_p_value": 0.62}},
    "samplers": None,
}


def test_report_has_a_line_for_every_result():
    lines = report(RESULT).splitlines()
    assert len(lines) == 5 and "3.5000 ± 0.1000" in lines[0] and "12 images, each at 1 of 3 timesteps" in lines[0]
    assert lines[1].endswith("best timesteps    5 steps 4.2500, 10 steps 4.2500")
    assert "1.2500" in lines[2] and "± 0.01  (validation images: 0.5000)" in lines[3]
    assert "pixels: 4.0% of samples (p = 0.62" in lines[4]


def test_report_ends_with_the_table_of_samplers():
    name = "FD-DINOv2, n = 20"
    rows = [
        {"scheduler": "ddpm", "variance_type": "analytic", "steps": 5, "bits_per_dim": 12.25, "standard_error": 0.1},
        {"scheduler": "ddim", "variance_type": None, "steps": 5, "bits_per_dim": None, "standard_error": None},
        {"scheduler": "unipc", "variance_type": None, "steps": 5, "bits_per_dim": None, "standard_error": None},
    ]
    figures = ({name: 2.5}, {name: 1.5}, {})
    rows = [row | {"figures": values} for row, values in zip(rows, figures, strict=True)]
    rows[2]["problem"] = "samples are not finite"
    head, *lines = report(RESULT | {"samplers": {"figures": [name], "rows": rows}}).splitlines()[-4:]
    assert head.split() == ["sampler", "steps", "bits/dim", "FD"]
    assert lines[0].split() == ["ddpm,", "analytic", "5", "12.25", "±", "0.10", "2.5000"]
    assert lines[1].split() == ["ddim", "5", "1.5000"]
    assert lines[2].split() == ["unipc", "5", "samples", "are", "not", "finite"]
