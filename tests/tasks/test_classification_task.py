"""What ClassificationTask measures, against numpy and scikit-learn."""

import lightning as L
import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from awconv.tasks import ClassificationTask


class Echo(ClassificationTask):
    """A "network" whose logits are the images themselves."""

    def build_network(self) -> nn.Module:
        return nn.Flatten()

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False  # there is nothing to optimise

    def configure_optimizers(self):
        return None


def quiet(tmp_path) -> L.Trainer:
    return L.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


@pytest.mark.parametrize("classes", [2, 4, 7])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("padding", [0, 3])
def test_metrics_count_every_picture_once(tmp_path, classes, batch_size, padding):
    generator = np.random.default_rng(classes)
    logits = generator.normal(size=(23, classes)).astype(np.float32)
    targets = generator.integers(classes, size=23)
    images = np.concatenate([logits, generator.normal(size=(padding, classes)).astype(np.float32)])
    padded = np.concatenate([targets, np.full(padding, -100)])
    data = TensorDataset(torch.tensor(images)[:, :, None, None], torch.tensor(padded))

    task = Echo("echo", num_classes=classes)
    loader = DataLoader(data, batch_size)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for split, run in (("val", quiet(tmp_path).validate), ("test", quiet(tmp_path).test)):
        (measured,) = run(task, loader, verbose=False)
        assert set(measured) == {f"{split}/{name}" for name in ("loss", "acc1", "acc5")}
        assert measured[f"{split}/acc1"] == pytest.approx((logits.argmax(1) == targets).mean())
        # where there are at most five classes, all are among the first five
        top5 = top_k_accuracy_score(targets, logits, k=5, labels=range(classes)) if classes > 5 else 1.0
        assert measured[f"{split}/acc5"] == pytest.approx(top5)
        assert measured[f"{split}/loss"] == pytest.approx(-log_probabilities[range(23), targets].mean(), rel=1e-5)
    expected = confusion_matrix(targets, logits.argmax(1), labels=range(classes))
    np.testing.assert_array_equal(task.test_confusion.compute().numpy(), expected)

    quiet(tmp_path).test(task, loader, verbose=False)  # a second test must not add to the first
    assert task.test_confusion.compute().sum() == 23


def test_predictions_are_probabilities(tmp_path):
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 5.0]])
    batches = [(logits[:, :, None, None], ["a.png", "b.png"])]
    task = Echo("echo", num_classes=3, class_names=["x", "y", "z"])
    (prediction,) = quiet(tmp_path).predict(task, DataLoader(batches, batch_size=None))
    assert prediction["path"] == ["a.png", "b.png"]
    exponentials = np.exp(logits.numpy())
    np.testing.assert_allclose(
        prediction["probabilities"], exponentials / exponentials.sum(1, keepdims=True), rtol=1e-6
    )


def test_training_loss_with_smoothing_and_soft_targets(tmp_path):
    logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.1, 1.0]])
    log_probabilities = logits.double().log_softmax(1).numpy()
    mixed = np.array([[0.25, 0.75, 0.0], [0.0, 0.5, 0.5]], dtype=np.float32)
    for targets, rows in ((torch.tensor([0, 2]), np.eye(3)[[0, 2]]), (torch.tensor(mixed), mixed)):
        task = Echo("echo", num_classes=3, label_smoothing=0.3)
        trainer = quiet(tmp_path)
        trainer.fit_loop.max_epochs = 1
        trainer.fit(task, DataLoader(TensorDataset(logits[:, :, None, None], targets), batch_size=2))
        smoothed = 0.7 * rows + 0.3 / 3
        expected = -(smoothed * log_probabilities).sum(1).mean()
        assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)


def test_class_names_default_to_numbers():
    assert Echo("echo", num_classes=3).class_names == ["0", "1", "2"]
