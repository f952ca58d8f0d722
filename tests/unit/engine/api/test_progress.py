"""Messages for a client that is slower than the work: which of them it gets."""

from skep.engine.api.streams.progress import PendingMessages
from skep.engine.images.progress import ProgressMessage


async def taken(pending: PendingMessages) -> list[ProgressMessage]:
    pending.end()
    found = []
    while (message := await pending.next()) is not None:
        found.append(message)
    return found


async def test_a_result_is_kept_behind_many_lines() -> None:
    pending = PendingMessages()
    for number in range(2000):
        pending.report(ProgressMessage(stream=f"{number}\n"))
    pending.report(ProgressMessage(status="dropped"))
    pending.report(ProgressMessage(aux={"ID": "sha256:built"}))
    found = await taken(pending)
    assert found[-1].aux == {"ID": "sha256:built"}
    assert len(found) == 2001


async def test_the_end_of_clipped_output_is_kept_after_a_note() -> None:
    pending = PendingMessages()
    for _ in range(400):
        pending.report(ProgressMessage(stream="x" * (1 << 16)))
    pending.report(ProgressMessage(aux={"ID": "sha256:built"}))
    pending.report(ProgressMessage(stream="Successfully built 0123456789ab\n"))
    found = await taken(pending)
    texts = [message.stream for message in found if message.stream]
    assert texts[-1] == "Successfully built 0123456789ab\n"
    assert sum("output clipped" in text for text in texts) == 1
    assert any(message.aux for message in found)
