"""libnftables in many threads at once, where it once took a whole process with it."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from skep.dataplane.netns.kernel import nft
from skep.linux.syscalls import CLONE_NEWNET, unshare

_THREADS, _ROUNDS = 8, 60

_TABLE = """\
table inet t
delete table inet t
table inet t {
  chain input { type filter hook input priority 0; iif "lo" accept; tcp dport { 80, 443 } accept; }
}
"""


@pytest.mark.slow
def test_threads_that_list_rules_with_interfaces_do_no_harm_to_each_other() -> None:
    # In a process of its own: what went wrong was no exception.
    ended = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split() == ["listed"] * _THREADS


def _list_and_change() -> str:
    unshare(CLONE_NEWNET)
    for _ in range(_ROUNDS):
        nft.run(_TABLE)
        assert 'iif "lo" accept' in nft.run("list ruleset")
    return "listed"


if __name__ == "__main__":
    with ThreadPoolExecutor(_THREADS) as threads:
        print(*(asked.result() for asked in [threads.submit(_list_and_change) for _ in range(_THREADS)]))
