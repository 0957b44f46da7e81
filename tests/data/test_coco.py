import contextlib
import io
import json
import os
import unicodedata
from collections import defaultdict

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import miniature
from awconv.data.coco import COCOAnnotations, COCODataset, read_annotations, turn_boxes
from awconv.data.pictures import read_heads
from awconv.errors import InputError
from awconv.metrics import BoxMeanAveragePrecision


def document(**changes):
    """A file of two pictures, two categories and three boxes; a change of None leaves the key out."""
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 3, "file_name": "b.png", "width": 20, "height": 50},
        ],
        "categories": [{"id": 9, "name": "owl"}, {"id": 2, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 9.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [5.5, 6, 7, 8], "area": 50, "iscrowd": 1},
            {"id": 3, "image_id": 3, "category_id": 2, "bbox": [2, 1, 10, 20], "area": 150, "iscrowd": 0},
        ],
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


def boxes_of(*boxes, **more):
    return [{"id": 70 + n, "image_id": 7, "category_id": 2, "bbox": box, **more} for n, box in enumerate(boxes)]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "pictures"
    path.mkdir()
    for name, size in (("a.png", (40, 30)), ("b.png", (20, 50))):
        PIL.Image.new("RGB", size, (10, 20, 30)).save(path / name)
    return path


@pytest.fixture
def read(tmp_path):
    def read(content) -> COCOAnnotations:
        path = tmp_path / "boxes.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return read_annotations(str(path), "train_annotations", "get some")

    return read


def fitted(annotations, folder):
    return annotations.check_pictures(str(folder), "train_images", "get some")


