"""Why a task ended: what is kept of it, and what is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from skep.errors import InvalidArgument
from skep.model.options.labels import check_service_labels, check_swarm_labels, last_lines
from skep.model.task_end import (
    HEALTH_OUTPUT_BYTES_MAX,
    LAST_LINES_BYTES_MAX,
    LAST_LINES_MAX,
    KeptLine,
    TaskEnd,
    bounded_end,
    on_one_line,
    printable,
    words_of,
)
from skep.model.values.encoding import to_json

TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.sampled_from(["\0" * 3000, "x" * 9000])
)
LINES = st.lists(st.builds(KeptLine, text=TEXTS), max_size=40).map(tuple)


@given(LINES, TEXTS, st.integers(0, 30))
def test_whatever_is_reported_has_room_in_the_store(
    lines: tuple[KeptLine, ...], text: str, most: int
) -> None:
    kept = bounded_end(TaskEnd(cause=text, signal=text, health_output=text, lines=lines), most)
    assert len(kept.lines) <= min(most, LAST_LINES_MAX)
    assert sum(len(to_json(line.text)) for line in kept.lines) <= LAST_LINES_BYTES_MAX + 2 * LAST_LINES_MAX
    assert len(to_json(kept.health_output)) <= HEALTH_OUTPUT_BYTES_MAX
    assert bounded_end(kept, most) == kept
    # The last ones, in their order; the first of them may be cut.
    assert kept.lines[1:] == lines[len(lines) - len(kept.lines) + 1 :] or not kept.lines


def test_the_last_lines_are_kept() -> None:
    lines = tuple(KeptLine(text=f"line {n}") for n in range(100))
    assert bounded_end(TaskEnd(lines=lines)).lines == lines[-20:]
    assert bounded_end(TaskEnd(lines=lines), 3).lines == lines[-3:]
    assert bounded_end(TaskEnd(lines=lines), 0).lines == ()


def test_dockers_error_gets_words_for_what_docker_does_not_say() -> None:
    assert words_of(TaskEnd(cause="out-of-memory")) == "out of memory"
    stopped = TaskEnd(cause="stop-timeout", signal="SIGKILL", grace=1_500_000_000)
    assert words_of(stopped) == "killed: it did not end within 1.5 s of its stop signal"
    sick = TaskEnd(cause="unhealthy", health_output="curl: (7)\n\x1b[31mrefused\n")
    assert words_of(sick) == "last health check: curl: (7) refused"
    assert words_of(replace(sick, health_output=" ")) == ""
    assert words_of(TaskEnd(cause="of a later version")) == ""


def test_no_terminal_obeys_what_a_container_printed() -> None:
    assert printable("a\tb\x1b]0;title\x07\r\u202e\ufffd") == "a b]0;title\ufffd"
    assert len(on_one_line("x" * 5000)) == 200


@pytest.mark.parametrize("text", ["", "-1", "21", "all", "1e1", "٣"])
def test_a_number_of_lines_that_cannot_be_is_refused_and_keeps_none(text: str) -> None:
    labels = {"skep.last-lines": text}
    for check in (check_service_labels, check_swarm_labels):
        with pytest.raises(InvalidArgument, match=r"invalid label skep\.last-lines"):
            check(labels)
    assert last_lines(labels) == 0
    assert last_lines({}) == LAST_LINES_MAX
