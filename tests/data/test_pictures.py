import errno
import os
import resource
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
import torch

from awconv.data.loading import Loader, collate
from awconv.data.pictures import (
    EXTENSIONS,
    FORMATS,
    PassedOver,
    PictureDataset,
    Unreadable,
    find_pictures,
    read_heads,
    read_picture,
    unreadable,
)
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


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_sixteen_bits_in_either_byte_order(tmp_path, name, order):
    levels = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    picture = PIL.Image.frombytes("I;16" if order == "<u2" else "I;16B", (16, 16), levels.astype(order).tobytes())
    picture.save(tmp_path / name)
    assert torch.equal(read_picture(tmp_path / name)[1], torch.arange(256, dtype=torch.uint8).view(16, 16))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "32-bit floats")])
def test_thirty_two_bits_are_refused(tmp_path, dtype, kind):
    path = tmp_path / "a.tiff"
    PIL.Image.fromarray(np.full((4, 4), 70, dtype=dtype)).save(path)
    with pytest.raises(InputError) as caught:
        read_picture(path)
    assert str(caught.value) == f"{path}: the samples of this picture are {kind}; save it with 8 or 16 bits"


def test_a_transparent_palette_gives_its_colours_without_a_warning(tmp_path, recwarn):
    picture = PIL.Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    assert read_picture(tmp_path / "a.png")[:, 0].T.tolist() == [[10, 20, 30], [40, 50, 60]]
    assert not recwarn.list


FLIP_BYTES = """
import random, sys
from awconv.data.pictures import read_picture
from awconv.errors import InputError

for path in sys.argv[1:]:
    whole = open(path, "rb").read()
    draw = random.Random(0)
    refused = 0
    for _ in range(150):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= draw.randrange(1, 256)
        with open(path, "wb") as file:
            file.write(flipped)
        try:
            assert read_picture(path).shape[0] == 3
        except InputError as error:
            assert str(error).startswith(path + ": ") and "\\n" not in str(error)
            refused += 1
    print(refused, flush=True)
"""


