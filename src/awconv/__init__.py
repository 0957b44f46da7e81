"""AW-convolution (attention on the weights) and a PyTorch Lightning research template around it."""

import logging

# here, because it must come before matplotlib, which torchmetrics imports: where the home folder cannot be written
# it uses a temporary folder, which serves as well
logging.getLogger("matplotlib").addFilter(
    lambda record: not str(record.msg).startswith(("mkdir -p failed for path", "Matplotlib created a temporary cache"))
)
