"""Windows of layers, clipped to the model."""

import pytest

from avflow.pathways.windows import window_layers


@pytest.mark.parametrize(
    ("center", "window", "layers"),
    [
        (4, 1, [4]),
        (4, 3, [3, 4, 5]),
        (4, 7, [1, 2, 3, 4, 5, 6, 7]),
        (4, 2, [3, 4]),
        (4, 4, [2, 3, 4, 5]),
        (0, 3, [0, 1]),
        (1, 7, [0, 1, 2, 3, 4]),
        (9, 3, [8, 9]),
        (9, 2, [8, 9]),
        (8, 7, [5, 6, 7, 8, 9]),
        (0, 10, [0, 1, 2, 3, 4]),
    ],
)
def test_windows_of_a_model_with_ten_layers(center: int, window: int, layers: list[int]) -> None:
    assert list(window_layers(center, window, 10)) == layers


@pytest.mark.parametrize(("center", "window"), [(-1, 3), (10, 3), (3, 0), (3, 11)])
def test_windows_that_do_not_fit(center: int, window: int) -> None:
    with pytest.raises(ValueError, match=r"10 layers|0\.\.9"):
        window_layers(center, window, 10)
