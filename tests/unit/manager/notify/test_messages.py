"""The texts of messages, and the requests that carry them."""

import hashlib
import hmac

import msgspec
import pytest

from skep.errors import InvalidArgument
from skep.manager.notify.addresses import TargetAddress, TargetKind, check_secret, parsed_address
from skep.manager.notify.mail import mail_of
from skep.manager.notify.messages import Message
from skep.manager.notify.records import Incident, Notice
from skep.manager.notify.sending import request_of
from skep.model.options.notifications import Topic
from skep.model.values.times import SECOND_NS

NOW_NS = 1_800_000_000 * SECOND_NS


def a_notice(message: str, status: str = "began", seconds: int = 0) -> Notice:
    incident = Incident(
        id="node/n1@1800000000",
        key="node/n1",
        topic=Topic.NODE,
        message=message,
        began_ns=NOW_NS,
        reminded_ns=NOW_NS,
        subject="n1",
    )
    return Notice(status=status, incident=incident, at_ns=NOW_NS + seconds * SECOND_NS)


def a_message(*notices: Notice, missed: int = 0, is_test: bool = False) -> Message:
    return Message(
        id="t1-7",
        cluster="default",
        cluster_id="c1",
        at_ns=NOW_NS,
        notices=notices,
        missed=missed,
        is_test=is_test,
    )


DOWN = a_notice("node n1 is down: no heartbeat")


def test_one_notice_is_the_whole_message() -> None:
    assert a_message(DOWN).text == "[default] Problem: node n1 is down: no heartbeat"
    ended = a_notice("node n1 is down", "ended", 190)
    assert a_message(ended).text == "[default] Resolved (after 3 min): node n1 is down"
    lasts = a_notice("node n1 is down", "reminder", 2 * 86_400)
    assert a_message(lasts).text == "[default] Still a problem (for 2 d): node n1 is down"


def test_several_notices_are_counted_and_listed() -> None:
    text = a_message(DOWN, a_notice("service web is degraded"), a_notice("disk", "ended", 5), missed=3).text
    assert text.splitlines() == [
        "[default] 2 problems, 1 resolved",
        "Problem: node n1 is down: no heartbeat",
        "Problem: service web is degraded",
        "Resolved (after 5 s): disk",
        "3 earlier notices could not be delivered: see skep history",
    ]


def test_a_webhook_is_json_whose_signature_has_its_time() -> None:
    address = parsed_address("https://hooks.example.org/skep?key=1")
    method, url, body, headers = request_of(address, "hush", a_message(DOWN), 1_800_000_001)
    assert (method, url) == ("POST", "https://hooks.example.org/skep?key=1")
    sent = msgspec.json.decode(body)
    assert (sent["ID"], sent["Cluster"], sent["Test"]) == ("t1-7", {"ID": "c1", "Name": "default"}, False)
    assert sent["Notices"][0]["Status"] == "began"
    assert sent["Notices"][0]["Incident"] == "node/n1@1800000000"
    digest = hmac.new(b"hush", b"1800000001." + body, hashlib.sha256).hexdigest()
    assert headers["Skep-Signature"] == f"t=1800000001,v1={digest}"
    assert headers["Skep-Notification-Id"] == "t1-7"
    assert "Skep-Signature" not in request_of(address, "", a_message(DOWN), 1)[3]


def test_slack_gets_text_in_which_a_container_cannot_mention_everyone() -> None:
    address = parsed_address("slack+https://hooks.slack.com/services/T1/B1/secret")
    _, url, body, _ = request_of(address, "", a_message(a_notice("exit 1: <!channel> & more")), 1)
    assert url == "https://hooks.slack.com/services/T1/B1/secret"
    assert msgspec.json.decode(body) == {"text": "[default] Problem: exit 1: &lt;!channel&gt; &amp; more"}


def test_matrix_gets_a_notice_whose_transaction_is_the_messages_id() -> None:
    address = parsed_address("matrix+https://matrix.example.org/!abc:example.org")
    method, url, body, headers = request_of(address, "token", a_message(DOWN), 1)
    assert method == "PUT"
    assert url == (
        "https://matrix.example.org/_matrix/client/v3/rooms/%21abc%3Aexample.org/send/m.room.message/t1-7"
    )
    assert headers["Authorization"] == "Bearer token"
    assert msgspec.json.decode(body) == {"msgtype": "m.notice", "body": a_message(DOWN).text}


def test_a_mail_has_one_id_at_every_attempt_and_no_line_of_a_header_comes_from_a_container() -> None:
    address = parsed_address("smtps://mail.example.org?from=skep@example.org&to=ops@example.org")
    mail = mail_of(address, a_message(DOWN, is_test=True))
    assert mail["Message-ID"] == "<t1-7@example.org>"
    assert mail["Subject"] == "[default] Test message"
    assert mail.get_content().splitlines()[1] == "Notifications of this cluster reach you. Nothing is wrong."


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://hooks.example.org/secret?key=secret", "https://hooks.example.org:443"),
        ("http://[2001:db8::1]:8080/secret", "http://[2001:db8::1]:8080"),
        ("slack+https://hooks.slack.com/services/secret", "https://hooks.slack.com:443"),
        ("matrix+https://matrix.example.org/!r:example.org", "!r:example.org on matrix.example.org:443"),
        (
            "smtp://secret@mail.example.org?from=a@example.org&to=b@example.org,c@example.org",
            "b@example.org, c@example.org by mail.example.org:587",
        ),
    ],
)
def test_an_address_is_shown_without_its_credentials(url: str, shown: str) -> None:
    assert parsed_address(url).shown == shown
    assert "secret" not in shown


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("", "has no host"),
        ("ftp://example.org/", "unknown scheme 'ftp'"),
        ("pigeon+https://example.org/", "unknown scheme"),
        ("https://user:password@example.org/", "no user or password"),
        ("https://example.org:99999/", "not valid"),
        ("https://exämple.org/", "ASCII"),
        ("https://example.org/a b", "ASCII"),
        ("matrix+https://example.org/#ops:example.org", "the id of a room"),
        ("smtp://mail.example.org?to=b@example.org", "one sender and recipients"),
        ("smtp://u:p@mail.example.org?from=a@example.org&to=b@example.org", "no password"),
        ("smtp://mail.example.org?from=a@example.org&to=b@example.org%0d%0aRCPT", "not a mail address"),
        ("smtp://mail.example.org?from=a@example.org&to=b@example.org&cc=d@example.org", "one sender"),
        ("https://example.org/" + "a" * 3000, "at most"),
    ],
)
def test_an_address_that_cannot_work_is_refused_without_being_repeated(url: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as refused:
        parsed_address(url)
    assert "password" not in url or "user:password" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "user", "secret", "reason"),
    [
        (TargetKind.SLACK, "", "s", "is its secret"),
        (TargetKind.MATRIX, "", "", "access token"),
        (TargetKind.MAIL, "u", "", "both a user"),
        (TargetKind.MAIL, "", "s", "both a user"),
        (TargetKind.WEBHOOK, "", "a\r\nX: y", "printable"),
    ],
)
def test_a_secret_fits_its_target(kind: TargetKind, user: str, secret: str, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        check_secret(TargetAddress(kind=kind, host="h", port=1, is_tls=True, user=user), secret)
