"""How commands start: on one thread, and with Keras imported without the log lines of TensorFlow.

While TensorFlow is imported, and when it first looks for devices, its C++ code writes some lines to
stderr before any log level counts: that oneDNN is on, that there is no CUDA. In the output of a
command they hide what matters. Set TF_CPP_MIN_LOG_LEVEL=0 to see all of them.
"""

import contextlib
import glob
import os
import re
import sys
import tempfile
from collections.abc import Iterator

__all__ = ["import_keras", "is_usual_log_line", "use_one_thread"]

# Lines of information and warnings (I, W) in both formats of TensorFlow's logs; what goes with
# them; and that no driver of CUDA is there, which is logged as an error.
_LOG_LINE = re.compile(
    rb"[IW]\d{4} [\d:.]+ +\d+ \S+\.(cc|h):\d+\]"
    rb"|\d{4}-\d\d-\d\d [\d:.]+: [IW] "
    rb"|WARNING: All log messages before absl::InitializeLog\(\) is called"
    rb"|To enable the following instructions: .* rebuild TensorFlow"
    rb"|.*failed call to cuInit"
)
# Where there is an NVIDIA device, whoever expects it to be used needs to see what prevents that.
_OF_DEVICES = re.compile(rb"cuda|cuInit|cuDNN|GPU", re.IGNORECASE)


def is_usual_log_line(line: bytes, nvidia: bool = False) -> bool:
    """Whether TensorFlow logs a line of stderr at any start, on a machine with or without NVIDIA
    devices.
    """
    if nvidia and _OF_DEVICES.search(line):
        return False
    return _LOG_LINE.match(line) is not None


def use_one_thread() -> None:
    """Has the linear algebra of NumPy and SciPy run on one thread, if neither is imported yet.

    Accounting adds up vectors. Threads do not speed that up, and only wait for it to end, busily:
    they took two fifths of a command's CPU time. The backends have threads of their own.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def import_keras() -> None:
    """Imports Keras with its backend, for a command: log lines of a usual start are dropped.

    Everything else that is written to stderr meanwhile is written when the import is over, or has
    failed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    shown = os.environ["TF_CPP_MIN_LOG_LEVEL"] in ("0", "1")
    with contextlib.nullcontext() if shown else _without_log_lines():
        import keras

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.config.list_physical_devices()


@contextlib.contextmanager
def _without_log_lines() -> Iterator[None]:
    """Keeps what is written to file descriptor 2, also by C++, and forwards all but such lines.

    A file rather than a pipe: nobody has to read it while C++ code writes.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    with open(stderr, "wb", buffering=0) as stream, tempfile.TemporaryFile() as kept:
        if sys.stderr is not None:
            sys.stderr.flush()
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)
            kept.seek(0)
            nvidia = bool(glob.glob("/dev/nvidia*"))
            stream.writelines(line for line in kept if not is_usual_log_line(line, nvidia))
