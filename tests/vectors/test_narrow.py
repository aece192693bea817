"""A few columns beside many rows: any number of either, mapped or not, beside the plain product."""

import numpy as np
import pytest

from curate.vectors import narrow


@pytest.mark.parametrize("rows", [0, 1, narrow.PART, narrow.PART + 1, 3 * narrow.PART - 1])
@pytest.mark.parametrize("columns", [0, 1, narrow.FEW, narrow.FEW + 4])
def test_the_products_are_the_plain_ones(rows, columns):
    rng = np.random.default_rng([rows, columns])
    x_nd = rng.standard_normal((rows, 24)).astype(np.float16)
    x_nd[: rows // 2] *= np.float16(2.0**-14)  # subnormal halves, too
    x_nd.flags.writeable = False
    columns_qd = rng.standard_normal((columns, 24)).astype(np.float32)
    expected = x_nd.astype(np.float64) @ columns_qd.T.astype(np.float64)
    found = narrow.products(x_nd, columns_qd)
    assert found.shape == (rows, columns) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max(initial=0))
