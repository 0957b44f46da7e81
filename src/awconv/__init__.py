"""AW-convolution (attention on the weights) and a PyTorch Lightning research template around it."""

import logging
from contextlib import suppress

# here, because it must come before matplotlib, which torchmetrics imports: where the home folder cannot be written
# it uses a temporary folder, which serves as well
logging.getLogger("matplotlib").addFilter(
    lambda record: not str(record.msg).startswith(("mkdir -p failed for path", "Matplotlib created a temporary cache"))
)

# For every parser of this process: a class_path in an argument that takes anything stays data, whoever wrote it.
# Giving the lists, empty as they are, makes jsonargparse refuse what is on its list of dangerous imports (os, pickle).
with suppress(ModuleNotFoundError):  # layers do without it
    import jsonargparse
    from jsonargparse import _typehints

    jsonargparse.set_parsing_settings(
        instantiate_subclass_spec_in_any=False, import_path_denylist=[], import_path_allowlist=[]
    )
    # when it parses, it imports the class, and what the arguments of that class name
    if not hasattr(_typehints, "adapt_classes_any"):
        raise ImportError(
            f"awconv does not know jsonargparse {jsonargparse.__version__}; install what it is tested with"
        )
    _typehints.adapt_classes_any = lambda value, *_, **__: value
