"""The program that `make lint` gives to type checkers also runs."""

import pytest

import typed_user_script


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize(
    "part",
    [
        typed_user_script.train_with_the_optimizer,
        typed_user_script.take_a_run_over,
        typed_user_script.train_by_id,
        typed_user_script.train_in_torchscript,
        typed_user_script.what_the_package_says,
        typed_user_script.make_mistakes,
    ],
)
def test_typed_program(part):
    part()
