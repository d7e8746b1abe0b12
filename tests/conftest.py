"""Toy models gain nothing from a second thread and lose a lot on a busy machine: one each, children too."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
