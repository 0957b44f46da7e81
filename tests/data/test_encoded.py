"""Pictures decoded on the training device: the same batches as where workers decode, whatever the process or file."""

import warnings
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torchvision.io import ImageReadMode

from awconv.data import ImageNetDataModule, encoded, pictures
from awconv.data.encoded import EncodedPictures, require_decoder
from awconv.data.pictures import read_encoded, read_picture
from awconv.errors import InputError


def module(root, decode_on_device=True, **options):
    options = {"num_workers": 0, "batch_size": 4, "image_size": 32, **options}
    return ImageNetDataModule(str(root), decode_on_device=decode_on_device, **options)


def both(root, split="train", epochs=2, prepare=lambda data: None, **options):
    """The batches of the ordinary loader and of this one, of the same run."""
    found = []
    for decode_on_device in (False, True):
        torch.manual_seed(7)
        data = module(root, decode_on_device, **options)
        prepare(data)
        loader = getattr(data, f"{split}_dataloader")()
        found.append([batch for _ in range(epochs) for batch in loader])
    return found


def assert_equal(ordinary, ours):
    assert len(ordinary) == len(ours) > 0
    for (images, targets), (their_images, their_targets) in zip(ordinary, ours, strict=True):
        assert torch.equal(images, their_images)
        assert torch.equal(targets, their_targets)
        assert (their_images.dtype, their_targets.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"augment": "none"},
        {"augment": "randaugment", "random_erasing": 0.5},
        {"augment": "autoaugment", "num_workers": 2},
        {"augment": "trivialaugment"},
    ],
)
def test_on_a_cpu_the_batches_are_those_of_workers_that_decode(imagenet_root, options):
    """To the bit: the files go through the same decoder, and the pictures through the same transform."""
    assert_equal(*both(imagenet_root, **options))


def test_pictures_are_what_pil_makes_of_them(imagenet_root):
    """Without augmentation, against another library's decoding, resizing and cropping."""
    images, targets = next(iter(module(imagenet_root, augment="none", image_size=28, batch_size=12).train_dataloader()))
    std, mean = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    expected = {}
    for path in sorted((imagenet_root / "train").rglob("*.*")):
        with PIL.Image.open(path) as picture:
            width, height = picture.size
            # the shorter side to 256/224 of 28
            scale = 32 / min(width, height)
            size = round(width * scale), round(height * scale)
            small = picture.convert("RGB").resize(size, PIL.Image.Resampling.BILINEAR)
        left, top = (size[0] - 28) // 2, (size[1] - 28) // 2
        crop = np.asarray(small.crop((left, top, left + 28, top + 28)))
        expected.setdefault(path.parent.name, []).append(torch.from_numpy(crop.copy()).permute(2, 0, 1) / 255)
    for image, target in zip(images * std + mean, targets.tolist(), strict=True):
        of_class = torch.stack(expected[["cat", "dog", "owl"][target]])
        # 3 of 255 levels: two decoders and two ways to resize, each of which rounds
        assert (of_class - image).abs().flatten(1).amax(dim=1).min() < 3 / 255


