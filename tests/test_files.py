"""Files and messages that people and spreadsheets read: nothing in them acts."""

import csv
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.utilities import rank_zero_info

from awconv.callbacks.metrics_file import MetricsFile
from awconv.callbacks.run_files import RunFiles
from awconv.cli.messages import fail
from awconv.data.pictures import Unreadable
from awconv.errors import InputError, printable
from awconv.files import read_csv, write_csv
from awconv.quiet import silence_libraries

# names of files and classes: any text, undecodable bytes included
NAMES = st.text(st.characters(exclude_categories=["Cs"]) | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF))
STARTS = st.sampled_from(["", "=", "+", "-", "@", "\t", "\r", "\n", "'", "''", "'=", "-1", "+1e5", "\uff1d"])
CELLS = st.builds(str.__add__, STARTS, NAMES)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "a.csv"


@given(st.lists(CELLS, min_size=2, max_size=2), st.lists(st.lists(CELLS, min_size=2, max_size=2), max_size=4))
def test_a_csv_file_is_read_as_it_was_written(path, header, rows):
    write_csv(path, header, rows)
    assert read_csv(path) == (header, rows)
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        for cell in (cell for row in csv.reader(file) for cell in row):
            if cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
                float(cell)


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("\t=1", "'\t=1"),
        ("'quoted", "''quoted"),
        ("-1.5", "-1.5"),
        ("+1e-5", "+1e-5"),
        (-1.5, "-1.5"),
        ("-inf", "-inf"),
        ("+Inf", "+Inf"),
        ("-NaN", "-NaN"),
        ("-infinite", "'-infinite"),
        ("a=b", "a=b"),
        ("", ""),
        ("é汉🦉", "é汉🦉"),
    ],
)
def test_what_a_spreadsheet_takes_for_a_formula_is_text(path, cell, written):
    write_csv(path, ["a", "b"], [[cell, 1]])
    with path.open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], [written, "1"]]
    assert read_csv(path) == (["a", "b"], [[str(cell), "1"]])


def test_an_empty_file_and_names_of_earlier_versions_are_read(path):
    path.write_text("")
    assert read_csv(path) == ([], [])
    path.write_text("a\n'twas\n")
    assert read_csv(path) == (["a"], [["'twas"]])


def test_names_of_metrics_are_no_formulas(tmp_path):
    for number, names in enumerate([["=1+1", "val/loss"], ["@new", "=1+1"]]):
        logger = MetricsFile(tmp_path, name="", version="")
        logger.log_metrics(dict.fromkeys(names, number - 1.5), step=number)
        logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        assert next(csv.reader(file)) == ["step", "'=1+1", "'@new", "val/loss"]
    assert read_csv(tmp_path / "metrics.csv") == (
        ["step", "=1+1", "@new", "val/loss"],
        [["0", "-1.5", "", "-1.5"], ["1", "-0.5", "-0.5", ""]],
    )
    logger = MetricsFile(tmp_path, name="", version="")
    logger.forget_from(1)
    assert read_csv(tmp_path / "metrics.csv")[1] == [["0", "-1.5", "", "-1.5"]]


def test_a_new_column_leaves_infinities_as_they_are(tmp_path):
    logger = MetricsFile(tmp_path, name="", version="")
    for names in (["a"], ["a", "b"]):
        logger.log_metrics(dict.fromkeys(names, float("-inf")), step=len(names))
        logger.save()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,a,b", "1,-inf,", "2,-inf,-inf"]


# ---- what is printed

NAME = "\x1b[31mred\x07\r\n\x9b2J\u202eevil\u2066\udcff\u2028.png"
ESCAPED = r"\x1b[31mred\x07\r\n\x9b2J\u202eevil\u2066\udcff\u2028.png"


@given(st.text())
def test_what_is_printable_stays_as_it_is(text):
    shown = printable(text)
    assert printable(shown) == shown
    assert len(shown.splitlines()) <= 1
    if text.isprintable():
        assert shown == text


def test_what_moves_the_cursor_is_escaped_and_letters_of_all_scripts_are_not():
    assert printable(NAME) == ESCAPED
    # a family and a flag of several characters, and Persian with a zero-width non-joiner
    for name in ("é", "e\u0301", "汉字", "👨‍👩‍👧", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "می‌خواهم", "a\u200fb", r"C:\new"):
        assert printable(name) == name


def test_messages_are_escaped_and_end(capsys):
    assert str(InputError(f"{NAME}: bad")) == f"{ESCAPED}: bad"
    long = str(InputError("start" + "x" * 10**6 + "remedy"))
    assert len(long) < 4100
    assert long.startswith("start")
    assert long.endswith("remedy")
    assert Unreadable.of(NAME, InputError(f"{NAME}: bad")).reason == "bad"
    with pytest.raises(SystemExit):
        fail(f"{NAME}: bad")
    assert capsys.readouterr().err == f"error: {ESCAPED}: bad\n"


def test_notes_are_escaped(caplog):
    silence_libraries()
    caplog.set_level(logging.INFO)
    rank_zero_info("a note\nof \x1b[31mred")
    (record,) = caplog.records
    assert record.getMessage() == "a note\nof \\x1b[31mred"


def test_a_note_whose_arguments_do_not_fit_is_left_to_logging(capsys, monkeypatch):
    silence_libraries()
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler()])
    monkeypatch.setattr(logger, "propagate", False)
    logger.warning("of %d", "words")
    assert "--- Logging error ---" in capsys.readouterr().err


def test_announcements_are_escaped(capsys):
    files = RunFiles()
    files._announcements = [f"1 of 2 images skipped, such as {NAME}: bad"]
    files.teardown(None, None, "predict")
    assert capsys.readouterr().out == f"1 of 2 images skipped, such as {ESCAPED}: bad\n"
