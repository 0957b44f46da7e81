import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from awconv.data import CIFAR10DataModule, CIFAR100DataModule
from awconv.errors import InputError
from miniature import CIFAR10_NAMES, CIFAR100_NAMES, cifar_checksums, make_cifar10, patch_cifar


def pixels_of(module, split):
    """The split's pictures as bytes (N, 3, 32, 32) and its targets."""
    loader = {"val": module.val_dataloader, "test": module.test_dataloader}[split]()
    images, targets = zip(*loader, strict=True)
    std = torch.tensor(module.std).view(3, 1, 1)
    mean = torch.tensor(module.mean).view(3, 1, 1)
    return ((torch.cat(images) * std + mean) * 255).round().to(torch.uint8), torch.cat(targets)


def stored(root, *names):
    """The pickles' pictures and targets, read without torchvision."""
    entries = [pickle.loads((root / name).read_bytes()) for name in names]
    data = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
    key = "labels" if "labels" in entries[0] else "fine_labels"
    return torch.from_numpy(data), [target for entry in entries for target in entry[key]]


BATCHES = [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)]


def test_the_test_set_is_the_published_one_in_its_order(cifar10_root):
    module = CIFAR10DataModule(str(cifar10_root), num_workers=0, batch_size=5)
    data, targets = stored(cifar10_root, "cifar-10-batches-py/test_batch")
    images, found = pixels_of(module, "test")
    assert torch.equal(images, data)
    assert found.tolist() == targets


def test_training_and_validation_partition_the_training_pictures(cifar10_root):
    module = CIFAR10DataModule(str(cifar10_root), num_workers=0, val_size=13, augment="none", batch_size=47)
    data, targets = stored(cifar10_root, *BATCHES)
    position = {picture.numpy().tobytes(): index for index, picture in enumerate(data)}
    assert len(position) == 60
    images, val_targets = pixels_of(module, "val")
    val = [position[image.numpy().tobytes()] for image in images]
    assert [targets[index] for index in val] == val_targets.tolist()
    (batch,) = list(module.train_dataloader())
    restored = (batch[0] * torch.tensor(module.std).view(3, 1, 1) + torch.tensor(module.mean).view(3, 1, 1)) * 255
    train = [position[image.numpy().tobytes()] for image in restored.round().to(torch.uint8)]
    assert [targets[index] for index in train] == batch[1].tolist()
    assert len(val) == 13
    assert sorted(train + val) == list(range(60))


def val_indices(root, seed=0):
    module = CIFAR10DataModule(str(root), val_size=6, seed=seed)
    module.setup("validate")
    return module._datasets["val"].indices


def test_the_split_depends_on_the_seed_alone(cifar10_root):
    torch.manual_seed(1)
    first = val_indices(cifar10_root)
    torch.manual_seed(2)
    assert val_indices(cifar10_root) == first
    assert val_indices(cifar10_root, seed=1) != first
    # written down, so that no version of torch changes it unnoticed
    assert first == [2, 3, 19, 44, 47, 49]


def test_without_validation_pictures_the_test_set_is_used_and_said_so(cifar10_root):
    module = CIFAR10DataModule(str(cifar10_root), num_workers=0, val_size=0, batch_size=60)
    with pytest.warns(UserWarning, match="val_size=0: validation runs on the test set"):
        module.setup("fit")
    assert torch.equal(pixels_of(module, "val")[0], pixels_of(module, "test")[0])
    assert len(next(iter(module.train_dataloader()))[1]) == 60


def test_basic_augmentation_is_a_padded_crop_and_a_flip(cifar10_root):
    torch.manual_seed(0)
    module = CIFAR10DataModule(str(cifar10_root), num_workers=0, val_size=1, batch_size=59)
    images, _ = next(iter(module.train_dataloader()))
    std, mean = torch.tensor(module.std).view(3, 1, 1), torch.tensor(module.mean).view(3, 1, 1)
    images = ((images * std + mean) * 255).round()
    data, _ = stored(cifar10_root, *BATCHES)
    padded = torch.nn.functional.pad(data.float(), (4, 4, 4, 4))
    seen = set()
    for image in images:
        matches = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if ((image.flip(-1) if flip else image) == padded[:, :, top : top + 32, left : left + 32])
            .flatten(1)
            .all(dim=1)
            .any()
        ]
        assert len(matches) == 1
        seen.update(matches)
    # 59 draws from 162 possibilities
    assert len(seen) > 30
    assert {flip for _, _, flip in seen} == {False, True}
    assert {top for top, _, _ in seen} == set(range(9))


