"""The queue in Redis: a stream of jobs, whose consumer group knows which worker has which job."""

from redis import Redis, exceptions
from redis.backoff import ConstantBackoff
from redis.retry import Retry

JOBS, WORKERS, KNOWN, RESULTS = "jobs", "workers", "known", "results"
RETRY = Retry(ConstantBackoff(0.5), retries=120)
"""Calls wait up to a minute while Redis restarts."""

ADD = """
if redis.call('SADD', KEYS[1], ARGV[1]) == 1 then redis.call('XADD', KEYS[2], '*', 'name', ARGV[1], 'text', ARGV[2]) end
"""
FINISH = """
if redis.call('XACK', KEYS[1], ARGV[1], ARGV[2]) == 1 then
    redis.call('XDEL', KEYS[1], ARGV[2])
    redis.call('RPUSH', KEYS[2], ARGV[3])
end
"""


def connect() -> Redis:
    """Connect, and create the group of workers if it does not exist."""
    redis = Redis(
        host="redis",
        retry=RETRY,
        retry_on_error=[OSError, exceptions.ConnectionError, exceptions.TimeoutError],
        socket_timeout=10,
        decode_responses=True,
    )
    try:
        redis.xgroup_create(JOBS, WORKERS, id="0", mkstream=True)
    except exceptions.ResponseError as error:
        if "BUSYGROUP" not in str(error):
            raise
    return redis


def add(redis: Redis, name: str, text: str) -> None:
    """Add a job once.  A client that got no answer may repeat its request."""
    redis.eval(ADD, 2, KNOWN, JOBS, name, text)


def finish(redis: Redis, id: str, result: str) -> None:
    """Record a result and remove the job, unless another worker has done so."""
    redis.eval(FINISH, 2, JOBS, RESULTS, WORKERS, id, result)
