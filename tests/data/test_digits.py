import numpy as np
import PIL.Image
import pytest
import torch
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits

from awconv.data import DigitsDataModule
from awconv.data.digits import _RandomAffine
from awconv.errors import InputError


def stack(loader):
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def grey_levels(module, images):
    """Images (N, 1, 8, 8) back in the 17 grey levels of scikit-learn."""
    return ((images * module.std[0] + module.mean[0]) * 16).squeeze(1)


@pytest.fixture(scope="module")
def splits():
    module = DigitsDataModule(image_size=8, augment="none", batch_size=1257)
    return {
        "module": module,
        "train": stack(module.train_dataloader()),
        "val": stack(module.val_dataloader()),
        "test": stack(module.test_dataloader()),
    }


def test_the_splits_partition_the_digits(splits):
    digits = load_digits()
    images = torch.cat([splits[name][0] for name in ("train", "val", "test")])
    targets = torch.cat([splits[name][1] for name in ("train", "val", "test")])
    found = grey_levels(splits["module"], images)
    assert (found - found.round()).abs().max() < 0.04
    rows = np.concatenate([found.round().flatten(1).numpy(), targets[:, None].numpy()], axis=1)
    expected = np.concatenate([digits.data, digits.target[:, None]], axis=1)
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])


def test_the_splits_are_stratified(splits):
    share = np.bincount(load_digits().target) / 1797
    for name, size in (("train", 1257), ("val", 180), ("test", 360)):
        targets = splits[name][1]
        assert len(targets) == size
        assert np.abs(targets.bincount(minlength=10).numpy() - share * size).max() <= 1


def test_the_split_depends_on_its_seed_alone(splits):
    torch.manual_seed(123)
    again = stack(DigitsDataModule(image_size=8).test_dataloader())
    assert torch.equal(again[0], splits["test"][0])
    other = stack(DigitsDataModule(image_size=8, seed=1).test_dataloader())
    assert not torch.equal(other[0], splits["test"][0])


def test_normalisation_is_that_of_the_data():
    levels = load_digits().data / 16
    module = DigitsDataModule()
    assert module.mean[0] == pytest.approx(levels.mean(), abs=1e-3)
    assert module.std[0] == pytest.approx(levels.std(), abs=1e-3)


def test_facts():
    module = DigitsDataModule()
    assert (module.num_classes, module.in_channels, module.image_size) == (10, 1, 16)
    assert module.class_names == list("0123456789")
    assert module.num_workers == 0
    images, targets = next(iter(module.train_dataloader()))
    assert images.shape == (64, 1, 16, 16)
    assert images.dtype == torch.float32
    assert targets.shape == (64,)


def test_too_small_an_image():
    with pytest.raises(InputError, match="image_size=7: expected a whole number of pixels, at least 8"):
        DigitsDataModule(image_size=7)


@pytest.mark.parametrize("options", [{"augment": "randaugment"}, {"random_erasing": 1.0}])
def test_augmentation_of_single_digits(options):
    seed_everything(0)
    augmented = DigitsDataModule(**options).train_dataloader()
    plain = DigitsDataModule().train_dataloader()
    first, second = stack(augmented), stack(augmented)
    assert first[0].shape == (1216, 1, 16, 16)
    assert not torch.equal(first[0], stack(plain)[0])
    assert not torch.equal(first[0], second[0])
    seed_everything(0)
    assert torch.equal(stack(DigitsDataModule(**options).train_dataloader())[0], first[0])


# ---- the affine maps of a batch


def blob(size=33, row=16, column=16, radius=2.5):
    """A bright disc on the ground -1."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2).float()[None] * 2 - 1


def centre(images):
    """Centre of mass (row, column) of what stands out from the ground -1, in pixels, (N, 2)."""
    mass = images[:, 0] + 1
    positions = torch.arange(images.shape[-1]).float()
    total = mass.sum(dim=(1, 2))
    return torch.stack([(mass.sum(2) * positions).sum(1), (mass.sum(1) * positions).sum(1)], dim=1) / total[:, None]


def test_no_limits_no_change():
    images = torch.rand(4, 1, 9, 9)
    still = _RandomAffine(-1, degrees=0, shear=0, scale=0, shift=0)
    moved, targets = still(images, torch.arange(4))
    assert torch.allclose(moved, images, atol=1e-5)
    assert targets.tolist() == [0, 1, 2, 3]


def test_shifts_stay_within_their_limit_and_reveal_the_ground():
    torch.manual_seed(0)
    images = blob().expand(200, 1, 33, 33)
    moved, _ = _RandomAffine(-1, degrees=0, shear=0, scale=0, shift=0.1)(images, torch.zeros(200))
    offset = centre(moved) - 16
    assert offset.abs().max() <= 3.3 + 0.05
    assert (offset.abs().max(dim=0).values > 2.6).all()
    assert offset.mean(dim=0).abs().max() < 0.5
    assert torch.allclose(moved[:, 0, 0, 0], torch.tensor(-1.0), atol=1e-5)


def test_rotations_stay_within_their_limit():
    torch.manual_seed(0)
    images = blob(row=6).expand(200, 1, 33, 33)
    moved, _ = _RandomAffine(-1, degrees=10, shear=0, scale=0, shift=0)(images, torch.zeros(200))
    arm = centre(moved) - 16
    angle = torch.rad2deg(torch.atan2(arm[:, 1], -arm[:, 0]))
    assert angle.abs().max() <= 10.2
    assert angle.max() > 8
    assert angle.min() < -8
    assert torch.allclose(arm.norm(dim=1), torch.tensor(10.0), atol=0.2)


def test_nothing_is_mirrored():
    # a disc in the upper left corner stays there
    images = blob(row=8, column=8).expand(300, 1, 33, 33)
    moved, _ = _RandomAffine(-1)(images, torch.zeros(300))
    assert (centre(moved) < 15).all()


def test_only_basic_augmentation_has_them():
    assert DigitsDataModule(augment="none").batch_transforms() == []
    assert [type(step) for step in DigitsDataModule().batch_transforms()] == [_RandomAffine]


# ---- pictures to predict


@pytest.mark.parametrize("invert", [False, True])
def test_a_digit_saved_as_a_picture_comes_back(tmp_path, splits, invert):
    module = splits["module"]
    digits = grey_levels(module, splits["test"][0][:5]).round() / 16 * 255
    for number, digit in enumerate(digits):
        grey = PIL.Image.fromarray(digit.round().numpy().astype(np.uint8))
        if invert:
            grey = PIL.Image.eval(grey, lambda level: 255 - level)
        # as a scan may have it: larger, in colour
        grey.resize((32, 32), PIL.Image.Resampling.NEAREST).convert("RGB").save(tmp_path / f"{number}.png")
    prediction = DigitsDataModule(image_size=8, predict_dir=str(tmp_path), invert=invert)
    images, paths = next(iter(prediction.predict_dataloader()))
    assert images.shape == (5, 1, 8, 8)
    assert [path.rpartition("/")[2] for path in paths] == [f"{number}.png" for number in range(5)]
    found, expected = grey_levels(module, images), grey_levels(module, splits["test"][0][:5])
    # antialiased reduction smears a little across pixels
    for number in range(5):
        ours = torch.corrcoef(torch.stack([found[number].flatten(), expected[number].flatten()]))[0, 1]
        assert ours > 0.95
        assert (found[number] - expected[number]).abs().mean() < 1.5