@pytest.mark.parametrize("processes", [2, 5])
def test_processes_share_the_work(imagenet_root, processes):
    """Padded where the pictures do not divide evenly, in the order in which workers that decode have them."""
    seen = []
    for rank in range(processes):
        strategy = SimpleNamespace(root_device=torch.device("cpu"), broadcast=lambda seed: 3)
        trainer = SimpleNamespace(
            strategy=strategy,
            global_rank=rank,
            world_size=processes,
            fit_loop=SimpleNamespace(restarted_mid_epoch=False),
        )
        ordinary, ours = both(
            imagenet_root, prepare=lambda data, trainer=trainer: setattr(data, "trainer", trainer), batch_size=1
        )
        assert_equal(ordinary, ours)
        assert len(ours) == 2 * -(-12 // processes)
        seen += [image.numpy().tobytes() for image, _ in ours[: len(ours) // 2]]
    assert len(set(seen)) == 12


@pytest.mark.parametrize("split", ["val", "test", "predict"])
def test_evaluation_and_prediction_are_left_to_the_workers(imagenet_root, split):
    root = str(imagenet_root / "val")
    ordinary, ours = both(imagenet_root, split, epochs=1, predict_dir=root)
    for (images, labels), (their_images, their_labels) in zip(ordinary, ours, strict=True):
        assert torch.equal(images, their_images)
        assert list(labels) == list(their_labels)
    samples = getattr(module(imagenet_root, predict_dir=root), f"{split}_dataloader")().dataset
    assert not isinstance(samples, EncodedPictures)


class Watch(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.batches = []

    def training_step(self, batch):
        self.batches.append(batch)
        return nn.functional.cross_entropy(self.layer(batch[0].mean(dim=(2, 3))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_overfit_batches_are_the_same_every_epoch(imagenet_root, tmp_path):
    found = []
    for decode_on_device in (False, True):
        torch.manual_seed(7)
        watch = Watch()
        run = Trainer(
            accelerator="cpu", max_epochs=2, overfit_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        with pytest.warns(UserWarning, match="requested to overfit"):
            run.fit(watch, module(imagenet_root, decode_on_device))
        found.append(watch.batches)
    assert len(found[1]) == 4
    for (images, targets), (their_images, their_targets) in zip(*found, strict=True):
        assert torch.equal(images, their_images)
        assert torch.equal(targets, their_targets)
    assert all(torch.equal(found[1][step][0], found[1][step + 2][0]) for step in range(2))


def test_a_run_is_resumed_inside_an_epoch(resumes_inside_an_epoch, imagenet_root):
    """The same weights as uninterrupted: the pictures that are left come as they would have."""
    options = ["-c", "configs/recipes/imagenet.yaml", "--model.backbone=resnet20", "--model.stem=cifar"]
    options += [f"--data.root={imagenet_root}", "--data.decode_on_device=true", "--data.image_size=16"]
    options += ["--data.batch_size=2", "--data.num_workers=1", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    resumes_inside_an_epoch(*options)


# ---- files


def picture(height=20, width=30):
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_common_jpegs_travel_as_they_are(tmp_path, mode, options):
    path = tmp_path / "a.jpg"
    picture().convert(mode).save(path, **options)
    assert read_encoded(path).numpy().tobytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["png", "CMYK", "rgb samples", "bytes behind it"])
def test_all_else_is_decoded_by_the_worker(tmp_path, kind):
    path = tmp_path / ("a.png" if kind == "png" else "a.jpg")
    if kind == "rgb samples":
        picture().save(path, keep_rgb=True)
    else:
        (picture().convert("CMYK") if kind == "CMYK" else picture()).save(path)
    if kind == "bytes behind it":
        path.write_bytes(path.read_bytes() + b"more")
    content = read_encoded(path)
    assert content.shape == (3, 20, 30)
    assert torch.equal(content, read_picture(path))


def spoil(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_stops_training_by_name(imagenet_root, workers):
    path = imagenet_root / "train" / "dog" / "dog_0001.JPEG"
    spoil(path)
    with pytest.raises(InputError) as caught:
        list(module(imagenet_root, num_workers=workers).train_dataloader())
    assert str(caught.value).startswith(f"{path}: this picture cannot be read (")
    assert "\n" not in str(caught.value)


def test_training_may_skip_it(imagenet_root):
    spoil(imagenet_root / "train" / "dog" / "dog_0001.JPEG")
    with pytest.warns(UserWarning, match="skipped .*dog_0001"):
        assert_equal(*both(imagenet_root, on_bad_image="skip"))


def refusing(monkeypatch, path):
    """Has the device's decoder refuse a file, which the CPU's decodes."""
    decode, content = encoded.decode_jpeg, torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)

    def decode_jpeg(contents, mode=ImageReadMode.UNCHANGED, device="cpu"):
        if any(torch.equal(given, content) for given in contents):
            raise RuntimeError("Failed to decode jpeg stream")
        return decode(contents, mode, device=device)

    monkeypatch.setattr(encoded, "decode_jpeg", decode_jpeg)


def refusing_too(monkeypatch, path):
    """Has the CPU's decoders refuse it as well."""
    decode = pictures._decoded

    def decoded(file, picture, name):
        if str(name) == str(path):
            raise ValueError("broken")
        return decode(file, picture, name)

    monkeypatch.setattr(pictures, "_decoded", decoded)


def test_what_the_device_refuses_is_decoded_on_the_cpu(imagenet_root, monkeypatch):
    refusing(monkeypatch, imagenet_root / "train" / "owl" / "owl_0001.JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_equal(*both(imagenet_root))


def test_a_decoder_that_refuses_everything_is_told_of_once(imagenet_root, monkeypatch):
    expected = list(module(imagenet_root, decode_on_device=False, num_workers=0).train_dataloader())
    data = module(imagenet_root, num_workers=0)
    samples = data.train_dataloader()

    def refuse(contents, *rest, **options):
        raise RuntimeError("nvJPEG is broken")

    monkeypatch.setattr(encoded, "decode_jpeg", refuse)
    with pytest.warns(UserWarning, match="refused a whole batch") as said:
        got = list(samples)
    assert len([w for w in said if "refused" in str(w.message)]) == 1
    assert len(got) == len(expected) > 1
    for (images, targets), (others, other_targets) in zip(got, expected, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_what_nothing_decodes_is_named_or_skipped(imagenet_root, monkeypatch, on_bad_image):
    path = imagenet_root / "train" / "owl" / "owl_0001.JPEG"
    data = module(imagenet_root, on_bad_image=on_bad_image, batch_size=12)
    refusing(monkeypatch, path)
    refusing_too(monkeypatch, path)
    if on_bad_image == "stop":
        with pytest.raises(InputError, match=rf"^{path}: this picture cannot be read \(broken\); replace or remove it"):
            list(data.train_dataloader())
    else:
        with pytest.warns(UserWarning, match="skipped .*owl_0001"):
            ((images, targets),) = list(data.train_dataloader())
        assert targets.bincount().tolist() == [4, 4, 4]
        assert images.shape == (12, 3, 32, 32)


def test_a_full_memory_is_no_broken_picture(imagenet_root, monkeypatch):
    def decode_jpeg(contents, *rest, **options):
        raise torch.OutOfMemoryError("full")

    samples = module(imagenet_root).train_dataloader()
    monkeypatch.setattr(encoded, "decode_jpeg", decode_jpeg)
    with pytest.raises(torch.OutOfMemoryError):
        list(samples)


# ---- what is refused


@pytest.mark.parametrize("method", ["load", "collate"])
def test_a_class_that_loads_otherwise_is_refused(method):
    other = type("Other", (ImageNetDataModule,), {method: lambda *given: None})
    other()
    with pytest.raises(
        InputError, match=f"^decode_on_device=True: expected false, since Other has a {method} of its own"
    ):
        other(decode_on_device=True)


def test_a_class_with_its_own_geometry_is_not(imagenet_root):
    class Mirrored(ImageNetDataModule):
        def train_geometry(self):
            return [*super().eval_geometry(), lambda image: image.flip(-1)]

    options = {"num_workers": 0, "batch_size": 12, "image_size": 32}
    images, targets = next(iter(Mirrored(str(imagenet_root), decode_on_device=True, **options).train_dataloader()))
    torch.manual_seed(0)
    plain, their_targets = next(iter(module(imagenet_root, augment="none", **options).train_dataloader()))
    for target in range(3):
        ours, theirs = images[targets == target].flip(-1), plain[their_targets == target]
        assert all((image == theirs).flatten(1).all(dim=1).any() for image in ours)


def test_a_device_without_a_decoder_is_refused():
    require_decoder("decode_on_device", torch.device("cpu"))
    with pytest.raises(InputError) as caught:
        require_decoder("decode_on_device", torch.device("meta"))
    message = str(caught.value)
    assert message.startswith("decode_on_device=True: expected false, since this torchvision decodes no JPEG on meta")
    assert "\n" not in message


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_makes_nearly_the_batches_that_a_cpu_makes(tmp_path):
    """The same crops, mirrored alike, of smooth pictures: what differs is rounding and how colours are enlarged."""
    ramp = np.linspace(0, 255, 96)
    for number in range(6):
        channels = [ramp[:, None] + 0 * ramp, 0 * ramp[:, None] + ramp, np.full((96, 96), 40.0 * number)]
        path = tmp_path / "train" / "only" / f"{number}.{'png' if number == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)).save(path, quality=95)
    found = []
    for device in ("cpu", "cuda"):
        data = module(tmp_path, batch_size=6)
        strategy = SimpleNamespace(root_device=torch.device(device), broadcast=lambda seed: 3)
        fit_loop = SimpleNamespace(restarted_mid_epoch=False)
        data.trainer = SimpleNamespace(strategy=strategy, global_rank=0, world_size=1, fit_loop=fit_loop)
        found.append(next(iter(data.train_dataloader())))
    (images, targets), (theirs, their_targets) = found
    assert theirs.is_cuda
    assert their_targets.is_cuda
    assert torch.equal(targets, their_targets.cpu())
    # in levels of 255: a decoder and a resizing that round otherwise
    levels = (images - theirs.cpu()).abs() * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255
    assert levels.mean() < 1.5
    assert levels.max() < 12
