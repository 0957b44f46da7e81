"""The lean transforms: held against torchvision's own, and their random numbers counted."""

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from awconv.data.transforms import Normalise, RandomMirror, Resize, ShiftedCrop, ToImage
from awconv.errors import InputError


def noise(*shape, seed=0):
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def chi_squared(counts, cells):
    """Of counts that are expected to be equal."""
    expected = sum(counts) / cells
    return sum((count - expected) ** 2 / expected for count in counts) + (cells - len(counts)) * expected


@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5), st.integers(0, 999))
def test_a_shifted_crop_is_a_window_of_the_padded_picture(size, higher, wider, padding, seed):
    height, width = size + higher, size + wider
    # every pixel has a value of its own, so that one pixel tells where the window lies
    image = 1 + torch.arange(2 * height * width).view(2, height, width)
    torch.manual_seed(seed)
    found = ShiftedCrop(size, padding)(image)
    assert found.shape == (2, size, size)
    padded = np.zeros((2, height + 2 * padding, width + 2 * padding), dtype=int)
    padded[:, padding : padding + height, padding : padding + width] = image.numpy()
    places = [
        (top, left)
        for top in range(height + 2 * padding - size + 1)
        for left in range(width + 2 * padding - size + 1)
        if (padded[:, top : top + size, left : left + size] == found.numpy()).all()
    ]
    # more than one place fits where the window shows padding alone
    assert len(places) == 1 or not found.any()


def test_every_place_of_a_crop_is_as_likely():
    torch.manual_seed(0)
    image = torch.arange(4 * 5).view(1, 4, 5)
    crop = ShiftedCrop(3, padding=1)
    drawn = [tuple(crop(image).flatten().tolist()) for _ in range(4000)]
    counts = [drawn.count(window) for window in set(drawn)]
    assert len(counts) == 4 * 5
    assert chi_squared(counts, 20) < 43.8, "the 99.9th percentile of 19 degrees of freedom"


def test_half_of_the_pictures_are_mirrored():
    torch.manual_seed(0)
    image, mirror = noise(3, 2, 5), RandomMirror()
    results = [mirror(image) for _ in range(2000)]
    mirrored = sum(torch.equal(result, image.flip(2)) for result in results)
    assert mirrored + sum(torch.equal(result, image) for result in results) == 2000
    assert 1000 - 74 < mirrored < 1000 + 74, "3.3 standard deviations"


@pytest.mark.parametrize("shape", [(3, 6, 5), (4, 3, 6, 5)])
def test_normalise_is_torchvisions_two_steps(shape):
    mean, std = (0.49, 0.1, 0.0), (0.25, 1.0, 0.01)
    image = noise(*shape)
    expected = v2.functional.normalize(v2.functional.to_dtype(image, torch.float32, scale=True), mean, std)
    for given_ in (image, tv_tensors.Image(image), v2.functional.to_dtype(image, torch.float32, scale=True)):
        before = given_.clone()
        found = Normalise(mean, std)(given_)
        assert type(found) is torch.Tensor
        # a few roundings of float32, of numbers that std=0.01 makes as large as 100
        assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(given_, before)


def test_normalise_takes_other_channels_and_depths():
    found = Normalise([0.5], [0.25])(torch.tensor([[[0, 51, 255]]], dtype=torch.uint8))
    assert torch.allclose(found, torch.tensor([[[-2.0, -1.2, 2.0]]]))
    deep = torch.tensor([[[65535]]], dtype=torch.uint16)
    assert torch.allclose(Normalise([0.5], [0.25])(deep), torch.tensor([[[2.0]]]))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 11), (3, 11, 8), (3, 16, 24), (3, 5, 9)])
def test_resize_is_torchvisions(shape):
    image = noise(*shape)
    for size in (8, [8, 8], None):
        options = {"max_size": 9} if size is None else {}
        assert torch.equal(Resize(size, **options)(image), v2.Resize(size, **options)(image))


def test_resize_leaves_a_picture_of_the_size_and_takes_torchvisions_structures():
    image = noise(3, 8, 11)
    assert Resize(8)(image) is image
    with_label = Resize(8)(noise(3, 16, 24), "label")
    assert with_label[0].shape == (3, 8, 12)
    assert with_label[1] == "label"


def test_to_image_gives_plain_tensors():
    pixels = noise(3, 4, 5)
    picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for given_ in (pixels, tv_tensors.Image(pixels), picture, pixels.permute(1, 2, 0).numpy()):
        image = ToImage(3)(given_)
        assert type(image) is torch.Tensor
        assert torch.equal(image, pixels)


def test_to_image_takes_a_grey_picture_without_channels():
    pixels = noise(4, 5)
    assert torch.equal(ToImage(1)(pixels), pixels[None])
    assert torch.equal(ToImage(3)(pixels), pixels.expand(3, 4, 5))


def test_a_crop_that_does_not_fit_is_told_in_one_line():
    with pytest.raises(InputError, match="20x20 pixels, padded by 2, has no crop of 32x32"):
        ShiftedCrop(32, padding=2)(noise(3, 20, 20))
