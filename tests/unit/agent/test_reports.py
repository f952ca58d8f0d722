"""Statuses on their way to a manager."""

import asyncio

import pytest

from skep.agent.session.reports import BATCH_MAX, Reports
from skep.model.task import TaskState, TaskStatus
from skep.model.values.ids import TaskId

T1, T2 = TaskId("t1"), TaskId("t2")
READY, RUNNING = TaskStatus(state=TaskState.READY), TaskStatus(state=TaskState.RUNNING)


async def test_of_each_task_only_the_latest_is_sent():
    reports = Reports()
    reports.report(T1, READY)
    reports.report(T2, READY)
    reports.report(T1, RUNNING)
    assert await reports.take() == {T2: READY, T1: RUNNING}


async def test_taking_waits_for_something_to_report():
    reports = Reports()
    taking = asyncio.ensure_future(reports.take())
    await asyncio.sleep(0)
    assert not taking.done()
    reports.report(T1, READY)
    assert await taking == {T1: READY}


async def test_what_was_not_delivered_is_sent_again_unless_there_is_newer():
    reports = Reports()
    reports.report(T1, READY)
    reports.report(T2, READY)
    batch = await reports.take()
    reports.report(T1, RUNNING)
    reports.put_back(batch)
    assert await reports.take() == {T1: RUNNING, T2: READY}


async def test_a_new_session_repeats_everything_but_what_is_outdated():
    reports = Reports()
    reports.report(T1, RUNNING)
    reports.report_again({T1: READY, T2: READY})
    assert await reports.take() == {T1: RUNNING, T2: READY}


async def test_many_statuses_go_in_several_calls():
    reports = Reports()
    for number in range(BATCH_MAX + 1):
        reports.report(TaskId(f"t{number}"), READY)
    assert len(await reports.take()) == BATCH_MAX
    assert await reports.take() == {f"t{BATCH_MAX}": READY}


async def test_a_removed_task_is_not_reported_any_more():
    reports = Reports()
    reports.report(T1, READY)
    reports.forget(T1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reports.take(), 0.01)
