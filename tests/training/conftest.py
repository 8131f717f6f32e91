import pytest
from pair_data import build_pairs


@pytest.fixture(scope="session")
def sd(tiny_sd):
    from valign.models.diffusion.loading import load_model

    return load_model(tiny_sd, device="cpu")


@pytest.fixture(scope="session")
def cache(sd, tmp_path_factory):
    return build_pairs(sd, tmp_path_factory.mktemp("data"))
