"""Takes jobs one by one, and those of workers that were lost.  On SIGTERM it completes its job and ends."""

import hashlib
import signal
import socket
import time

import jobs

LOST_AFTER_MS = 10_000
"""A job without a result for so long goes to another worker.  Longer than any job takes."""

stopping = False


def stop(*_: object) -> None:
    global stopping
    stopping = True


def work(text: str) -> str:
    """Do the job, which takes a while."""
    time.sleep(0.2)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


signal.signal(signal.SIGTERM, stop)
redis = jobs.connect()
me = socket.gethostname()
while not stopping:
    lost = redis.xautoclaim(jobs.JOBS, jobs.WORKERS, me, LOST_AFTER_MS, count=1)[1]
    new = lost or [
        job
        for _, found in redis.xreadgroup(jobs.WORKERS, me, {jobs.JOBS: ">"}, count=1, block=1000)
        for job in found
    ]
    for id, job in new:
        print("starts", job["name"], flush=True)
        jobs.finish(redis, id, f"{job['name']} {work(job['text'])}")
