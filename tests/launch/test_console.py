"""What launchers say where nobody can hear it."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from rampart.launch.console import say
say("one")
say("two")
print("served on", file=sys.stderr)
"""


def test_a_full_disk_or_a_pipe_that_nobody_reads_ends_no_launcher() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", CODE], stdout=full, stderr=subprocess.PIPE)
    assert done.stderr.startswith(b"served on")
    code = CODE.replace('say("one")', "sys.stdin.read(); say('one')")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stdin and process.stderr
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b"served on\n" and process.wait() == 0
    process.stderr.close()
