"""IDX files and the images in them."""

import gzip

import numpy as np
import pytest

from text_data import images_folder, write_idx
from valign.checks import UserError
from valign.data.tasks.images import IMAGES, read_idx, read_images


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images_folder(tmp_path_factory.mktemp("pictures"))


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (2, 4, 4, 3)])
def test_idx_round_trip(tmp_path, shape):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    assert np.array_equal(read_idx(write_idx(tmp_path / "a.gz", array)), array)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"must be an IDX file of unsigned bytes, got the header ''"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 7]), r"got the header '00000d01'"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 5, 7]), r"must hold 5 bytes of data, got 1\. It is cut short"),
    ],
)
def test_a_broken_file_is_named(tmp_path, raw, message):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match=message):
        read_idx(path)
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"must be a gzipped IDX file"):
        read_idx(path)


@pytest.mark.parametrize("name", IMAGES)
def test_images_are_32_wide_and_coloured(folder, name):
    data = read_images(IMAGES[name], folder)
    assert data.labels == ("0", "1")
    assert {row.pixels.shape for row in (*data.train, *data.held_out)} == {(32, 32, 3)}
    assert not {row.content for row in data.train} & {row.content for row in data.held_out}
    corner = data.train[0].pixels[0, 0]
    assert (corner == 0).all() if name == "mnist" else corner.max() > 0  # a border of two pixels around 28


def test_draws_are_by_seed(folder):
    first, second, again = (read_images(IMAGES["mnist"], folder, train_rows=20, seed=seed) for seed in (0, 1, 0))
    assert first.fingerprint() == again.fingerprint() != second.fingerprint()
    assert [row.content for row in first.held_out] == [row.content for row in second.held_out]


def test_what_does_not_fit_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"must hold one file train-images\.idx\*-ubyte\.gz, got 0\. Check --data"):
        read_images(IMAGES["mnist"], tmp_path)
    small = tmp_path / "mnist_small"
    write_idx(small / "train-images.idx3-ubyte.gz", np.zeros((2, 40, 40)))
    write_idx(small / "train-labels.idx1-ubyte.gz", np.zeros(2))
    with pytest.raises(UserError, match=r"must hold square images of at most 32 pixels, got \(40, 40, 3\)"):
        read_images(IMAGES["mnist"], tmp_path)
    write_idx(small / "train-labels.idx1-ubyte.gz", np.zeros(3))
    with pytest.raises(UserError, match=r"must have one label for each of 2 images, got \(3,\)"):
        read_images(IMAGES["mnist"], tmp_path)
