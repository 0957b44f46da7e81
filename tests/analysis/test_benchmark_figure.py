"""The picture of a record of the layers: what its bars say."""

import io
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from PIL import Image

from awconv.analysis import benchmark
from awconv.analysis.benchmark_figure import draw_layers

RECORDS = sorted((Path(__file__).parents[2] / "benchmarks").glob("layers*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_bar_is_a_ratio_of_the_record(path, monkeypatch):
    said = []
    label = Axes.bar_label

    def note(axes, bars, labels, **options):
        said.append((bars.get_label(), axes.get_subplotspec().colspan.start, list(labels)))
        for bar, text in zip(bars, labels, strict=True):
            assert bar.get_x() + bar.get_width() == pytest.approx(float(text), abs=0.06)
        return label(axes, bars, labels, **options)

    monkeypatch.setattr(Axes, "bar_label", note)
    record = json.loads(path.read_text())
    Image.open(io.BytesIO(draw_layers(record))).verify()
    rows = [row for row in record["rows"] if row["pass"] == "forward+backward"]
    for name in {row["contender"] for row in rows} - {"Conv2d"}:
        for column, key in ((0, "median_ms"), (1, "peak_memory")):
            (labels,) = (labels for bar, place, labels in said if (bar, place) == (name, column))
            plain = {row["channels"]: row[key] for row in rows if row["contender"] == "Conv2d"}
            expected = [row[key] / plain[row["channels"]] for row in rows if row["contender"] == name]
            assert [float(text) for text in labels] == pytest.approx(expected, abs=0.051)


def test_what_was_not_reached_is_not_drawn(monkeypatch):
    record = json.loads(RECORDS[0].read_text())
    first, *_ = (
        row for row in record["rows"] if row["pass"] == "forward+backward" and row["contender"] == "CondConv2d"
    )
    first["ratio"] = None
    drawn = {}
    label = Axes.bar_label

    def note(axes, bars, labels, **options):
        drawn.setdefault(bars.get_label(), []).append(len(labels))
        return label(axes, bars, labels, **options)

    monkeypatch.setattr(Axes, "bar_label", note)
    Image.open(io.BytesIO(draw_layers(record))).verify()
    assert drawn["CondConv2d"] == [3, 3]
    assert drawn["AWConv2d auto"] == [4, 4]


def test_the_command_writes_a_new_picture(tmp_path):
    picture = tmp_path / "layers.png"
    benchmark.main(["draw", str(RECORDS[0]), "--out", str(picture)])
    with Image.open(picture) as image:
        assert image.width > 800


@pytest.mark.parametrize(
    "content",
    [
        {"benchmark": "network", "rows": []},
        {"benchmark": "layers"},
        {"benchmark": "layers", "rows": []},
        {"benchmark": "layers", "rows": [{"pass": "forward+backward", "contender": "CondConv2d"}]},
        [],
    ],
)
def test_other_records_are_refused(tmp_path, capsys, content):
    other = tmp_path / "network.json"
    other.write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        benchmark.main(["draw", str(other), "--out", str(tmp_path / "layers.png")])
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "layers.png").exists()