def error_of(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading


def test_a_file_in_flat_arrays(read, folder):
    annotations = fitted(read(document()), folder)
    assert (annotations.category_ids, annotations.class_names) == ([2, 9], ["cat", "owl"])
    assert annotations.annotated
    first, second = COCODataset(annotations, str(folder))
    image, target = second
    assert (image.shape, image.dtype, type(image)) == ((3, 50, 20), torch.uint8, torch.Tensor)
    assert target["boxes"].tolist() == [[1, 2, 4, 6], [2, 1, 12, 21]]
    assert target["labels"].tolist() == [2, 1]
    assert target["area"].tolist() == [9.5, 150]
    assert target["iscrowd"].tolist() == [0, 0]
    assert target["image_id"].shape == ()
    assert (int(target["image_id"]), int(first[1]["image_id"])) == (3, 7)
    assert {key: value.dtype for key, value in target.items()} == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "image_id": torch.int64,
        "area": torch.float32,
        "iscrowd": torch.int64,
    }


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_miniature_is_what_pycocotools_reads(coco_root, split):
    path, folder = coco_root / f"annotations/instances_{split}2017.json", coco_root / f"{split}2017"
    oracle = COCO(str(path))
    raw = read_annotations(str(path), "val_annotations", "")
    annotations = fitted(raw, folder)
    assert annotations.category_ids == sorted(oracle.getCatIds()) == sorted(miniature.COCO_CATEGORIES)
    assert annotations.class_names == [miniature.COCO_CATEGORIES[number] for number in annotations.category_ids]
    assert annotations.image_ids.tolist() == [image["id"] for image in oracle.dataset["images"]]
    assert (annotations.clipped, annotations.dropped) == (1, 1)
    dataset = COCODataset(annotations, str(folder))
    assert len(dataset) == len(oracle.imgs)
    crowds = 0
    for index, (image, target) in enumerate(dataset):
        image_id = int(target["image_id"])
        info = oracle.imgs[image_id]
        assert image.shape == (3, info["height"], info["width"])
        stored = np.asarray(PIL.Image.open(folder / info["file_name"]).convert("RGB")).astype(int)
        assert np.abs(image.permute(1, 2, 0).numpy() - stored).max() <= 4  # JPEG decoders differ
        expected = [
            entry for entry in oracle.loadAnns(oracle.getAnnIds(imgIds=[image_id])) if min(entry["bbox"][2:]) > 0
        ]
        boxes = np.array([entry["bbox"] for entry in expected]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        if index == 4:
            # the one that reaches ten pixels out; that of picture 5, 0.4 pixels out, stays
            boxes[boxes[:, 2] == info["width"] + 10, 2] = info["width"]
        assert target["boxes"].shape == (len(expected), 4)
        assert np.allclose(target["boxes"], boxes, rtol=1e-7)
        assert [annotations.category_ids[label - 1] for label in target["labels"].tolist()] == [
            entry["category_id"] for entry in expected
        ]
        assert np.allclose(target["area"], [entry["area"] for entry in expected])
        assert target["iscrowd"].tolist() == [entry["iscrowd"] for entry in expected]
        crowds += sum(target["iscrowd"].tolist())
    assert crowds == 2


def test_a_test_set_needs_no_annotations(coco_root):
    path = coco_root / "annotations/image_info_test2017.json"
    annotations = fitted(read_annotations(str(path), "test_annotations", ""), coco_root / "test2017")
    assert not annotations.annotated
    assert annotations.boxes.shape == (0, 4)
    image, target = COCODataset(annotations, str(coco_root / "test2017"))[2]
    assert image.shape == (3, 80, 80)
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == target["area"].shape == target["iscrowd"].shape == (0,)


def test_what_may_be_missing(read, folder):
    annotations = [
        {"image_id": 3, "category_id": 9.0, "bbox": [1, 2, 3, 4]},
        {"image_id": 7, "category_id": 2, "bbox": [0, 0, 2, 2], "area": None, "iscrowd": None, "id": None},
        {"image_id": 7, "category_id": 2, "bbox": [-10, 0, 20, 5], "area": float("nan")},
    ]
    images = [
        {"id": 7, "file_name": "a.png", "width": -1, "height": -1},
        {"id": 3, "file_name": "b.png", "width": None, "height": 0},
    ]
    found = fitted(read(document(images=images, annotations=annotations)), folder)
    assert found.sizes.tolist() == [[30, 40], [50, 20]]
    assert found.boxes.tolist() == [[0, 0, 2, 2], [0, 0, 10, 5], [1, 2, 4, 6]]
    # of the box as it was clipped
    assert found.area.tolist() == [4, 50, 12]
    assert found.iscrowd.tolist() == [0, 0, 0]
    assert found.labels.tolist() == [1, 1, 2]


def renamed(images=lambda number: number, categories=lambda number: number, of_annotations=None):
    """The document with other ids; `of_annotations` is for those of images where annotations name them."""
    content = document()
    for image in content["images"]:
        image["id"] = images(image["id"])
    for category in content["categories"]:
        category["id"] = categories(category["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = (of_annotations or images)(annotation["image_id"])
        annotation["category_id"] = categories(annotation["category_id"])
    return content


def each(key, **changes):
    """The document with changes to every entry of a list; functions get the old value."""
    content = document()
    for entry in content[key]:
        for name, change in changes.items():
            entry[name] = change(entry[name]) if callable(change) else change
    return content


def doubled(key):
    content = document()
    return {**content, key: [*content[key], *(dict(entry, extra=1) for entry in content[key])]}


FORMS = {
    "ids of images as text": renamed(lambda number: f"scan-{number}"),
    "as text of numbers": renamed(str),
    "as floats": renamed(float),
    "as fractions": renamed(lambda number: number + 0.25),
    "negative": renamed(lambda number: -number),
    "beyond 32 bits": renamed(lambda number: number * 2**40),
    "beyond 64 bits": renamed(lambda number: number * 2**70),
    "of two kinds": renamed(lambda number: number if number == 3 else str(number)),
    "as text in annotations alone": renamed(of_annotations=str),
    "as text in images alone": renamed(str, of_annotations=int),
    "ids of categories as text": renamed(categories=lambda number: f"c{number}"),
    "as whole floats": renamed(categories=float),
    "from 0": renamed(categories={9: 1, 2: 0}.__getitem__),
    "beyond 64 bits too": renamed(categories=lambda number: number * 2**70),
    "categories in another order": {**document(), "categories": document()["categories"][::-1]},
    "categories twice": doubled("categories"),
    "images twice": doubled("images"),
    "iscrowd as bool": each("annotations", iscrowd=bool),
    "iscrowd as text": each("annotations", iscrowd=str),
    "area as text": each("annotations", area=str),
    "bbox of floats": each("annotations", bbox=lambda box: list(map(float, box))),
    "bbox of text": each("annotations", bbox=lambda box: list(map(str, box))),
    "sizes as text": each("images", width=str, height=str),
    "sizes as floats": each("images", width=float, height=float),
    "no sizes": each("images", width=None, height=-1),
    "no ids of annotations": each("annotations", id=None),
    "unknown keys": {**each("images", license=None), "info": None, "licenses": [], "videos": 3},
    "segments": each("annotations", segmentation=[[1, 2, 3]], attributes={"occluded": False}, keypoints=[0]),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_data_set_in_many_forms(read, folder, tmp_path, form):
    """What exporters make of one file; each is read as the same boxes, and pycocotools tells the order."""
    plain, found = fitted(read(document()), folder), fitted(read(FORMS[form]), folder)
    for name in ("file_names", "sizes", "offsets", "boxes", "labels", "area", "iscrowd"):
        assert getattr(found, name).tolist() == getattr(plain, name).tolist(), name
    assert found.class_names == plain.class_names
    assert found.notes == ()
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO(str(tmp_path / "boxes.json"))
    dataset = COCODataset(found, str(folder))
    own = [dataset.own_id(int(target["image_id"])) for _, target in dataset]
    assert list(map(repr, own)) == list(map(repr, dict.fromkeys(oracle.imgs)))  # 1.0 is not 1 here
    ids = list(dict.fromkeys(category["id"] for category in oracle.dataset["categories"]))
    assert found.category_ids == sorted(ids)
    if form != "of two kinds":  # which pycocotools cannot sort
        assert sorted(own) == sorted(own, key=lambda number: found.image_ids[own.index(number)])
    assert found.image_ids.dtype == np.int64


def test_names_that_are_numbers(read):
    categories = [{"id": k, "name": name} for k, name in enumerate((1, 2.0, 2.5, 10**20, "", "1.0", "e\u0301"))]
    found = read(document(categories=categories, annotations=[]))
    assert found.class_names == ["1", "2", "2.5", "1" + 20 * "0", "", "1.0", "\u00e9"]


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_list_of_annotations(read, folder, empty):
    found = fitted(read({**document(), "annotations": empty}), folder)
    assert found.annotated
    assert found.boxes.shape == (0, 4)
    assert len(found) == 2


def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(read, folder):
    content = document()
    orphans = [{"id": 70, "image_id": 4, "category_id": 2, "bbox": [1, 1, 1, 1]}, {"image_id": "x", "bbox": 3}]
    content["annotations"][1:1] = orphans
    plain, found = fitted(read(document()), folder), fitted(read(content), folder)
    assert found.boxes.tolist() == plain.boxes.tolist()
    assert found.notes == (
        "2 of its 5 annotations left out, of images that it does not list, such as annotation 70 of image 4",
    )
    # those that are left are called by their place among all
    content["annotations"].append({"image_id": 7, "category_id": 12})
    assert "annotation number 6 (without id) is of category 12" in error_of(read, content)


def test_a_byte_order_mark_is_no_offence(read):
    assert len(read("\ufeff" + json.dumps(document()))) == 2


# ---- boxes and pictures


@pytest.mark.filterwarnings("error")
def test_boxes_that_leave_their_picture(read, folder):
    boxes = [
        [-1, -1, 42, 32],  # a pixel on each side: rounded
        [39, 29, 2, 2.0000001],
        [-1.5, 0, 10, 10],  # more
        [0, 0, 10, 900],
        [0, 0, 1e300, 5],
        [10, 10, 0, 5],  # no area
        [10, 10, 5, -5],
        [50, 0, 10, 10],  # outside
        [39.9999999, 5, 1e-9, 5],  # no width in float32
        [40, 5, 1, 5],  # a pixel out, and nothing of it within
    ]
    found = fitted(read(document(annotations=boxes_of(*boxes))), folder)
    expected = [[-1, -1, 41, 31], [39, 29, 41, 31], [0, 0, 8.5, 10], [0, 0, 10, 30], [0, 0, 40, 5]]
    assert np.array_equal(found.boxes, np.array(expected, dtype=np.float32))
    assert (found.clipped, found.dropped) == (3, 5)
    assert found.offsets.tolist() == [0, 5, 5]


side = st.one_of(st.floats(-30, 80), st.integers(-30, 80))


@given(boxes=st.lists(st.tuples(st.integers(0, 1), side, side, side, side, st.integers(0, 1)), max_size=12))
@settings(max_examples=150, deadline=None)
def test_every_box_is_kept_clipped_or_dropped(tmp_path_factory, boxes):
    root = tmp_path_factory.mktemp("coco")
    sizes = [(40, 30), (20, 50)]
    for name, size in zip("ab", sizes, strict=True):
        PIL.Image.new("L", size).save(root / f"{name}.png")
    entries = [
        {"image_id": (7, 3)[which], "category_id": 2, "bbox": [x, y, w, h], "iscrowd": crowd, "id": number}
        for number, (which, x, y, w, h, crowd) in enumerate(boxes)
    ]
    path = root / "boxes.json"
    path.write_text(json.dumps(document(annotations=entries)))
    found = fitted(read_annotations(str(path), "train_annotations", ""), root)
    expected, clipped = defaultdict(list), 0
    for which, x, y, w, h, crowd in boxes:
        right, bottom = sizes[which]
        inside = np.array([max(x, 0), max(y, 0), min(x + w, right), min(y + h, bottom)], dtype=np.float32)
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            continue
        leaves = max(-x, -y, x + w - right, y + h - bottom) > 1.001
        clipped += leaves
        expected[which].append((inside if leaves else np.float32([x, y, x + w, y + h]), crowd))
    assert found.clipped == clipped
    assert found.dropped == len(boxes) - sum(map(len, expected.values()))
    training = found.for_training(keep_empty=True)
    sparse = found.for_training(keep_empty=False)
    for which in range(2):
        target = COCODataset(found, str(root))[which][1]
        assert np.array_equal(target["boxes"], np.array([box for box, _ in expected[which]]).reshape(-1, 4))
        assert target["iscrowd"].tolist() == [crowd for _, crowd in expected[which]]
        single = [crowd for _, crowd in expected[which] if not crowd]
        assert COCODataset(training, str(root))[which][1]["iscrowd"].tolist() == single
        assert ((7, 3)[which] in sparse.image_ids) == bool(single)
    assert sparse.boxes.tolist() == training.boxes.tolist()


# ---- names of files

NFC, NFD = (unicodedata.normalize(form, "Gr\u00fc\u00dfe \u00e9t\u00e9") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("there", "named", "expected"),
    [
        ("a b.png", "a b.png", "a b.png"),
        ("deep/er/a.png", "deep/er/a.png", "deep/er/a.png"),
        ("deep/a.png", "deep\\a.png", "deep/a.png"),
        ("deep\\a.png", "deep\\a.png", "deep\\a.png"),
        ("deep/a.png", "./deep//a.png", "deep/a.png"),
        ("a.png", ".\\a.png", "a.png"),
        ("a.png", "deep/../a.png", "a.png"),
        (f"{NFC}/{NFD}.png", f"{NFD}/{NFC}.png", f"{NFC}/{NFD}.png"),
        ("a b.png", "a%20b.png", "a b.png"),
        ("a%20b.png", "a%20b.png", "a%20b.png"),
        ("a.png", "pictures/a.png", "a.png"),
        ("a.png", "pictures\\a.png", "a.png"),
        ("a.png", "{parent}/pictures/a.png", "a.png"),
        ("pictures/a.png", "pictures/a.png", "pictures/a.png"),
        ("a.png", "../pictures/a.png", "a.png"),
        ("a.png", "{folder}/a.png", "a.png"),
        ("a.png", "elsewhere/pictures/a.png", None),
        ("a.png", "../a.png", None),
        ("../a.png", "../a.png", None),
        ("../a.png", "{folder}/../a.png", None),
        ("../pictures2/a.png", "../pictures2/a.png", None),
        ("a.png", "C:\\data\\a.png", None),
        ("a.png", "A.png", None),
        ("a.png/b", "a.png", "unreadable"),
    ],
)
def test_names_of_files(read, folder, there, named, expected):
    (folder / "a.png").rename(folder / "old")
    (folder / there).parent.mkdir(parents=True, exist_ok=True)
    (folder / "old").rename(folder / there)
    named = named.format(folder=folder, parent=folder.parent.name)
    content = document(images=[{"id": 7, "file_name": named}, {"id": 3, "file_name": "b.png"}])
    if expected is None:
        message = error_of(fitted, read(content), folder)
        assert (
            f"1 of the 2 pictures of train_annotations='{folder.parent}/boxes.json' are missing, such as {named}"
            in (message)
        )
        is_there = (folder / named.replace("\\", "/").rpartition("/")[2]).exists()
        assert ("there is a.png: write names relative to the folder" in message) == is_there
    elif expected == "unreadable":
        assert "cannot be read (Is a directory)" in error_of(fitted, read(content), folder)
    else:
        dataset = COCODataset(fitted(read(content), folder), str(folder))
        assert os.path.normpath(dataset.path(0)) == os.path.normpath(folder / expected)
        assert [image.shape[1] for image, _ in dataset] == [30, 50]


def test_a_name_of_two_files(read, folder):
    (folder / "pictures").mkdir()
    (folder / "a.png").rename(folder / "pictures" / NFC)
    (folder / "b.png").rename(folder / NFC)
    content = document(images=[{"id": 7, "file_name": f"pictures/{NFD}"}, {"id": 3, "file_name": NFC}])
    message = error_of(fitted, read(content), folder)
    assert message.startswith(f"train_images='{folder}': pictures/{NFD} may be pictures/{NFC} or {NFC} in it; rename")


def test_an_address_stands_in_for_a_name(read, folder):
    (folder / "a.png").rename(folder / "a b.png")
    images = [
        {"id": 7, "coco_url": "http://images.cocodataset.org/train2017/a%20b.png?x=1"},
        {"id": 3, "file_name": "b.png"},
    ]
    dataset = COCODataset(fitted(read(document(images=images)), folder), str(folder))
    assert dataset.path(0) == f"{folder}/a b.png"


# ---- the pictures' heads


def test_missing_pictures(read, folder):
    message = error_of(fitted, read(document()), folder / "none")
    assert message == f"train_images='{folder}/none': expected a folder of pictures, and there is none; get some"
    os.remove(folder / "b.png")
    message = error_of(fitted, read(document()), folder)
    assert message.startswith(f"train_images='{folder}': 1 of the 2 pictures of train_annotations=")
    assert "are missing, such as b.png; add them, or name the folder" in message
    images = [{"id": 7, "file_name": "no/such/a.png"}, {"id": 3, "file_name": "a.png/b.png"}]
    assert "2 of the 2 pictures" in error_of(fitted, read(document(images=images)), folder)


def with_size(width, height, name="a.png"):
    images = [{"id": 7, "file_name": name, "width": width, "height": height}, {"id": 3, "file_name": "b.png"}]
    return document(images=images)


@pytest.mark.parametrize(
    ("size", "orientation", "found", "remedy"),
    [
        ((50, 30), 1, "40x30 and not 50x30", "boxes do not fit; correct them in the file, or replace the images"),
        ((40, 31), 3, "40x30, stored turned (EXIF) and not 40x31", "correct them in the file, or replace the images"),
        ((41, 30), 6, "40x30, stored turned (EXIF) and not 41x30", "correct them in the file, or replace the images"),
        ((30, 40), 1, "40x30 and not 30x40", "width and height are exchanged: correct them in the file"),
        ((30, 40), 3, "40x30, stored turned (EXIF) and not 30x40", "width and height are exchanged: correct them in"),
    ],
)
def test_other_sizes_than_the_file_says_are_counted_before_anything_is_decoded(
    read, folder, size, orientation, found, remedy
):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.new("RGB", (40, 30)).save(folder / "a.png", exif=exif)
    content = with_size(*size)
    content["images"] += [{**content["images"][0], "id": number} for number in (100, 101)]
    message = error_of(fitted, read(content), folder)
    assert message.startswith(
        f"train_images='{folder}': expected the widths and heights that train_annotations='{folder.parent}/boxes.json' "
        f"says, found others in 3 of its 4 images, such as a.png, which is {found}, so that its boxes do not fit; "
    )
    assert remedy in message


def test_files_that_cannot_be_read_are_counted_before_anything_is_decoded(read, folder):
    whole = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(b"no picture")
    message = error_of(fitted, read(document()), folder)
    start = (
        f"train_images='{folder}': 1 of the 2 images of train_annotations='{folder.parent}/boxes.json' cannot be read"
    )
    assert message == f"{start}, such as {folder}/a.png: this file is not a picture; replace or remove it"
    (folder / "b.png").write_bytes(b"")
    assert "2 of the 2 images" in error_of(fitted, read(document()), folder)
    # no head says that the rest is missing
    (folder / "b.png").write_bytes(whole)
    (folder / "a.png").write_bytes(whole[:-30])
    content = document(images=[{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}])
    dataset = COCODataset(fitted(read(content), folder), str(folder))
    for ask in (dataset.read, dataset.__getitem__):
        assert error_of(ask, 0).startswith(f"{folder}/a.png: this picture cannot be read")
    assert len(dataset.read(1)) == 2


def test_bad_pictures_may_be_left_out(read, folder):
    def skipping():
        return read(document()).check_pictures(str(folder), "train_images", "get some", skip_bad=True)

    (folder / "a.png").write_bytes(b"no picture")
    found = skipping()
    assert found.image_ids.tolist() == [3]
    assert found.boxes.tolist() == [[1, 2, 4, 6], [2, 1, 12, 21]]
    bad = f"{folder}/a.png: this file is not a picture; replace or remove it"
    assert found.notes == (f"1 of its 2 images left out, which cannot be read, such as {bad}",)
    (folder / "a.png").unlink()
    found = skipping()
    assert (found.image_ids.tolist(), len(found.boxes)) == ([3], 2)
    assert found.notes == ("1 of its 2 images left out, which are missing, such as a.png",)
    # none may be left out where none is left
    (folder / "b.png").write_bytes(b"")
    assert "1 of the 1 images of" in error_of(skipping)
    (folder / "b.png").unlink()
    assert "2 of the 2 pictures of" in error_of(skipping)


def test_skipping_takes_the_next_readable_one_with_its_own_boxes(read, folder):
    whole = (folder / "a.png").read_bytes()
    dataset = COCODataset(fitted(read(document()), folder), str(folder), skip_bad=True)
    (folder / "a.png").write_bytes(whole[:-30])
    with pytest.warns(UserWarning, match="skipped") as caught:
        image, target = dataset[0]
    assert (int(target["image_id"]), image.shape[1], len(target["boxes"])) == (3, 50, 2)
    assert str(caught[0].message).startswith(f"skipped {folder}/a.png: ")
    assert f"{folder}/a.png: " in error_of(dataset.read, 0)
    # replaced by another after its head was read
    PIL.Image.new("RGB", (30, 40)).save(folder / "a.png")
    message = error_of(dataset.read, 0)
    assert message.startswith(f"{folder}/a.png: this image is 30x40, and was 40x30 when train_annotations=")


# ---- pictures that are stored turned


def painted(orientation, size=(40, 30)):
    """A picture as stored with that EXIF orientation, of which a box is painted, and the box upright, by PIL."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[4:9, 10:30] = 255
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    # as PIL turns it
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG", exif=exif)
    upright = np.asarray(PIL.ImageOps.exif_transpose(PIL.Image.open(file)))
    rows, columns = np.flatnonzero(upright.any((1, 2))), np.flatnonzero(upright.any((0, 2)))
    return (
        PIL.Image.fromarray(pixels),
        exif,
        upright,
        [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1],
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_turn_as_pixels_do(orientation):
    _, _, upright, box = painted(orientation)
    stored = np.array([[10.0, 4, 30, 9]])
    turned = turn_boxes(stored, orientation, np.array([[30, 40]]))
    assert turned.tolist() == [box]
    back = turn_boxes(turned, {6: 8, 8: 6}.get(orientation, orientation), np.array([upright.shape[:2]]))
    assert back.tolist() == stored.tolist()


@pytest.mark.parametrize(
    ("orientation", "given", "name"),
    [
        (5, "stored", "a.png"),
        (6, "stored", "a.jpg"),
        (7, "stored", "a.webp"),
        (8, "stored", "a.tif"),
        (5, "upright", "a.jpg"),
        (6, "upright", "a.tif"),
        (7, "upright", "a.png"),
        (8, "upright", "a.webp"),
        (2, "both", "a.png"),
        (3, "both", "a.jpg"),
        (4, "both", "a.tif"),
        (6, "none", "a.jpg"),
        (8, "none", "a.tif"),
        (6, "square", "a.png"),
        (1, "both", "a.jpg"),
    ],
)
def test_the_size_in_the_file_tells_whose_pixels_the_boxes_are(read, folder, orientation, given, name):
    """The box in the file lies on what is painted, either as stored or as a viewer shows it, and so does the target."""
    picture, exif, upright, box = painted(orientation, (40, 40) if given == "square" else (40, 30))
    picture.save(folder / name, exif=exif, **({"quality": 100, "subsampling": 0} if name == "a.jpg" else {}))
    width, height = picture.size if given == "stored" else upright.shape[1::-1]
    content = with_size(width, height, name) if given != "none" else with_size(None, None, name)
    x1, y1, x2, y2 = (10, 4, 30, 9) if given == "stored" else map(int, box)
    content["annotations"] = boxes_of([x1, y1, x2 - x1, y2 - y1], area=77)
    found = fitted(read(content), folder)
    dataset = COCODataset(found, str(folder))
    image, target = dataset[0]
    assert tuple(image.shape[1:]) == upright.shape[:2] == tuple(found.sizes[0])
    assert target["boxes"].tolist() == [box]
    assert target["area"].tolist() == [77]
    (left, top, right, bottom), bright = box, image.float().mean(0)
    assert bright[top:bottom, left:right].min() > 200
    assert bright.sum() < 1.1 * bright[top:bottom, left:right].sum()
    results = dataset.own_results([{"image_id": 7, "bbox": [left, top, right - left, bottom - top], "score": 0.5}])
    assert results == [{"image_id": 7, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": 0.5}]
    what = "turned upright with them, since width and height" if given == "stored" else "taken to be of the upright"
    notes = [f"1 of its images are stored turned (EXIF): their boxes are {what}"] if orientation > 1 else []
    assert len(found.notes) == len(notes)
    assert all(found.startswith(note) for found, note in zip(found.notes, notes, strict=True))


@pytest.mark.parametrize("boxes_of_upright", [False, True])
def test_boxes_tell_where_the_sizes_lie(read, folder, boxes_of_upright):
    """Some tools annotate the upright picture, and then write the size that the head of the file says."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "c.png"):
        PIL.Image.new("RGB", (40, 30)).save(folder / name, exif=exif)
    content = with_size(40, 30)
    content["images"].append({"id": 100, "file_name": "c.png", "width": 40, "height": 30})
    inside, tall, wide = [1, 2, 10, 10], [2, 25, 5, 14], [25, 2, 14, 5]
    content["annotations"] = boxes_of(inside, tall if boxes_of_upright else wide)
    content["annotations"].append({"image_id": 100, "category_id": 2, "bbox": inside})
    found = fitted(read(content), folder)
    expected = [[1, 2, 11, 12], [2, 25, 7, 39], [1, 2, 11, 12]]
    if not boxes_of_upright:
        expected = turn_boxes(np.array([[1, 2, 11, 12], [25, 2, 39, 7], [1, 2, 11, 12]]), 6, np.array([[30, 40]]))
        expected = expected.tolist()
    assert found.boxes.tolist() == expected
    assert (found.clipped, found.dropped) == (0, 0)
    (note,) = found.notes
    assert ("where they fit, though width and height are given as stored" in note) == boxes_of_upright


@pytest.mark.parametrize("others", ["stored", "upright", "both"])
def test_where_the_size_does_not_decide_the_other_images_do(read, folder, others):
    content = document()
    content["images"], content["annotations"] = [], []
    for number, (orientation, size) in enumerate([(3, (40, 30)), (6, (30, 30)), (6, (40, 30)), (8, (40, 30))]):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        PIL.Image.new("RGB", size).save(folder / f"{number}.png", exif=exif)
        if (number == 2 and others == "upright") or (number == 3 and others != "stored"):
            size = size[::-1]
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        content["annotations"].append({"image_id": number, "category_id": 2, "bbox": [1, 2, 3, 4]})
    found = fitted(read(content), folder)
    turned = {"stored": [3, 6, 6, 8], "upright": [1, 1, 1, 1], "both": [1, 1, 6, 1]}[others]
    assert found.orientations.tolist() == turned
    expected = {1: [1, 2, 4, 6], 3: [36, 24, 39, 28], 6: [24, 1, 28, 4], 8: [2, 36, 6, 39]}
    assert found.boxes.tolist() == [expected[orientation] for orientation in turned]
    (note,) = found.notes
    how = {
        "stored": "their boxes are turned upright with them",
        "upright": "their boxes are taken to be of the upright image, as",
        "both": "the boxes of 1 are turned upright with them",
    }[others]
    assert note.startswith(f"4 of its images are stored turned (EXIF): {how}")


def test_damaged_or_unusual_exif_turns_nothing(read, folder):
    for name, exif in (("a.jpg", b"Exif\0\0II*\0\xff\xff\xff\xff"), ("b.jpg", b"Exif\0\0MM")):
        PIL.Image.new("RGB", (40, 30)).save(folder / name, exif=exif)
    odd = PIL.Image.Exif()
    odd[0x0112] = 9
    PIL.Image.new("RGB", (40, 30)).save(folder / "c.jpg", exif=odd)
    heads = read_heads([str(folder / name) for name in ("a.jpg", "b.jpg", "c.jpg")])
    assert heads == [(30, 40, 1)] * 3


@pytest.mark.parametrize("place", ["before the pixels", "none"])
def test_the_size_of_a_png_is_read_from_its_head(tmp_path, place):
    picture = PIL.Image.effect_noise((400, 300), 100)
    exif = picture.getexif()
    exif[0x0112] = 8
    picture.save(tmp_path / "a.png", **({"exif": exif} if place != "none" else {}))
    half = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(half[: len(half) // 2])
    assert read_heads([str(tmp_path / "a.png")]) == [(300, 400, 1 if place == "none" else 8)]


# ---- average precision


def detected(dataset):
    """Boxes near the true ones and others, in eighths of pixels, with scores of few values: many are equal."""
    rng = np.random.default_rng(0)
    for index in range(len(dataset)):
        image, target = dataset[index]
        height, width = image.shape[1:]
        corner = rng.integers(0, [width * 6, height * 6], (4, 2)) / 8
        other = np.concatenate([corner, corner + rng.integers(8, 40, (4, 2)) / 8], axis=1)
        near = target["boxes"].numpy() + rng.integers(-12, 12, (len(target["boxes"]), 4)) / 8
        boxes = np.concatenate([near, other])
        boxes = np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)
        labels = np.concatenate([target["labels"].numpy(), rng.integers(1, 3, 4)])
        scores = rng.integers(1, 4, len(boxes)) / 4
        yield (
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32),
                "labels": torch.tensor(labels),
                "scores": torch.tensor(scores, dtype=torch.float32),
            },
            target,
        )


@pytest.mark.parametrize(
    "kind", ["numbers", "text", "floats", "beyond 64 bits", "categories as text", "orphans", "stored turned"]
)
def test_average_precision_is_that_of_pycocotools_on_the_same_file(tmp_path, kind):
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    image_id = {
        "text": lambda number: f"scan {number}",  # of which number 10 comes before 2
        "floats": float,
        "beyond 64 bits": lambda number: number * 2**65,
    }.get(kind, int)
    category_id = (lambda number: f"{number}") if kind == "categories as text" else int
    content = {"images": [], "categories": [], "annotations": []}
    for number, name in ((10, "a"), (9, "b")):
        content["categories"].append({"id": category_id(number), "name": name})
    for number in rng.permutation(14).tolist():
        exif = PIL.Image.Exif()
        if kind == "stored turned":
            exif[0x0112] = 1 + number % 8
        PIL.Image.new("L", (48, 32)).save(tmp_path / "pictures" / f"{number}.png", exif=exif)
        content["images"].append({"id": image_id(number), "file_name": f"{number}.png", "width": 48, "height": 32})
        for _ in range(number % 4):
            x, y = rng.integers(0, [24, 16]).tolist()
            w, h = rng.integers(6, [24, 16]).tolist()
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id(number),
                    "category_id": category_id(9 + int(rng.integers(2))),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
    if kind == "orphans":
        content["images"] = content["images"][:10]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    annotations = read_annotations(str(path), "val_annotations", "")
    dataset = COCODataset(fitted(annotations, tmp_path / "pictures"), str(tmp_path / "pictures"))
    metric = BoxMeanAveragePrecision()
    metric.update(*zip(*detected(dataset), strict=True))
    ours = metric.compute()
    results = dataset.own_results(metric.results(annotations.category_ids))
    (tmp_path / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100"]
    official = {name: value for name, value in zip(names, evaluation.stats, strict=False) if value > -1}
    assert {name: float(value) for name, value in ours.items()} == pytest.approx(official, abs=1e-9)
    assert 0.1 < official["map"] < 0.9
    assert {result["image_id"] for result in results} == {image["id"] for image in content["images"]}


# ---- bad files


def test_a_missing_file(tmp_path):
    path = str(tmp_path / "none.json")
    message = error_of(read_annotations, path, "val_annotations", "get some")
    assert message == f"val_annotations='{path}': expected a COCO annotation file, and there is none; get some"
    assert "cannot be read (Is a directory); get some" in error_of(
        read_annotations, str(tmp_path), "val_annotations", "get some"
    )


@pytest.mark.parametrize(
    ("content", "phrases"),
    [
        ("", ["this file is not JSON (Expecting value: line 1 column 1 (char 0)); replace or repair it"]),
        ('{"images": [', ["this file is not JSON"]),
        pytest.param("[" * 100_000, ["this file is not JSON"], id="deep"),
        ([1, 2], ["expected a JSON object with lists of images, annotations and categories", "found a list"]),
        ({}, ["found nothing and no images and no categories and no annotations"]),
        ({"a": 1, "annotations": []}, ["found a, annotations and no images and no categories; choose or write"]),
        (document(images=None), ["found categories, annotations and no images; choose"]),
        (document(categories=None), ["found images, annotations and no categories; choose"]),
        (document(images={}), ["expected a list of objects under images"]),
        (document(annotations=[[1]]), ["expected a list of objects under annotations"]),
        (document(images=[]), ["the list of images is empty"]),
        (document(categories=[]), ["the list of categories is empty"]),
        (document(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), ["every category id once, found 1 "]),
        (
            document(categories=[{"id": n, "name": "ab"[n % 2]} for n in range(4)], annotations=[]),
            ["found 'a' several", "(and 1 more)"],
        ),
        (
            document(categories=[{"id": 1, "name": 7.0}, {"id": 2, "name": "7"}], annotations=[]),
            ["every name of a category once, found '7' several"],
        ),
        (document(categories=[{"id": 1}]), ["category 1 has no name (name=None); give it one"]),
        (document(categories=[{"id": 1, "name": True}]), ["category 1 has no name (name=True); give it one"]),
        (document(categories=[{"id": 1.5, "name": "a"}]), ["as id of every category, found id=1.5 in number 1"]),
        (document(categories=[{"id": [1], "name": "a"}]), ["as id of every category, found id=[1] in number 1"]),
        (document(images=[{"file_name": "a.png"}]), ["as id of every image, found id=None in number 1"]),
        (document(images=[{"id": True, "file_name": "a.png"}]), ["as id of every image, found id=True in number 1"]),
        (document(images=[{"id": float("nan"), "file_name": "a.png"}]), ["as id of every image, found id=nan"]),
        (document(images=[{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]), ["every image id once, found 7"]),
        (document(images=[{"id": 7}]), ["image 7 has no file_name"]),
        (document(images=[{"id": 7, "file_name": 3}]), ["image 7 has no file_name"]),
        (
            document(images=[{"id": 7, "file_name": "a", "width": -3, "height": 4}], annotations=[]),
            ["image 7 has width=-3 and height=4; expected whole numbers of pixels"],
        ),
        (document(images=[{"id": 7, "file_name": "a", "width": "wide"}], annotations=[]), ["image 7 has width='wide'"]),
        (document(images=[{"id": 7, "file_name": "a", "width": 2.5}], annotations=[]), ["image 7 has width=2.5"]),
        (
            document(annotations=[{"id": 88, "image_id": 4, "category_id": 2, "bbox": [1, 1, 1, 1]}]),
            ["none of its 1 annotations is of an image that it lists, such as annotation 88 of image 4; give it "],
        ),
        (
            document(annotations=[{"image_id": 7, "category_id": 12, "bbox": [1, 1, 1, 1]}]),
            ["annotation number 1 (without id) is of category 12, which is not in the list of categories"],
        ),
        (document(annotations=[{"id": 5, "category_id": [2]}]), ["annotation 5 is of image None, which is no id"]),
        (document(annotations=[{"id": 5, "image_id": [7], "category_id": 2}]), ["annotation 5 is of image [7], which"]),
        (document(annotations=[{"id": 5, "image_id": 7, "category_id": [2]}]), ["annotation 5 is of category [2]"]),
        (document(annotations=boxes_of([1, 2, 3])), ["annotation 70 has bbox=[1, 2, 3]; expected four finite numbers"]),
        (document(annotations=boxes_of([1, 2, 3, float("nan")])), ["annotation 70 has bbox=[1, 2, 3, nan]"]),
        (document(annotations=boxes_of([0, 0, 1, 1], [1, 2, 3, float("inf")])), ["annotation 71 has bbox="]),
        (document(annotations=boxes_of([1, 2, "x", 4])), ["annotation 70 has bbox=[1, 2, 'x', 4]"]),
        (document(annotations=boxes_of([[1, 2], [3, 4]])), ["annotation 70 has bbox=[[1, 2], [3, 4]]"]),
        (document(annotations=boxes_of(None)), ["annotation 70 has bbox=None"]),
        (document(annotations=boxes_of([1, 2, 3, 4], area="big")), ["annotation 70 has area='big'; expected a number"]),
        (document(annotations=boxes_of([1, 2, 3, 4], area=1e300)), ["annotation 70 has area=1e+300; expected a num"]),
        (document(annotations=boxes_of([1, 2, 3, 4], iscrowd=2)), ["annotation 70 has iscrowd=2; make it 0 or 1"]),
        (document(annotations=boxes_of([1, 2, 3, 4], iscrowd="no")), ["annotation 70 has iscrowd='no'"]),
    ],
)
def test_bad_files_are_refused(read, tmp_path, content, phrases):
    message = error_of(read, content)
    assert message.startswith(f"train_annotations='{tmp_path}/boxes.json': ")
    for phrase in phrases:
        assert phrase in message


def test_polygons_are_not_kept(read, monkeypatch):
    loaded = []
    load = json.loads
    monkeypatch.setattr(json, "loads", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    read(document(annotations=boxes_of([1, 2, 3, 4], segmentation=[[1, 2, 3, 4, 5, 6]])))
    assert "bbox" in loaded[0]["annotations"][0]
    assert "segmentation" not in loaded[0]["annotations"][0]


def test_an_address_that_is_none(read):
    images = [{"id": 7, "coco_url": "http://[x/a.png"}, {"id": 3, "file_name": "b.png"}]
    message = error_of(read, document(images=images))
    assert "image 7 has no file_name (but 'http://[x/a.png')" in message


def test_a_folder_that_cannot_be_read(read, folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    found = read(document())
    monkeypatch.setattr("awconv.data.coco.os.listdir", refuse)
    assert "train_images: the folder of pictures" in (message := error_of(fitted, found, folder))
    assert "cannot be read (Permission denied)" in message


@pytest.mark.parametrize("changed", [{"bbox": [10**400, 1, 2, 3]}, {"bbox": [1, 2, float("inf"), 3]}])
def test_numbers_beyond_all_bounds_are_refused(tmp_path, changed):
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "apple"}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, **changed}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="5"):
        read_annotations(str(tmp_path / "boxes.json"), "train_annotations", "")
