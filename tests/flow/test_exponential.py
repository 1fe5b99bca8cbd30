import pytest
import torch

from sctraj.flow.exponential import exp_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_exponential_and_in_place(dtype):
    lowest = torch.finfo(dtype).tiny
    x = torch.linspace(-80, 80, 1001, dtype=dtype)
    expected = x.exp()
    found = exp_(x)
    assert found is x
    torch.testing.assert_close(found, expected, rtol=200 * torch.finfo(dtype).eps, atol=lowest)  # |x| roundings


def test_infinities_and_what_underflows():
    assert exp_(torch.tensor([-float("inf"), -1e6, 0.0, float("inf")])).tolist() == [0, 0, 1, float("inf")]
