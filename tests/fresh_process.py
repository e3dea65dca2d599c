"""Run code in a new Python process that has imported PEFT and transformers, and not this package.

Importing takes seconds and most tests of fresh processes are not about it. One process imports the libraries; each
piece of code runs in a fork of it, which knows nothing of this one and of what ran before.
"""

import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240  # seconds; then the process prints where it hangs, and is killed
SERVER = """
import faulthandler, json, os, signal, sys, traceback
import peft, torch
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration
from transformers import Trainer

def run(code, args, folder, output):
    os.setsid()
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job, and so in its children
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path, flags = (os.devnull, os.O_RDONLY) if name == "stdin" else (f"{output}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(path, flags), descriptor)
    faulthandler.register(signal.SIGUSR1)
    sys.argv = ["-c", *args]
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return 1 if isinstance(error.code, str) else error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    child = os.fork()
    if not child:
        status = 1
        try:
            status = run(*json.loads(line))
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server():
    """The process that is forked; it ends with this one, which closes its input."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}  # PEFT writes sets in their order
    env["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others have threads, and a fork may inherit a lock of theirs
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


class Process:
    """A forked process, the leader of its session; one runs at a time."""

    def __init__(self, code, *args, cwd=ROOT):
        self.output = tempfile.TemporaryDirectory()
        self.request = [textwrap.dedent(code), list(map(str, args)), str(cwd), self.output.name]
        server().stdin.write(json.dumps(self.request) + "\n")
        server().stdin.flush()
        self.pid = int(server().stdout.readline())

    def is_running(self):
        return not select.select([server().stdout], [], [], 0)[0]

    def wait(self):
        """The exit status and what was printed, as `subprocess.run` gives them."""
        if not select.select([server().stdout], [], [], PATIENCE)[0]:
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(1)
            os.killpg(self.pid, signal.SIGKILL)
        status = int(server().stdout.readline())
        with self.output as folder:
            stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(self.request, status, stdout, stderr)


# `python SCRIPT ARGUMENTS`
SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_python(code, *args, cwd=ROOT):
    """What `python -c CODE ARGUMENTS` gives."""
    return Process(code, *args, cwd=cwd).wait()


def run_script(path, *args, cwd=ROOT):
    """What `python PATH ARGUMENTS` gives."""
    return run_python(SCRIPT, path, *args, cwd=cwd)


def start_script(path, *args, cwd=ROOT):
    """Start `python PATH ARGUMENTS` and return at once."""
    return Process(SCRIPT, path, *args, cwd=cwd)
