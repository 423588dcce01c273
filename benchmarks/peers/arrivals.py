"""Clients that send whether or not answers come (open loop), so that a queue shows as latency.

    BODIES=folder KIND=image/png WHERE=/predictions/m locust -f arrivals.py --users 200 ...

Each user asks once a second, from a moment of its own: as many arrivals a second as users.
"""

import itertools
import os
import random
import time
from pathlib import Path

import gevent
from locust import FastHttpUser, task

KIND, WHERE = os.environ["KIND"], os.environ["WHERE"]
BODIES = itertools.cycle([file.read_bytes() for file in Path(os.environ["BODIES"]).iterdir()])


class Client(FastHttpUser):
    """One of many who ask once a second."""

    def on_start(self) -> None:
        """Begin anywhere within the first second: locust's own pacing would gather all in it."""
        self.due = time.monotonic() + random.random()
        gevent.sleep(self.wait_time())

    def wait_time(self) -> float:
        """Seconds until the next moment to ask; none where an answer took longer than that."""
        return max(0.0, self.due - time.monotonic())

    @task
    def ask(self) -> None:
        """Send the next picture."""
        self.due += 1
        self.client.post(WHERE, data=next(BODIES), headers={"Content-Type": KIND})
