import shutil
import unicodedata

import PIL.Image
import pytest
import torch

from awconv.data import ImageNetDataModule
from awconv.errors import InputError
from miniature import make_class_folders


def module(root, **options):
    return ImageNetDataModule(str(root), **{"num_workers": 0, "batch_size": 4, "image_size": 32, **options})


def message_of(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_own_class_folders(imagenet_root):
    data = module(imagenet_root)
    assert data.class_names == ["cat", "dog", "owl"]
    assert (data.num_classes, data.in_channels, data.image_size) == (3, 3, 32)
    train = list(data.train_dataloader())
    assert [images.shape for images, _ in train] == [(4, 3, 32, 32)] * 3
    assert torch.cat([targets for _, targets in train]).bincount().tolist() == [4, 4, 4]
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert torch.cat([targets for _, targets in loader]).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_labels_belong_to_the_pictures(tmp_path):
    # one pure colour per class, so that a picture tells its class
    colours = {"a": (255, 0, 0), "b": (0, 255, 0), "c": (0, 0, 255)}
    for split in ("train", "val"):
        for name, colour in colours.items():
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(3):
                PIL.Image.new("RGB", (40, 50), colour).save(tmp_path / split / name / f"{number}.png")
    data = module(tmp_path, augment="basic")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for images, targets in loader:
            assert images.mean(dim=(2, 3)).argmax(dim=1).tolist() == targets.tolist()


def test_evaluation_crop_is_the_centre_of_the_resized_picture(tmp_path):
    make_class_folders(tmp_path, size=(60, 90))
    data = module(tmp_path, image_size=28, batch_size=1)
    images, _ = next(iter(data.val_dataloader()))
    path = sorted((tmp_path / "val" / "cat").iterdir())[0]
    with PIL.Image.open(path) as picture:
        # 256/224 of 28 is 32; the picture is 60 high and 90 wide; PIL's own resizing is the oracle
        resized = picture.resize((48, 32), PIL.Image.Resampling.BILINEAR)
    expected = torch.tensor(list(resized.crop((10, 2, 38, 30)).tobytes())).view(28, 28, 3).permute(2, 0, 1) / 255
    found = images[0] * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    assert (found - expected).abs().max() < 3 / 255


def test_higher_test_resolution(imagenet_root):
    data = module(imagenet_root, eval_image_size=40)
    assert next(iter(data.train_dataloader()))[0].shape[-2:] == (32, 32)
    assert next(iter(data.test_dataloader()))[0].shape[-2:] == (40, 40)
    assert next(iter(data.val_dataloader()))[0].shape[-2:] == (40, 40)
    assert data.image_size == 32
    data = module(imagenet_root, eval_image_size=40, eval_resize_size=40)
    assert next(iter(data.test_dataloader()))[0].shape[-2:] == (40, 40)
    assert next(iter(module(imagenet_root, augment="none").train_dataloader()))[0].shape[-2:] == (32, 32)


def test_default_sizes_are_the_usual_recipe():
    data = ImageNetDataModule()
    resize, crop = data.eval_geometry()
    assert (list(resize.size), list(crop.size)) == ([256], [224, 224])
    assert list(data.train_geometry()[0].size) == [224, 224]


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"eval_image_size": 0}, "eval_image_size=0: expected"),
        (
            {"eval_image_size": 224, "eval_resize_size": 200},
            "eval_resize_size=200: expected a whole number, at least the 224",
        ),
        ({"eval_image_size": 32.5}, "eval_image_size=32.5: expected"),
        ({"eval_resize_size": "64"}, "eval_resize_size='64': expected"),
        ({"on_bad_image": "ignore"}, "on_bad_image='ignore': expected stop, skip or null"),
        ({"class_names": ["a", "b", "a"]}, "class_names=['a']: expected each name once"),
        ({"class_names": ["e\u0301", "\u00e9", "b"]}, "class_names=['\u00e9']: expected each name once"),
        ({"class_names": []}, "class_names=[]: expected at least two names"),
        ({"class_names": ["cat"]}, "class_names=['cat']: expected at least two names"),
        ({"check_images": "yes"}, "check_images='yes': expected true or false"),
    ],
)
def test_bad_arguments(imagenet_root, options, start):
    assert message_of(lambda: module(imagenet_root, **options)).startswith(start)


# ---- class names


def test_wordnet_ids_get_english_names(tmp_path):
    # both cranes of ImageNet, which share a name, and a tench
    make_class_folders(tmp_path, classes=("n01440764", "n02012849", "n03126707"))
    assert module(tmp_path).class_names == ["tench", "crane (n02012849)", "crane (n03126707)"]


