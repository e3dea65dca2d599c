"""Run code in a new Python process that has imported PEFT and transformers, and not this package.

Importing takes seconds and most tests of fresh processes are not about it. One process imports the libraries; each
piece of code runs in a fork of it, which knows nothing of this one and of what ran before.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SERVER = """
import json, os, sys, traceback
import peft, torch
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration
from transformers import Trainer

def run(code, args, folder, output):
    os.chdir(folder)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path, flags = (os.devnull, os.O_RDONLY) if name == "stdin" else (f"{output}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(path, flags), descriptor)
    sys.argv = ["-c", *args]
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return int(error.code or 0)
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
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server():
    """The process that is forked; it ends with this one, which closes its input."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}  # PEFT writes sets in their order
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def run_python(code, *args, cwd=ROOT):
    """Run code with arguments as `python -c` does.

    Returns:
        `subprocess.CompletedProcess`: Exit status and what was printed, as `subprocess.run` gives them.
    """
    with tempfile.TemporaryDirectory() as output:
        request = [textwrap.dedent(code), list(map(str, args)), str(cwd), output]
        server().stdin.write(json.dumps(request) + "\n")
        server().stdin.flush()
        status = int(server().stdout.readline())
        stdout, stderr = ((Path(output) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(request, status, stdout, stderr)
