"""The judge of a built-in data set is found by the data set's name."""

from ddpm_hf.evaluation import digits
from ddpm_hf.evaluation.judges import judge_of


def test_judge_is_found_by_the_name_of_its_data_set():
    assert judge_of("digits") is digits
    assert judge_of("photos") is None and judge_of("some/data_set") is None


def test_judge_has_the_documented_functions():
    judge = judge_of("digits")
    assert all(callable(getattr(judge, name)) for name in ("backbone", "judge", "card_section", "card_results"))
