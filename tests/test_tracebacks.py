"""A failure without a line is reported as any other."""

import sys
from types import TracebackType
from typing import Any

import pytest

from tests.support.harness.tracebacks import ShownTracebacks, related, with_lines


class Lock:
    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *_: object) -> None: ...


async def holding() -> None:
    async with Lock():
        pass


def without_line() -> TracebackType:
    """An entry of ``holding`` at an instruction that belongs to no line of the source."""
    running: Any = holding()  # its type has no frame
    frame = running.cr_frame
    running.close()
    nowhere = next(first for first, _, line in frame.f_code.co_lines() if line is None)
    return TracebackType(None, frame, nowhere, -1)


def test_an_entry_without_a_line_has_the_first_of_its_function() -> None:
    entry = without_line()
    assert entry.tb_lineno in (None, -1), "by the version of Python"
    shown = with_lines(TracebackType(entry, entry.tb_frame, 0, 7))
    assert shown is not None
    assert shown.tb_next is not None
    assert (shown.tb_lineno, shown.tb_next.tb_lineno) == (7, holding.__code__.co_firstlineno)


def test_a_traceback_may_be_as_deep_as_it_likes() -> None:
    deep = without_line()
    for _ in range(2 * sys.getrecursionlimit()):
        deep = TracebackType(deep, deep.tb_frame, 0, 7)
    assert with_lines(deep) is not None


def test_causes_contexts_and_members_of_groups_are_related() -> None:
    cause, context, member = ValueError(), KeyError(), TypeError()
    group = ExceptionGroup("", [member])
    group.__cause__, group.__context__ = cause, context
    context.__context__ = group
    assert set(related(group)) == {group, cause, context, member}


def test_pytest_shows_what_it_could_not() -> None:
    def fail() -> None:
        raise ValueError("out of time")

    call = pytest.CallInfo.from_call(fail, "call")
    assert call.excinfo is not None
    call.excinfo = pytest.ExceptionInfo.from_exception(call.excinfo.value.with_traceback(without_line()))
    if without_line().tb_lineno is None:
        with pytest.raises(TypeError):
            call.excinfo.getrepr()
    next(ShownTracebacks().pytest_runtest_makereport(call))
    assert "out of time" in str(call.excinfo.getrepr())
