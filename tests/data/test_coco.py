import json
import os
from collections import defaultdict

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

import miniature
from awconv.data.coco import COCOAnnotations, COCODataset, read_annotations
from awconv.data.pictures import picture_size
from awconv.errors import InputError


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
        {"image_id": 7, "category_id": 2, "bbox": [-10, 0, 20, 5]},
    ]
    images = [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png", "width": None, "height": 0}]
    found = fitted(read(document(images=images, annotations=annotations)), folder)
    assert found.sizes.tolist() == [[30, 40], [50, 20]]
    assert found.boxes.tolist() == [[0, 0, 2, 2], [0, 0, 10, 5], [1, 2, 4, 6]]
    # of the box as it was clipped
    assert found.area.tolist() == [4, 50, 12]
    assert found.iscrowd.tolist() == [0, 0, 0]
    assert found.labels.tolist() == [1, 1, 2]


def test_names_with_folders_backslashes_or_only_a_url(read, folder):
    (folder / "deep").mkdir()
    (folder / "b.png").rename(folder / "deep" / "b.png")
    images = [
        {"id": 7, "width": 40, "height": 30, "coco_url": "http://images.cocodataset.org/train2017/a.png?x=1"},
        {"id": 3, "width": 20, "height": 50, "file_name": "deep\\b.png"},
    ]
    dataset = COCODataset(fitted(read(document(images=images)), folder), str(folder))
    assert [dataset.path(index) for index in range(2)] == [f"{folder}/a.png", f"{folder}/deep/b.png"]
    assert [image.shape[1] for image, _ in dataset] == [30, 50]


def test_a_byte_order_mark_is_no_offence(read):
    assert len(read("\ufeff" + json.dumps(document()))) == 2


# ---- boxes and pictures


def test_boxes_that_leave_their_picture(read, folder):
    boxes = [
        [-1, -1, 42, 32],  # a pixel on each side: rounded
        [39, 29, 2, 2.0000001],
        [-1.5, 0, 10, 10],  # more
        [0, 0, 10, 900],
        [10, 10, 0, 5],  # no area
        [10, 10, 5, -5],
        [50, 0, 10, 10],  # outside
        [39.9999999, 5, 1e-9, 5],  # no width in float32
        [40, 5, 1, 5],  # a pixel out, and nothing of it within
    ]
    found = fitted(read(document(annotations=boxes_of(*boxes))), folder)
    expected = [[-1, -1, 41, 31], [39, 29, 41, 31], [0, 0, 8.5, 10], [0, 0, 10, 30]]
    assert np.array_equal(found.boxes, np.array(expected, dtype=np.float32))
    assert (found.clipped, found.dropped) == (2, 5)
    assert found.offsets.tolist() == [0, 4, 4]


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


def test_pictures_are_read_as_they_are_stored(read, folder):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (40, 30)).save(folder / "a.jpg", exif=exif)
    images = [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}, {"id": 3, "file_name": "b.png"}]
    dataset = COCODataset(fitted(read(document(images=images)), folder), str(folder))
    assert dataset[0][0].shape == (3, 30, 40)
    images[0] |= {"width": 30, "height": 40}
    dataset = COCODataset(fitted(read(document(images=images)), folder), str(folder))
    message = error_of(dataset.__getitem__, 0)
    assert message.startswith(f"{folder}/a.jpg: this picture is 40x30, stored turned (EXIF), and train_annotations=")
    assert "says 30x40, so that its boxes do not fit" in message


def test_exchanged_width_and_height_are_told_from_a_turned_picture(read, folder):
    PIL.Image.new("RGB", (40, 30)).save(folder / "a.png")
    images = [{"id": 7, "file_name": "a.png", "width": 30, "height": 40}, {"id": 3, "file_name": "b.png"}]
    dataset = COCODataset(fitted(read(document(images=images)), folder), str(folder))
    message = error_of(dataset.__getitem__, 0)
    assert message.startswith(f"{folder}/a.png: this picture is 40x30, and train_annotations=")
    assert "says 30x40" in message
    assert message.endswith("its width and height are exchanged: mend them")


