"""`python train.py` and `python -m qat` as forks of one process that has imported everything: that takes seconds.

`run` does what `subprocess.run` does: a process of its own with its own directory, environment, output and exit code.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


@cache
def server() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one, as its input does."""
    return subprocess.Popen([sys.executable, __file__], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


def run(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `argv` ("train.py" or "qat", then arguments) with one thread; killed after `timeout` seconds."""
    to, answers = server().stdin, server().stdout
    assert to is not None
    assert answers is not None
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"{folder}/out", f"{folder}/err"]
        request = {"argv": list(argv), "cwd": str(cwd), "env": dict(env), "outputs": outputs}
        to.write(json.dumps(request) + "\n")
        to.flush()
        child = int(answers.readline())
        watch = threading.Timer(timeout, os.kill, (child, signal.SIGKILL))
        watch.start()
        code = int(answers.readline())
        watch.cancel()
        return subprocess.CompletedProcess(argv, code, *(Path(path).read_text() for path in outputs))


def serve() -> None:
    """Fork for each line of the input, and answer with the child's process id, then with its exit code."""
    sys.path.insert(0, str(ROOT))
    import lightning.pytorch.loggers  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401
    import rich.console  # noqa: F401
    import sklearn.datasets  # noqa: F401

    import qat.__main__
    import train

    train.main.__wrapped__.__module__ = "__main__"  # type: ignore[attr-defined]  # Hydra looks for conf beside it
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            become(request["cwd"], request["env"], request["outputs"])
            program, *arguments = sys.argv = request["argv"]
            if program == "qat":
                sys.exit(qat.__main__.main(arguments))
            sys.argv[0] = str(ROOT / program)
            train.main()
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def become(cwd: str, env: Mapping[str, str], outputs: Sequence[str]) -> None:
    """Take directory, environment, and files in place of input and output."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= env
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for number, path in enumerate((os.devnull, *outputs)):
        with contextlib.closing(open(path, "r" if number == 0 else "w")) as file:
            os.dup2(file.fileno(), number)
    # of all that C's exit would run, first the end: ONNX Runtime's handlers wait for threads that no fork has
    libc = ctypes.CDLL(None)
    libc.on_exit(libc._exit, None)


if __name__ == "__main__":
    serve()
