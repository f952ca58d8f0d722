"""What of a request for a task's container is an administrator's, at a manager and at a node alike."""

import pytest

from skep.api.formats.forwarded_requests import FORWARDED, ExecRequest, forwarded, why_not
from skep.model.options.labels import check_container_labels, check_service_labels, exec_policy

TOP = forwarded("GET", "/containers/{id}/top")
EXEC = forwarded("POST", "/containers/{id}/exec")
ANYONE = ("json", "top", "stats", "logs", "wait", "resize")


@pytest.mark.parametrize("arguments", ["", "-ef", "aux", "-eo pid,args"])
def test_columns_of_ps_are_anyones(arguments):
    assert why_not(TOP, {"ps_args": arguments}, {}) == ""


@pytest.mark.parametrize("arguments", ["e", "axe", "-o environ", "--version"])
def test_what_else_ps_prints_is_an_administrators(arguments):
    assert "only administrators may run ps" in why_not(TOP, {"ps_args": arguments}, {})


@pytest.mark.parametrize("kind", FORWARDED, ids=lambda kind: f"{kind.method} {kind.path}")
def test_without_a_label_every_request_is_anyones_but_a_privileged_command(kind):
    assert why_not(kind, {}, {}, ExecRequest(user="0")) == ""
    refused = why_not(kind, {}, {}, ExecRequest(privileged=True))
    assert bool(refused) is not kind.path.endswith("/top")


@pytest.mark.parametrize("kind", FORWARDED, ids=lambda kind: f"{kind.method} {kind.path}")
def test_a_service_without_commands_can_be_looked_at(kind):
    what = kind.path.rpartition("/")[2]
    assert bool(why_not(kind, {}, {"skep.exec": "none"})) is (what not in ANYONE)


def test_a_command_as_the_containers_user_brings_nothing_in():
    labels = {"skep.exec": "user"}
    assert why_not(EXEC, {}, labels, ExecRequest(cmd=("sh",))) == ""
    assert "as the user root" in why_not(EXEC, {}, labels, ExecRequest(user="root"))


def test_the_label_has_three_words_and_belongs_to_containers():
    for word in ("any", "user", "none"):
        check_container_labels({"skep.exec": word})
        assert exec_policy({"skep.exec": word}).value == word
    with pytest.raises(Exception, match=r"invalid label skep\.exec=root: expected one of any, user, none"):
        check_container_labels({"skep.exec": "root"})
    with pytest.raises(Exception, match=r"the label skep\.exec works on containers only"):
        check_service_labels({"skep.exec": "user"})
