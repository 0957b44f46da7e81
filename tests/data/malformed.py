"""Reads malformed images and annotation files, made from a fixed seed, and prints what becomes of each.

A process of its own, so that its memory can be told from that of other tests: ``python malformed.py FOLDER``. It
prints a line of JSON for every input, and at the end by how many MiB the memory grew.
"""

import copy
import gzip
import io
import json
import os
import random
import signal
import struct
import sys
import warnings
import zlib
from pathlib import Path

import PIL.Image

from awconv.data.coco import COCODataset, read_annotations
from awconv.data.pictures import read_encoded, read_heads, read_picture
from awconv.errors import InputError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "ICO", "PPM", "TGA")
HUGE = (65000, 65000)


def chunk(kind, content, length=None):
    length = len(content) if length is None else length
    return struct.pack(">I", length) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks):
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join([chunk(b"IHDR", head), *chunks, chunk(b"IEND", b"")])


def saved(kind, size=(48, 40), **options):
    content = io.BytesIO()
    PIL.Image.new("RGB", size, (9, 90, 200)).save(content, kind, **options)
    return content.getvalue()


def tiff(**tags):
    """A TIFF of 10x10 grey pixels whose tags may lie."""
    tags = {"t256": 10, "t257": 10, "t258": 8, "t259": 1, "t262": 1, "t277": 1, "t278": 10, "t279": 100} | tags
    entries = [(int(name[1:]), value) for name, value in tags.items()] + [(273, 8 + 2 + 12 * (len(tags) + 1) + 4)]
    packed = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + b"\0\0\0\0" + b"\0" * 100


def bombs():
    """Small files that ask for much, by name; and the length to which a file is filled up with zeros."""
    jpeg = saved("JPEG")
    start = jpeg.index(b"\xff\xc0")
    frame = jpeg[start : start + 19]
    absurd = frame[:5] + struct.pack(">HH", *HUGE) + frame[9:]
    large = png(20000, 20000, chunk(b"IDAT", zlib.compress(b"\0" * 20000)))
    text = b"a\0\0" + zlib.compress(b"\0" * 2**26)
    jp2 = saved("JPEG2000")
    code = jp2.index(b"\xff\x51") + 6
    gif = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff,"
    cards = ["SIMPLE  = T", "XTENSION= 'BINTABLE'", "ZIMAGE  = T", "ZCMPTYPE= 'GZIP_1  '", "BITPIX  = 8"]
    cards += ["NAXIS   = 2", "NAXIS1  = 8", "NAXIS2  = 1", "ZBITPIX = 8", "ZNAXIS  = 2", "ZNAXIS1 = 13000"]
    cards += ["ZNAXIS2 = 13000", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + bytes(8)
    yield "slow.fits", fits + gzip.compress(b"\0" * 2**20) * 162, 0
    yield "negative.fits", fits.replace(b"13000", b"-1300"), 0
    yield "size.jpg", jpeg.replace(frame, absurd), 0
    yield "little_for_its_size.jpg", jpeg.replace(frame, frame[:5] + struct.pack(">HH", 13000, 13000) + frame[9:]), 0
    yield "two_sizes.jpg", jpeg.replace(frame, absurd + frame), 0
    yield "two_sizes_more.jpg", jpeg.replace(frame, frame + absurd), 0
    yield "zeros_behind.jpg", jpeg, 3 * 2**30
    yield "size.png", png(*HUGE, chunk(b"IDAT", b"")), 0
    yield "no_rows.png", png(10, 0, chunk(b"IDAT", zlib.compress(b""))), 0
    yield "text.png", png(10, 10, chunk(b"zTXt", text)), 0
    yield "profile.png", png(10, 10, chunk(b"iCCP", text)), 0
    yield "long_chunk.png", png(10, 10, chunk(b"teSt", b"", 2**31 - 1)), 3 * 2**30
    yield "zeros.png", b"", 3 * 2**30
    yield "embedded.ico", struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(large), 22) + large, 0
    yield "embedded.icns", b"icns" + struct.pack(">I", len(large) + 16) + b"ic07" + chunk(b"", large)[:4] + large, 0
    yield "frame.gif", gif + struct.pack("<HHHHB", 0, 0, *HUGE, 0) + b"\x02\x02\x4c\x01\0;", 0
    yield "tile.tif", tiff(t322=HUGE[0], t323=HUGE[1], t324=200, t325=100), 0
    yield "size.tif", tiff(t256=HUGE[0], t257=HUGE[1]), 0
    yield "samples.tif", tiff(t256=13000, t257=13000, t277=60000), 0
    yield "size.jp2", jp2[:code] + struct.pack(">II", *HUGE) + jp2[code + 8 :], 0
    yield "size.bmp", saved("BMP")[:18] + struct.pack("<ii", *HUGE) + saved("BMP")[26:], 0
    yield "size.webp", b"RIFF\xff\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\xff\0" * 2, 0