def test_a_picture_of_another_size_is_named(read, folder):
    PIL.Image.new("RGB", (41, 30)).save(folder / "a.png")
    dataset = COCODataset(fitted(read(document()), folder), str(folder))
    assert f"{folder}/a.png: this picture is 41x30, and train_annotations=" in error_of(dataset.__getitem__, 0)


def test_missing_pictures(read, folder):
    message = error_of(fitted, read(document()), folder / "none")
    assert message == f"train_images='{folder}/none': expected a folder of pictures, and there is none; get some"
    os.remove(folder / "b.png")
    message = error_of(fitted, read(document()), folder)
    assert message.startswith(f"train_images='{folder}': 1 of the 2 pictures of train_annotations=")
    assert "are missing, such as b.png; add them, or name the folder" in message
    images = [{"id": 7, "file_name": "no/such/a.png"}, {"id": 3, "file_name": "a.png/b.png"}]
    assert "2 of the 2 pictures" in error_of(fitted, read(document(images=images)), folder)


@pytest.mark.parametrize("damage", [b"", b"no picture", None])
def test_a_damaged_picture_is_named(read, folder, damage):
    path = folder / "a.png"
    path.write_bytes(path.read_bytes()[:40] if damage is None else damage)
    dataset = COCODataset(fitted(read(document()), folder), str(folder))
    assert error_of(dataset.__getitem__, 0).startswith(f"{path}: this ")
    if damage is not None:
        # where its size has to be read
        images = [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}]
        assert error_of(fitted, read(document(images=images)), folder).startswith(f"{path}: this ")


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
            document(categories=[{"id": n, "name": "ab"[n % 2]} for n in range(4)]),
            ["found 'a' several", "(and 1 more)"],
        ),
        (document(categories=[{"id": 1}]), ["category 1 has no name (name=None); give it one"]),
        (document(categories=[{"id": "1", "name": "a"}]), ["as id of every category, found id='1' in number 1"]),
        (document(images=[{"file_name": "a.png"}]), ["as id of every image, found id=None in number 1"]),
        (
            document(images=[{"id": 2**63, "file_name": "a.png"}]),
            ["as id of every image, found id=9223372036854775808"],
        ),
        (document(images=[{"id": 7, "file_name": "a"}, {"id": 7, "file_name": "b"}]), ["every image id once, found 7"]),
        (document(images=[{"id": 7}]), ["image 7 has no file_name"]),
        (document(images=[{"id": 7, "file_name": 3}]), ["image 7 has no file_name"]),
        (
            document(images=[{"id": 7, "file_name": "a", "width": -3, "height": 4}], annotations=[]),
            ["image 7 has width=-3 and height=4; expected whole numbers of pixels"],
        ),
        (document(images=[{"id": 7, "file_name": "a", "width": "3"}], annotations=[]), ["image 7 has width='3'"]),
        (
            document(annotations=[{"id": 88, "image_id": 4, "category_id": 2, "bbox": [1, 1, 1, 1]}]),
            ["annotation 88 is of image 4, which is not in the list of images; add the image or remove the annotation"],
        ),
        (
            document(annotations=[{"image_id": 7, "category_id": 12, "bbox": [1, 1, 1, 1]}]),
            ["annotation number 1 (without id) is of category 12, which is not in the list of categories"],
        ),
        (document(annotations=[{"id": 5, "category_id": [2]}]), ["annotation 5 is of image None"]),
        (document(annotations=[{"id": 5, "image_id": 7, "category_id": [2]}]), ["annotation 5 is of category [2]"]),
        (document(annotations=boxes_of([1, 2, 3])), ["annotation 70 has bbox=[1, 2, 3]; expected four finite numbers"]),
        (document(annotations=boxes_of([1, 2, 3, float("nan")])), ["annotation 70 has bbox=[1, 2, 3, nan]"]),
        (document(annotations=boxes_of([0, 0, 1, 1], [1, 2, 3, float("inf")])), ["annotation 71 has bbox="]),
        (document(annotations=boxes_of([1, 2, "3", 4])), ["annotation 70 has bbox=[1, 2, '3', 4]"]),
        (document(annotations=boxes_of(None)), ["annotation 70 has bbox=None"]),
        (document(annotations=boxes_of([1, 2, 3, 4], area="9")), ["annotation 70 has area='9'; expected a number"]),
        (document(annotations=boxes_of([1, 2, 3, 4], iscrowd=2)), ["annotation 70 has iscrowd=2; make it 0 or 1"]),
        (document(annotations=boxes_of([1, 2, 3, 4], iscrowd="0")), ["annotation 70 has iscrowd='0'"]),
    ],
)
def test_bad_files_are_refused(read, tmp_path, content, phrases):
    message = error_of(read, content)
    assert message.startswith(f"train_annotations='{tmp_path}/boxes.json': ")
    for phrase in phrases:
        assert phrase in message


