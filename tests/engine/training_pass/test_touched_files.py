"""A reader who wants to know how a training pass works opens few files."""

from support.programs.touched_files import touched_files


def test_a_training_pass_touches_few_files() -> None:
    first, later = touched_files()
    assert len(later) <= 14
    # A first pass also asks the base what it allows, and checks gradients of quantised layers.
    assert len(first) <= 15
    assert set(later) < set(first)
