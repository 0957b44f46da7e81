import os
import sys
import warnings

import numpy as np
import PIL.Image
import pytest
import torch

from awconv.data.loading import Loader, collate
from awconv.data.pictures import PictureDataset, find_pictures, read_picture
from awconv.errors import InputError


@pytest.fixture
def pixels():
    """A smooth RGB picture, 20 rows and 30 columns, which lossy formats keep to within a few levels."""
    rows, columns = np.mgrid[:20, :30]
    return np.stack([rows * 8 + 40, columns * 6 + 30, 200 - rows * 4], axis=-1).astype(np.uint8)


def identity(image):
    return image


@pytest.mark.parametrize(
    ("name", "mode", "mean_error"),
    [
        ("a.png", "RGB", 0),
        ("a.bmp", "RGB", 0),
        ("a.tiff", "RGB", 0),
        ("a.jpg", "RGB", 3),
        ("a.webp", "RGB", 3),
        ("a.png", "RGBA", 0),
        ("a.jpg", "CMYK", 3),
        ("a.gif", "P", 20),
    ],
)
def test_read_picture_gives_rgb_bytes(tmp_path, pixels, name, mode, mean_error):
    path = tmp_path / name
    PIL.Image.fromarray(pixels).convert(mode).save(path)
    image = read_picture(path)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 20, 30)
    difference = (image.int() - torch.from_numpy(pixels).permute(2, 0, 1).int()).abs()
    assert difference.float().mean() <= mean_error


def test_grey_pictures_get_three_equal_channels(tmp_path, pixels):
    grey = PIL.Image.fromarray(pixels).convert("L")
    grey.save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png")
    assert torch.equal(image, torch.from_numpy(np.array(grey)).expand(3, -1, -1))


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    PIL.Image.fromarray(levels).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png")
    assert image.dtype == torch.uint8
    assert np.abs(image[0].numpy().astype(float) - levels / 257).max() <= 1


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [PIL.Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    image = read_picture(tmp_path / "a.gif")
    assert image.shape == (3, 6, 8)
    assert image[:, 0, 0].tolist() == [255, 0, 0]


def damage(path, kind):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("this is no picture")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()


@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "missing"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.gif", "a.webp", "a.bmp"])
def test_a_broken_picture_is_named_on_one_line(tmp_path, pixels, name, kind):
    path = tmp_path / name
    PIL.Image.fromarray(pixels).save(path)
    damage(path, kind)
    with pytest.raises(InputError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: this ")
    assert message.endswith("replace or remove it")
    assert "\n" not in message


def test_find_pictures(tmp_path):
    names = ["b.JPG", "a.png", "sub/deeper/c.Webp", "sub/d.jpeg", "._a.png", "notes.txt", "e.jpg.part"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path)] == [
        "a.png",
        "b.JPG",
        "sub/d.jpeg",
        "sub/deeper/c.Webp",
    ]


@pytest.fixture
def six(tmp_path):
    """Six pictures of one grey level each: 0, 10, ... 50."""
    paths = [tmp_path / f"{number}ü.png" for number in range(6)]
    for number, path in enumerate(paths):
        PIL.Image.new("RGB", (4, 4), (10 * number,) * 3).save(path)
    return paths


def test_labels_or_paths(six):
    labelled = PictureDataset([str(path) for path in six], [5, 4, 3, 2, 1, 0], identity)
    assert len(labelled) == 6
    assert [(int(image[0, 0, 0]), label) for image, label in labelled] == [(10 * i, 5 - i) for i in range(6)]
    named = PictureDataset([str(path) for path in six], None, identity)
    assert [path for _, path in named] == [str(path) for path in six]


def test_a_bad_picture_stops(six):
    damage(six[2], "text")
    dataset = PictureDataset([str(path) for path in six], list(range(6)), identity)
    with pytest.raises(InputError, match="this file is not a picture"):
        dataset[2]
    with pytest.raises(InputError) as caught:
        list(Loader(dataset, batch_size=2, num_workers=2, collate_fn=collate))
    assert str(caught.value) == f"{six[2]}: this file is not a picture; replace or remove it"


def test_skipping_takes_the_next_readable_one_with_its_own_label(six):
    for number, kind in ((2, "text"), (3, "truncated"), (5, "empty")):
        damage(six[number], kind)
    dataset = PictureDataset([str(path) for path in six], list(range(6)), identity, skip_bad=True)
    with pytest.warns(UserWarning, match="skipped") as first:
        samples = [dataset[index] for index in range(6)]
    assert [label for _, label in samples] == [0, 1, 4, 4, 4, 0]
    assert [int(image[0, 0, 0]) for image, _ in samples] == [0, 10, 40, 40, 40, 0]
    warned = sorted(str(warning.message) for warning in first if "skipped" in str(warning.message))
    assert [str(six[number]) in text for number, text in zip((2, 3, 5), warned, strict=True)] == [True] * 3
    with warnings.catch_warnings(record=True) as second:
        warnings.simplefilter("always")
        assert [dataset[index][1] for index in range(6)] == [0, 1, 4, 4, 4, 0]
    assert not [warning for warning in second if "skipped" in str(warning.message)]


def test_workers_together_warn_once_about_a_file(six, capfd, monkeypatch):
    # pytest records warnings in the memory of the process that gives them
    monkeypatch.setattr(warnings, "showwarning", lambda text, *_, **__: print(text, file=sys.stderr, flush=True))
    damage(six[2], "text")
    dataset = PictureDataset([str(path) for path in six], list(range(6)), identity, skip_bad=True)
    loader = Loader(dataset, batch_size=3, num_workers=1, collate_fn=collate)
    # three passes, each with a worker that starts anew
    for _ in range(3):
        assert torch.cat([targets for _, targets in loader]).tolist() == [0, 1, 3, 3, 4, 5]
    assert capfd.readouterr().err.count(f"skipped {six[2]}") == 1


def test_nothing_readable_at_all(six):
    for path in six:
        damage(path, "text")
    dataset = PictureDataset([str(path) for path in six], list(range(6)), identity, skip_bad=True)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(InputError, match="neither this picture nor any other"),
    ):
        dataset[1]
