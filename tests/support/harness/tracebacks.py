"""Tracebacks that pytest can show."""

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Any

import pytest


class ShownTracebacks:
    """Sets a line for each entry of a failure's traceback.

    A time limit can raise at any instruction, including one without a line. pytest computes with the line
    (``_pytest/_code/code.py``, ``TracebackEntry.lineno``), so the whole run would end with an internal error.
    """

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, call: pytest.CallInfo[Any]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        if call.excinfo is not None:
            for error in related(call.excinfo.value):
                error.__traceback__ = with_lines(error.__traceback__)
            call.excinfo = pytest.ExceptionInfo.from_exception(call.excinfo.value)
        return (yield)


def with_lines(traceback: TracebackType | None) -> TracebackType | None:
    """Return the same traceback, with the function's first line for entries without a line."""
    entries: list[TracebackType] = []
    while traceback is not None:  # a recursion that is too deep has a thousand entries
        entries.append(traceback)
        traceback = traceback.tb_next
    for entry in reversed(entries):
        line = entry.tb_lineno
        if line is None or line < 0:  # -1 in Python before 3.11.4
            line = entry.tb_frame.f_code.co_firstlineno
        traceback = TracebackType(traceback, entry.tb_frame, entry.tb_lasti, line)
    return traceback


def related(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error``, its causes and contexts, and the members of groups, each once."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
            waiting += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
