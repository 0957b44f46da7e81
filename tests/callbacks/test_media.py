"""What `publish` leaves in the run's folder and hands to Weights & Biases."""

from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from awconv.callbacks.canvas import new_sheet
from awconv.callbacks.media import publish


def trainer(folder, **options):
    state = {"is_global_zero": True, "sanity_checking": False, "fast_dev_run": False, "loggers": []}
    return SimpleNamespace(log_dir=None, default_root_dir=folder, current_epoch=2, global_step=7, **state | options)


def red():
    figure = Figure(figsize=(2, 1), facecolor="red")
    return figure


def test_a_figure_becomes_a_picture_in_the_place_of_the_one_before(tmp_path):
    publish(trainer(tmp_path), {"val/some figure": lambda: Figure(figsize=(1, 1), facecolor="blue")})
    publish(trainer(tmp_path), {"val/some figure": red})
    (path,) = (tmp_path / "media").iterdir()
    assert path.name == "val_some figure.png"
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (120, 240, 3)
    assert (pixels == [255, 0, 0]).all()


@pytest.mark.parametrize("state", [{"is_global_zero": False}, {"sanity_checking": True}, {"fast_dev_run": True}])
def test_when_nothing_is_drawn(tmp_path, state):
    publish(trainer(tmp_path, **state), {"a": pytest.fail})
    assert not list(tmp_path.iterdir())


def test_objects_of_wandb_are_not_made_without_it(tmp_path):
    publish(trainer(tmp_path), {}, {"table": pytest.fail})


def test_a_figure_that_fails_leaves_nothing_half_written(tmp_path, monkeypatch):
    monkeypatch.setattr("awconv.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(OSError, match="No space"):
        publish(trainer(tmp_path), {"a": red})
    assert not list((tmp_path / "media").iterdir())


def test_notebooks_show_a_sheet_as_a_picture_without_pyplot():
    figure, _ = new_sheet(2, 1)
    picture = Image.open(BytesIO(figure._repr_png_()))
    assert picture.format == "PNG"
    assert picture.size == (240, 120)