def test_all_names_of_imagenet_are_unique():
    from timm.data import ImageNetInfo

    from awconv.data.imagenet import _readable

    ids = ImageNetInfo("imagenet-1k").label_names()
    names = _readable(ids)
    assert len(set(names)) == 1000
    assert names[0] == "tench"
    assert names[999] == "toilet tissue"


@pytest.mark.parametrize("classes", [("n01440764", "n99999999"), ("n00004475", "n01440764"), ("n01440764", "cat")])
def test_other_folders_keep_their_names(tmp_path, classes):
    make_class_folders(tmp_path, classes=classes)
    assert module(tmp_path).class_names == sorted(classes)


@pytest.mark.parametrize("names", [["crane", "tench"], ["n02012849", "n01440764"]])
def test_given_names_decide_the_numbers(tmp_path, names):
    make_class_folders(tmp_path, classes=("n01440764", "n02012849"))
    data = module(tmp_path, class_names=names)
    assert data.class_names == names
    assert torch.cat([targets for _, targets in data.val_dataloader()]).tolist() == [1, 1, 1, 0, 0, 0]
    data.setup("fit")


def test_folder_names_and_english_names_are_not_mixed(tmp_path):
    make_class_folders(tmp_path, classes=("n01440764", "n02012849"))
    message = message_of(lambda: module(tmp_path, class_names=["crane", "n01440764"]).setup("test"))
    assert message.startswith("class_names (2 names): expected those of the 2 class folders in ")
    assert "no folder for crane and no name for n02012849" in message


def test_each_split_is_scanned_once(imagenet_root, monkeypatch):
    scanned = []
    scan = ImageNetDataModule._scan
    monkeypatch.setattr(ImageNetDataModule, "_scan", lambda self, split: scanned.append(split) or scan(self, split))
    data = module(imagenet_root)
    assert data.num_classes == 3
    data.setup("fit")
    data.setup("test")
    assert sorted(scanned) == ["train", "val"]


def test_given_names_that_differ_from_the_folders(imagenet_root):
    data = module(imagenet_root, class_names=["cat", "dog", "cow", "ape"])
    message = message_of(lambda: data.setup("test"))
    assert message.startswith("class_names (4 names): expected those of the 3 class folders in ")
    assert "no folder for cow, ape and no name for owl" in message


def test_with_names_train_is_needed_for_training_only(imagenet_root):
    shutil.rmtree(imagenet_root / "train")
    names = ["cat", "dog", "owl"]
    data = module(imagenet_root, class_names=names)
    data.setup("validate")
    data.setup("test")
    message = message_of(lambda: data.setup("fit"))
    assert "train/CLASS/*.JPEG" in message
    assert "found val" in message
    assert "give class_names" in message_of(lambda: module(imagenet_root).setup("test"))


