"""Silences messages of libraries that a user can do nothing about."""

import logging
import warnings

from awconv.errors import printable

_ADVERTISEMENT = "Tip:"


def silence_libraries(*, notes: bool = True) -> None:
    """Drops advertisements, deprecations inside libraries, and warnings about what is meant to be so.

    What Lightning notes is also :func:`awconv.errors.printable`.

    The command line does so by itself. A notebook calls it first, before it imports anything else of this project: some
    libraries warn when they are imported.

    Args:
        notes: Keep what Lightning notes of a run: the seed, the devices, the size of the global batch.
    """
    for module in ("pytorch.utilities.rank_zero", "fabric.utilities.rank_zero", "fabric.utilities.seed"):
        # the loggers that say it: importing Lightning sets the level of those above them
        logger = logging.getLogger(f"lightning.{module}")
        logger.addFilter(_is_no_advertisement)
        logger.addFilter(_escape)
        if not notes:
            logger.setLevel(logging.WARNING)
    for message in (
        r".*isinstance\(treespec, LeafSpec\)",
        # another logger may have made the run folder, which is this run's alone
        r"Experiment logs directory .* exists and is not empty",
        # a run that goes on by --resume; any other is refused
        r"Checkpoint directory .* exists and is not empty",
        # which the task refuses where its layers would be sharded
        r"You're using the WeightAveraging callback with a model that overrides",
        # digits live in memory, where worker processes only cost; recipes have as many as a GPU needs
        r".*does not have many workers",
        r"This DataLoader will create \d+ worker processes",
        # tqdm, of a notebook without ipywidgets
        r"IProgress not found",
    ):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)


def _escape(record: logging.LogRecord) -> bool:
    """Escapes what a name in a record, such as that of a metric in a checkpoint, would do to a terminal."""
    try:
        text = record.getMessage()
    except Exception:  # arguments that do not fit the message, which logging reports without ending the run
        return True
    record.msg, record.args = "\n".join(map(printable, text.split("\n"))), ()
    return True


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return _ADVERTISEMENT not in str(record.msg)