def images(folder):
    for name, content, length in bombs():
        path = folder / name
        path.write_bytes(content)
        if length:
            os.truncate(path, length)
        yield path
    draw = random.Random(0)
    whole = {kind: saved(kind) for kind in FORMATS}
    for number in range(22):
        kind = FORMATS[number % len(FORMATS)]
        content = bytearray(whole[kind])
        for _ in range(draw.randrange(1, 4)):
            place = draw.randrange(min(len(content), 300))
            value = draw.choice([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, draw.randrange(2**32)])
            size = draw.choice([1, 2, 4])
            content[place : place + size] = value.to_bytes(4, draw.choice(["little", "big"]))[:size]
        path = folder / f"{number}.{kind}"
        path.write_bytes(content[: draw.randrange(10, len(content))] if draw.random() < 0.3 else content)
        yield path


def document():
    images = [{"id": k, "file_name": f"{k}.png", "width": 30, "height": 20} for k in (1, 2)]
    boxes = [
        {"id": k, "image_id": k, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0, "segmentation": []}
        for k in (1, 2)
    ]
    return {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "owl", "supercategory": "x"}]}


def texts():
    """Annotation files as text."""
    plain = json.dumps(document())
    yield from ("", "[" * 10**5, '{"a":' * 10**5, plain[:-30], "null", "[]", "NaN", plain[:-1] + ', "images": [1]}')
    yield plain + "\0"
    yield plain.replace('"width": 30', '"width": ' + "1" * 10**7)
    yield plain.replace('"area": 12', '"area": 1.' + "1" * 10**7)
    draw = random.Random(1)
    odd = [
        None,
        True,
        -1,
        0,
        2**70,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "\ud800",
        "\x1b[2J\n",
        "../" * 9,
        "x" * 10**6,
    ]
    odd += [[], {}, [[]] * 5, "1e999"]
    for _ in range(20):
        content = copy.deepcopy(document())
        for _ in range(draw.randrange(1, 4)):
            entries = content[draw.choice(list(content))]
            if not isinstance(entries, list) or draw.random() < 0.1:
                content[draw.choice(list(content))] = copy.deepcopy(draw.choice(odd))
                continue
            entry = draw.choice(entries)
            entry[draw.choice(list(entry))] = copy.deepcopy(draw.choice(odd))
        yield json.dumps(content)


def annotated(path):
    found = read_annotations(str(path), "train_annotations", "get some")
    checked = found.check_pictures(str(path.parent), "train_images", "get some")
    return len(list(COCODataset(checked, str(path.parent))))


def attempt(name, read):
    signal.alarm(20)  # which ends the process
    try:
        outcome = read()
    except InputError as error:
        outcome = str(error)
    signal.alarm(0)
    print(json.dumps([name, outcome]))


def memory(kind):
    """MiB of this process: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{kind}:")[2].split()[0]) // 1024


def main(folder):
    warnings.simplefilter("ignore")
    for number in (1, 2):
        PIL.Image.new("RGB", (30, 20)).save(folder / f"{number}.png")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of importing
    before = memory("VmRSS")
    for path in images(folder):
        for read in (read_picture, read_encoded, lambda path: read_heads([str(path)])[0]):

            def shape(read=read, path=path):
                found = read(path)
                if isinstance(found, InputError):
                    raise found
                return list(getattr(found, "shape", found))

            attempt(path.name, shape)
        path.unlink()
    path = folder / "boxes.json"
    for number, text in enumerate(texts()):
        path.write_text(text)
        attempt(f"{number}.json", lambda: annotated(path))
    print(memory("VmHWM") - before)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