def test_with_names_predict_needs_no_root(tmp_path, picture_folder):
    data = module(tmp_path / "nowhere", class_names=["a", "b"], predict_dir=str(picture_folder))
    assert data.num_classes == 2
    data.setup("predict")
    images, paths = next(iter(data.predict_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert len(paths) == 4


# ---- folders that are not as they should be


def test_root_missing(tmp_path):
    for ask in (lambda data: data.class_names, lambda data: data.num_classes, lambda data: data.setup("test")):
        message = message_of(lambda ask=ask: ask(module(tmp_path / "nowhere")))
        for part in ("nowhere", "train/CLASS/*.JPEG", "there is no such folder", "--data.root FOLDER"):
            assert part in message


def test_root_empty(tmp_path):
    for ask in (lambda data: data.class_names, lambda data: data.setup("fit")):
        assert "found nothing; add" in message_of(lambda ask=ask: ask(module(tmp_path)))


def test_root_of_something_else(tmp_path):
    for number in range(5):
        (tmp_path / f"folder{number}").mkdir()
    assert "found folder0, folder1, folder2, ... (5 in all); add" in message_of(lambda: module(tmp_path).class_names)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_class_folders(imagenet_root, split):
    shutil.rmtree(imagenet_root / split)
    (imagenet_root / split).mkdir()
    message = message_of(lambda: module(imagenet_root).class_names)
    assert f"expected {split}/CLASS/*.JPEG in it, found no class folders" in message


def test_a_flat_val(imagenet_root):
    shutil.rmtree(imagenet_root / "val")
    (imagenet_root / "val").mkdir()
    for number in range(1, 6):
        PIL.Image.new("RGB", (8, 8)).save(imagenet_root / "val" / f"ILSVRC2012_val_{number:08}.JPEG")
    for ask in (lambda data: data.class_names, lambda data: data.setup("fit"), lambda data: data.setup("test")):
        message = message_of(lambda ask=ask: ask(module(imagenet_root)))
        assert "expected val/CLASS/*.JPEG in it, found a flat folder of pictures" in message
        assert "(ILSVRC2012_val_00000001.JPEG, ILSVRC2012_val_00000002.JPEG" in message
        assert "(5 in all)" in message
        assert "move each into the folder of its class, as in val/n01440764/ILSVRC2012_val_00000001.JPEG" in message


def test_a_val_that_is_half_sorted(imagenet_root):
    PIL.Image.new("RGB", (8, 8)).save(imagenet_root / "val" / "left.JPEG")
    assert "1 pictures outside of any class folder (left.JPEG)" in message_of(
        lambda: module(imagenet_root).setup("test")
    )


def test_class_folders_that_differ(imagenet_root):
    shutil.rmtree(imagenet_root / "val" / "dog")
    for name in ("yak", "ape", "bat", "cow"):
        shutil.copytree(imagenet_root / "val" / "cat", imagenet_root / "val" / name)
    for ask in (lambda data: data.class_names, lambda data: data.setup("fit")):
        message = message_of(lambda ask=ask: ask(module(imagenet_root)))
        assert "only in train/: dog; only in val/: ape, bat, cow, ... (4 in all)" in message


@pytest.mark.parametrize("absent", ["no folder", "an empty folder", "a folder without images"])
@pytest.mark.parametrize("names", [None, ["owl", "dog", "cat"]])
def test_a_class_without_validation_images(imagenet_root, capsys, caplog, absent, names):
    shutil.rmtree(imagenet_root / "val" / "dog")
    if absent != "no folder":
        (imagenet_root / "val" / "dog").mkdir()
        (imagenet_root / "val" / "left over").mkdir()  # empty, and so nobody's class
    if absent == "a folder without images":
        (imagenet_root / "val" / "dog" / "notes.txt").touch()
    data = module(imagenet_root, class_names=names)
    with caplog.at_level("INFO"):
        data.setup("fit")
        data.setup("test")
    assert [record.message for record in caplog.records if "no images of" in record.message] == [
        f"{imagenet_root}/val: no images of 1 of the 3 classes: dog"
    ]
    targets = torch.cat([targets for _, targets in data.val_dataloader()]).bincount(minlength=3)
    assert targets.tolist() == [3, 0, 3]
    assert data.class_names == (names or ["cat", "dog", "owl"])


def test_no_validation_image_at_all(imagenet_root):
    for path in (imagenet_root / "val").glob("*/*"):
        path.unlink()
    assert "the class folders in val/ hold no images" in message_of(lambda: module(imagenet_root).setup("fit"))


def test_of_two_cranes_one_may_be_without_validation_images(tmp_path):
    make_class_folders(tmp_path, classes=("n01440764", "n02012849", "n03126707"))
    shutil.rmtree(tmp_path / "val" / "n02012849")
    (tmp_path / "val" / "left over").mkdir()
    data = module(tmp_path)
    data.setup("fit")
    assert set(torch.cat([targets for _, targets in data.val_dataloader()]).tolist()) == {0, 2}


@pytest.mark.parametrize("given", [False, True])
def test_one_name_in_two_spellings_of_unicode_is_one_class(tmp_path, given):
    composed, apart = (unicodedata.normalize(form, "Käfer") for form in ("NFC", "NFD"))
    make_class_folders(tmp_path, classes=("cat", composed))
    (tmp_path / "val" / composed).rename(tmp_path / "val" / apart)
    # an archive of the one and a copy of the other may even lie side by side
    (tmp_path / "train" / apart).mkdir()
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "train" / apart / "more.png")
    data = module(tmp_path, class_names=[apart, "cat"] if given else None)
    data.setup("fit")
    assert data.class_names == ([apart, "cat"] if given else [composed, "cat"])
    index = data.class_names.index(apart if given else composed)
    targets = [
        torch.cat([targets for _, targets in loader]) for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert (targets[1] == index).sum() == 3
    assert len(data.load_split("train")) == 9


def test_a_single_class(tmp_path):
    make_class_folders(tmp_path, classes=("cat",))
    (tmp_path / "train" / "__MACOSX").mkdir()
    for ask in (lambda data: data.class_names, lambda data: data.setup("fit")):
        message = message_of(lambda ask=ask: ask(module(tmp_path)))
        assert message.endswith(
            f"expected at least two class folders in {tmp_path}/train, found only cat; add a folder with images of "
            "another class"
        )


def test_one_line_for_each_split_counts_what_is_passed_over(imagenet_root, caplog):
    for name in (".DS_Store", "Thumbs.db", "cat/notes.txt", "cat/._cat.JPEG", "labels.csv"):
        (imagenet_root / "train" / name).touch()
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "dog/.thumbnails"):
        shutil.copytree(imagenet_root / "val" / "cat", imagenet_root / "train" / name)
    data = module(imagenet_root, predict_dir=str(imagenet_root / "train"))
    with caplog.at_level("INFO"):
        for stage in ("fit", "test", "predict"):
            data.setup(stage)
    hidden = "7 hidden names (.DS_Store, ._*, .ipynb_checkpoints, ...)"
    assert [record.message for record in caplog.records] == [
        f"{imagenet_root}/train: passed over 2 files that are no images (.csv, .txt) and {hidden}"
    ] * 2
    assert (len(data.load_split("train")), data.class_names) == (12, ["cat", "dog", "owl"])
    assert sum(len(paths) for _, paths in data.predict_dataloader()) == 12


def test_a_class_without_pictures(imagenet_root):
    for path in (imagenet_root / "train" / "dog").iterdir():
        path.unlink()
    assert "the class folder train/dog holds no images" in message_of(lambda: module(imagenet_root).setup("fit"))


# ---- pictures that cannot be read


def spoil(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_stops_training_by_name(imagenet_root, workers):
    path = imagenet_root / "train" / "dog" / "dog_0001.JPEG"
    spoil(path)
    data = module(imagenet_root, num_workers=workers)
    message = message_of(lambda: list(data.train_dataloader()))
    assert message.startswith(f"{path}: this picture cannot be read (")


def test_training_may_skip_it(imagenet_root):
    path = imagenet_root / "train" / "dog" / "dog_0001.JPEG"
    spoil(path)
    data = module(imagenet_root, on_bad_image="skip")
    with pytest.warns(UserWarning, match="skipped .*dog_0001"):
        targets = torch.cat([targets for _, targets in data.train_dataloader()])
    assert targets.bincount().tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("split", "on_bad_image"), [("val", "skip"), ("test", "skip"), ("val", None), ("train", None), ("predict", "stop")]
)
def test_everything_else_stops(imagenet_root, split, on_bad_image):
    path = imagenet_root / ("train" if split == "train" else "val") / "dog" / "dog_0001.JPEG"
    spoil(path)
    data = module(imagenet_root, on_bad_image=on_bad_image, predict_dir=str(imagenet_root / "val"))
    loader = getattr(data, f"{split}_dataloader")()
    assert message_of(lambda: list(loader)).startswith(f"{path}: this picture cannot be read (")


@pytest.mark.parametrize("on_bad_image", [None, "skip"])
def test_prediction_skips_it(imagenet_root, on_bad_image):
    path = imagenet_root / "val" / "dog" / "dog_0001.JPEG"
    spoil(path)
    data = module(imagenet_root, on_bad_image=on_bad_image, predict_dir=str(imagenet_root / "val"))
    paths = [path for _, paths in data.predict_dataloader() for path in paths]
    assert (len(paths), paths.count("")) == (9, 1)
    assert str(path) not in paths


def test_all_images_are_checked_where_that_is_asked_for(imagenet_root):
    bad = [imagenet_root / split / "dog" / "dog_0001.JPEG" for split in ("train", "val")]
    for path in bad:
        spoil(path)
    data = module(imagenet_root, check_images=True, predict_dir=str(imagenet_root / "val"))
    message = message_of(lambda: data.setup("fit"))
    assert message.startswith(f"check_images=True: 2 of the 21 images of train and val cannot be read: {bad[0]}: ")
    assert f"; {bad[1]}: " in message
    assert message.endswith("; replace or remove them")
    assert "1 of the 9 images of test" in message_of(lambda: data.setup("test"))
    data.setup("predict")
    stopping = module(imagenet_root, check_images=True, on_bad_image="stop", predict_dir=str(imagenet_root / "val"))
    assert "1 of the 9 images of predict" in message_of(lambda: stopping.setup("predict"))
    for path in bad:
        path.unlink()
    data = module(imagenet_root, check_images=True)
    data.setup("fit")