def test_facts(cifar10_root, cifar100_root):
    ten, hundred = CIFAR10DataModule(), CIFAR100DataModule()
    assert (ten.num_classes, hundred.num_classes) == (10, 100)
    assert ten.class_names == CIFAR10_NAMES
    assert len(CIFAR100_NAMES) == 100
    assert hundred.class_names == CIFAR100_NAMES
    for module in (ten, hundred):
        assert (module.in_channels, module.image_size, module.batch_size) == (3, 32, 128)


def test_cifar100_through_torchvision(cifar100_root):
    module = CIFAR100DataModule(str(cifar100_root), num_workers=0, val_size=20)
    data, targets = stored(cifar100_root, "cifar-100-python/test")
    images, found = pixels_of(module, "test")
    assert torch.equal(images, data)
    assert found.tolist() == targets
    assert len(pixels_of(module, "val")[1]) == 20


def test_train_and_val_share_the_pixels(cifar10_root):
    module = CIFAR10DataModule(str(cifar10_root), val_size=5)
    module.setup("fit")
    train, val = module._datasets["train"].dataset, module._datasets["val"].dataset
    assert train.pictures.data_ptr() == val.pictures.data_ptr() == module._archives[True].data.ctypes.data
    assert train.transform is not val.transform


def test_a_transform_that_works_in_place_leaves_the_data_alone(cifar10_root):
    class Spoiling(CIFAR10DataModule):
        def train_geometry(self):
            return [lambda image: image.fill_(7)]

    data = Spoiling(str(cifar10_root), batch_size=5, num_workers=0, val_size=10)
    before = data._part("train")[0].data.copy()
    for _ in data.train_dataloader():
        pass
    assert (data._part("train")[0].data == before).all()


def test_another_image_size(cifar10_root):
    module = CIFAR10DataModule(str(cifar10_root), num_workers=0, val_size=5, image_size=48, batch_size=4)
    assert next(iter(module.train_dataloader()))[0].shape == (4, 3, 48, 48)
    assert next(iter(module.test_dataloader()))[0].shape == (4, 3, 48, 48)


def test_missing_data_says_how_to_get_them(tmp_path):
    module = CIFAR10DataModule(str(tmp_path / "nowhere"))
    with pytest.raises(InputError) as caught:
        module.setup("fit")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("root=", "cifar-10-batches-py", "--data.download true", datasets.CIFAR10.url):
        assert part in message


def test_a_missing_file_is_named(cifar10_root):
    (cifar10_root / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match=r"lacks data_batch_3; get it with --data.download true"):
        CIFAR10DataModule(str(cifar10_root)).setup("fit")


@pytest.mark.parametrize("name", ["data_batch_2", "test_batch", "batches.meta"])
def test_a_damaged_file_is_named(cifar10_root, name):
    path = cifar10_root / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"{name} in .* is damaged \(wrong MD5 sum\)"):
        CIFAR10DataModule(str(cifar10_root)).setup("test")


def test_other_classes_are_refused(cifar10_root, monkeypatch):
    meta = cifar10_root / "cifar-10-batches-py" / "batches.meta"
    meta.write_bytes(pickle.dumps({"label_names": ["dog", *CIFAR10_NAMES[1:]]}))
    for attribute, value in cifar_checksums(datasets.CIFAR10, cifar10_root).items():
        monkeypatch.setattr(datasets.CIFAR10, attribute, value)
    with pytest.raises(
        InputError, match=r"^root=.*: expected the classes airplane to truck .* batches.meta lists others"
    ):
        CIFAR10DataModule(str(cifar10_root)).setup("test")


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    with pytest.raises(InputError) as caught:
        CIFAR10DataModule(str(tmp_path), download=True).prepare_data()
    assert str(caught.value).startswith("download=True: ")
    assert "\n" not in str(caught.value)


def test_download_is_left_alone_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.CIFAR10, "url", (tmp_path / "absent.tar.gz").as_uri())
    CIFAR10DataModule(str(tmp_path)).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_download_of_data_that_are_there(cifar10_root):
    CIFAR10DataModule(str(cifar10_root), download=True).prepare_data()


def test_val_size_is_checked(cifar10_root):
    with pytest.raises(InputError, match="val_size=-1: expected"):
        CIFAR10DataModule(val_size=-1)
    for wrong in (2.5, "8", True):
        with pytest.raises(InputError, match=f"val_size={wrong!r}: expected"):
            CIFAR10DataModule(val_size=wrong)
    with pytest.raises(InputError, match="val_size=60: expected less than the 60 training pictures"):
        CIFAR10DataModule(str(cifar10_root), val_size=60).setup("fit")


def test_patch_for_subprocesses(tmp_path, monkeypatch):
    for attribute in ("train_list", "test_list", "meta"):
        monkeypatch.setattr(datasets.CIFAR10, attribute, getattr(datasets.CIFAR10, attribute))
    patch_cifar(make_cifar10(tmp_path, train=7, test=2))
    assert len(datasets.CIFAR10(tmp_path, train=True)) == 7
