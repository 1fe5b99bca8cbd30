from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from anndata import AnnData


def pytest_configure(config: pytest.Config) -> None:
    """Share the processors among the workers of ``pytest -n``."""
    if hasattr(config, "workerinput"):
        import torch

        torch.set_num_threads(max(1, torch.get_num_threads() // config.workerinput["workercount"]))


REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Name of a real data file -> its path; skips the test where the file is not at hand."""

    def find(name: str) -> Path:
        path = REAL_DATA / name
        if not path.is_file():
            pytest.skip(f"needs the real data beside the checkout (../shared/data): {name}")
        return path

    return find


@pytest.fixture(scope="session")
def _simulated() -> AnnData:
    from sctraj.datasets import simulated_differentiation

    return simulated_differentiation(n_cells=600, n_genes=40, n_pcs=6)


@pytest.fixture
def cells(_simulated: AnnData) -> AnnData:
    """A small simulated time course of its own: 600 cells, six uneven times."""
    return _simulated.copy()
