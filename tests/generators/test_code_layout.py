"""If these fail, codes are put at other places in a picture than they were taken from."""

import jax.numpy as jnp
import numpy as np
import pytest

from iar_jax.generators.code_layout import CodeLayout


def test_squares_follow_each_other_row_by_row():
    layout = CodeLayout((1, 2, 3))
    assert layout.length == 14
    squares = layout.squares(jnp.arange(28).reshape(2, 14))
    assert [square.shape for square in squares] == [(2, 1, 1), (2, 2, 2), (2, 3, 3)]
    np.testing.assert_array_equal(squares[1][0], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(squares[2][1], 14 + np.arange(5, 14).reshape(3, 3))


def test_a_length_makes_one_square_or_none():
    assert CodeLayout.of_length(256) == CodeLayout.square(16)
    with pytest.raises(ValueError, match="250 codes are not a square"):
        CodeLayout.of_length(250)
    assert CodeLayout.recorded(None, 256) == CodeLayout.recorded([16], 256) == CodeLayout.square(16)
    with pytest.raises(ValueError, match=r"says squares of \(1, 2\), and an image has 16 codes"):
        CodeLayout.recorded([1, 2], 16)
    with pytest.raises(ValueError, match="has no positions"):
        CodeLayout(())