def test_no_flipped_byte_crashes_the_process(tmp_path):
    # one process for all formats, since starting one takes longer than the reading
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    paths = [str(tmp_path / name) for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.bmp", "a.tiff")]
    for path in paths:
        PIL.Image.fromarray(noise).save(path, **({} if path.endswith(("gif", "bmp")) else {"exif": exif}))
    done = subprocess.run(
        [sys.executable, "-c", FLIP_BYTES, *paths], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused = [int(line) for line in done.stdout.split()]
    assert len(refused) == len(paths)
    assert min(refused) > 0


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


def test_a_head_that_tells_of_absurdly_many_pixels_is_refused_before_they_are_decoded(tmp_path):
    for name, marker, size in (("a.jpg", b"\xff\xc0", struct.pack(">HH", 16000, 32000)), ("a.png", None, None)):
        path = tmp_path / name
        PIL.Image.new("RGB", (64, 64)).save(path)
        content = bytearray(path.read_bytes())
        if marker:
            start = content.index(marker) + 5
            content[start : start + 4] = size
        else:  # the head of a PNG, with its checksum
            content[16:24] = struct.pack(">II", 32000, 16000)
            content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(InputError) as caught:
            read_picture(path)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
        tracemalloc.stop()
        assert str(caught.value) == (
            f"{path}: this picture has 512000000 pixels, more than max_image_pixels=178956970 allows; replace or "
            "remove it, or if you trust it give a larger --data.max_image_pixels"
        )
        assert "\n" not in str(caught.value)
        for answer in (read_heads([str(path)])[0], unreadable([str(path)])[0]):
            assert str(answer) == str(caught.value)


def test_postscript_starts_no_other_program_whatever_it_is_called(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    PIL.Image.new("RGB", (8, 8)).save(path, "EPS")
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("started a process"))
    with pytest.raises(InputError, match="this file is not a picture"):
        read_picture(path)


def test_heads_agree_with_the_pixels(tmp_path, pixels):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "a.png", "a.webp", "a.tiff"):
        PIL.Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    content = (tmp_path / "a.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    # as ExifTool writes it
    behind = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "behind.png").write_bytes(behind)
    for path in sorted(tmp_path.iterdir()):
        (head,) = read_heads([str(path)])
        assert head == (20, 30, 6), path
        assert read_picture(path).shape == (3, 30, 20), path


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("key", ["XML:com.adobe.xmp", "Raw profile type exif"])
def test_only_exif_data_turn_an_image(tmp_path, pixels, key, behind):
    """As in viewers; Pillow also heeds XMP, and what old versions of ImageMagick wrote as text."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    encoded = exif.tobytes()
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="6"></rdf:RDF></x:xmpmeta>'
    text = PIL.PngImagePlugin.PngInfo()
    text.add_itxt(key, xmp if "xmp" in key else f"\nexif\n{len(encoded):8}\n{encoded.hex()}\n")
    path = tmp_path / "a.png"
    PIL.Image.fromarray(pixels).save(path, pnginfo=text)
    if behind:
        content = path.read_bytes()
        start = content.index(b"iTXt") - 4
        end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
        path.write_bytes(content[:start] + content[end:-12] + content[start:end] + content[-12:])
    with PIL.Image.open(path) as picture:
        assert picture.getexif()[0x0112] == 6
    assert read_heads([str(path)]) == [(20, 30, 1)]
    np.testing.assert_array_equal(read_picture(path).permute(1, 2, 0), pixels)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def walk(top, topdown=True, onerror=None, followlinks=False):
        onerror(PermissionError(errno.EACCES, "Permission denied", f"{top}/b"))
        return iter(())

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(InputError, match=r"/b: this folder cannot be read .Permission denied.; change its permissions"):
        find_pictures(tmp_path)


# ---- which files are images


def test_every_extension_that_pillow_reads(tmp_path):
    PIL.Image.init()
    of_pillow = {
        extension for extension, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN
    } | {".mpo"}
    refused = {".eps", ".ps", ".bufr", ".grib", ".h5", ".hdf", ".emf", ".wmf", ".mpg", ".mpeg", ".flc", ".fli", ".iim"}
    assert of_pillow - refused <= EXTENSIONS
    assert not refused & EXTENSIONS
    assert not {kind for kind in FORMATS if kind not in PIL.Image.OPEN} - {"AVIF"}
    for extension in EXTENSIONS:
        (tmp_path / f"a{extension}").touch()
        (tmp_path / f"b{extension.upper()}").touch()
    assert len(find_pictures(tmp_path)) == 2 * len(EXTENSIONS)


HIDDEN = (
    *(
        ".hidden/a.png",
        "sub/.ipynb_checkpoints/a-checkpoint.png",
        ".thumbnails/a.png",
        "__MACOSX/sub/a.png",
        "@eaDir/a.png",
    ),
    *("sub/._a.png", ".DS_Store", "Thumbs.db", "sub/.hidden/deeper/a.png", "$RECYCLE.BIN/a.png", "lost+found/a.png"),
)


def test_find_pictures(tmp_path):
    names = ["b.JPG", "a.png", "sub/deeper/c.Webp", "sub/d.jpeg", "notes.txt", "e.jpg.part", "LICENSE", *HIDDEN]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    passed_over = PassedOver()
    assert [os.path.relpath(path, tmp_path) for path in find_pictures(tmp_path, passed_over)] == [
        "a.png",
        "b.JPG",
        "sub/d.jpeg",
        "sub/deeper/c.Webp",
    ]
    assert str(passed_over) == (
        "3 files that are no images (.part, .txt, without extension) and 11 hidden names ($RECYCLE.BIN, .DS_Store, "
        "._*, ...)"
    )
    # the folder itself may be hidden
    assert len(find_pictures(tmp_path / ".hidden")) == 1
    assert str(PassedOver()) == ""


def test_no_folder_is_searched_twice(tmp_path):
    (tmp_path / "sub" / "deeper").mkdir(parents=True)
    (tmp_path / "sub" / "a.png").touch()
    (tmp_path / "sub" / "deeper" / "up").symlink_to(tmp_path)
    (tmp_path / "sub" / "here").symlink_to(tmp_path / "sub")
    assert find_pictures(tmp_path) == [str(tmp_path / "sub" / "a.png")]
    # a link that leads elsewhere is followed
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "sub")
    assert find_pictures(tmp_path / "other") == [str(tmp_path / "other" / "link" / "a.png")]


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
    with pytest.warns(UserWarning, match="skipped") as caught:
        samples = [dataset[index] for index in range(6)]
    assert [label for _, label in samples] == [0, 1, 4, 4, 4, 0]
    assert [int(image[0, 0, 0]) for image, _ in samples] == [0, 10, 40, 40, 40, 0]
    text = "\n".join(str(warning.message) for warning in caught)
    assert all((str(path) in text) == (number in (2, 3, 5)) for number, path in enumerate(six))


def test_nothing_readable_at_all(six):
    for path in six:
        damage(path, "text")
    dataset = PictureDataset([str(path) for path in six], list(range(6)), identity, skip_bad=True)
    with (
        pytest.warns(UserWarning, match="skipped"),
        pytest.raises(InputError, match="neither this picture nor any other"),
    ):
        dataset[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_prediction_skips_with_an_empty_path_that_says_why(six, workers):
    damage(six[2], "text")
    dataset = PictureDataset([str(path) for path in six], None, identity, skip_bad=True)
    samples = [(image.shape, path) for image, path in Loader(dataset, batch_size=None, num_workers=workers)]
    assert [path for _, path in samples] == ["" if number == 2 else str(path) for number, path in enumerate(six)]
    bad = samples[2][1]
    assert isinstance(bad, Unreadable)
    assert (bad.path, bad.reason) == (str(six[2]), "this file is not a picture; replace or remove it")


def test_a_limit_on_open_files_is_not_the_picture_s_fault(tmp_path, pixels):
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    read_picture(tmp_path / "a.png")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read_picture(tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
