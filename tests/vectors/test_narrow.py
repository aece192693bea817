"""A few columns beside many rows: any number of either, mapped or not, beside the plain product."""

import numpy as np
import pytest

from curate.vectors import narrow

WIDTHS = (24, 20)  # that faiss scans eight numbers at a time, and that it does not


def test_faiss_scans_the_widths_of_models():
    """Otherwise every question would take twice the time, at the same answer."""
    assert all(narrow._scans(dim) for dim in (8, 24, 512, 640, 768, 1024, 1152)) and not narrow._scans(20)


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, narrow.PART, narrow.PART + 1, 3 * narrow.PART - 1])
@pytest.mark.parametrize("columns", [0, 1, narrow.FEW, narrow.FEW + 4])
def test_the_products_are_the_plain_ones(dim, rows, columns):
    rng = np.random.default_rng([rows, columns])
    x_nd = rng.standard_normal((rows, dim)).astype(np.float16)
    x_nd[: rows // 2] *= np.float16(2.0**-14)  # subnormal halves, too
    x_nd.flags.writeable = False
    columns_qd = rng.standard_normal((columns, dim)).astype(np.float32)
    expected = x_nd.astype(np.float64) @ columns_qd.T.astype(np.float64)
    found = narrow.products(x_nd, columns_qd)
    assert found.shape == (rows, columns) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(initial=0))


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("columns", [1, narrow.FEW, narrow.FEW + 1])
def test_what_is_no_number_stays_in_its_row(dim, columns):
    rng = np.random.default_rng(columns)
    x_nd = rng.standard_normal((9, dim)).astype(np.float16)
    x_nd[1, 3], x_nd[4, 0], x_nd[7, dim - 1] = np.nan, np.inf, -np.inf
    columns_qd = np.abs(rng.standard_normal((columns, dim))).astype(np.float32)
    expected = x_nd.astype(np.float64) @ columns_qd.T.astype(np.float64)
    assert np.isnan(expected[1]).all() and np.isinf(expected[[4, 7]]).all()
    np.testing.assert_allclose(narrow.products(x_nd, columns_qd), expected, rtol=1e-4, atol=1e-4)


def test_a_row_has_one_product_whatever_stands_beside_it():
    rng = np.random.default_rng(0)
    x_nd, column = rng.standard_normal((600, 64)).astype(np.float16), rng.standard_normal((1, 64), np.float32)
    whole = narrow.products(x_nd, column)
    for first in (1, 5, 17, 599):
        assert (narrow.products(x_nd[first:], column) == whole[first:]).all()