def test_a_crowd_may_be_true(read):
    assert read(document(annotations=boxes_of([1, 2, 3, 4], iscrowd=True))).iscrowd.tolist() == [1]


def test_polygons_are_not_kept(read, monkeypatch):
    loaded = []
    load = json.load
    monkeypatch.setattr(json, "load", lambda *args, **options: loaded.append(load(*args, **options)) or loaded[-1])
    read(document(annotations=boxes_of([1, 2, 3, 4], segmentation=[[1, 2, 3, 4, 5, 6]])))
    assert "bbox" in loaded[0]["annotations"][0]
    assert "segmentation" not in loaded[0]["annotations"][0]


@pytest.mark.parametrize("orientation", [3, 6])
def test_a_turned_picture_of_unknown_size_is_refused(tmp_path, orientation):
    picture = PIL.Image.new("RGB", (40, 30))
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "phone.jpg", exif=exif)
    content = {
        "images": [{"id": 1, "file_name": "phone.jpg"}],
        "categories": [{"id": 1, "name": "apple"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    annotations = read_annotations(str(tmp_path / "boxes.json"), "train_annotations", "")
    with pytest.raises(InputError, match=f"phone.jpg.*EXIF orientation {orientation}.*width and height"):
        annotations.check_pictures(str(tmp_path), "train_images", "")
    content["images"][0].update(width=40, height=30)  # as stored
    (tmp_path / "boxes.json").write_text(json.dumps(content))
    annotations = read_annotations(str(tmp_path / "boxes.json"), "train_annotations", "")
    assert annotations.check_pictures(str(tmp_path), "train_images", "").sizes.tolist() == [[30, 40]]


def test_a_turned_tiff_can_only_be_saved_upright(tmp_path):
    """PIL turns it whenever it reads it, so that no size as stored would be right."""
    picture = PIL.Image.new("RGB", (40, 30))
    picture.save(tmp_path / "scan.tif", tiffinfo={0x0112: 6})
    with pytest.raises(InputError, match=r"scan.tif.*boxes belong; save it upright$"):
        picture_size(tmp_path / "scan.tif")


@pytest.mark.parametrize("place", ["before the pixels", "none"])
def test_the_size_of_a_png_is_read_from_its_head(tmp_path, place):
    picture = PIL.Image.effect_noise((400, 300), 100)
    exif = picture.getexif()
    exif[0x0112] = 1
    picture.save(tmp_path / "a.png", **({"exif": exif} if place != "none" else {}))
    half = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(half[: len(half) // 2])
    assert picture_size(tmp_path / "a.png") == (300, 400)


@pytest.mark.parametrize("name", ["\ud800.png", "", 7, None])
def test_a_name_that_no_file_can_have(read, name):
    message = error_of(read, document(images=[{"id": 7, "file_name": name}, {"id": 3, "file_name": "b.png"}]))
    assert "image 7 has no file_name" in message


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
