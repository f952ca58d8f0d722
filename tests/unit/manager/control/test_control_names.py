"""Names of objects and of images."""

from random import Random

import pytest

from skep.errors import InvalidArgument
from skep.manager.control.validation.names import check_dns_name, check_file_name
from skep.manager.control.validation.service_rules import is_image_reference
from skep.model.values.name_generator import names_from
from tests.support.harness.own_time import own_time


@pytest.mark.parametrize("name", ["web", "Web-1", "a", "a--b__c", "1", "w" * 63])
def test_names_of_services(name):
    check_dns_name(name)


@pytest.mark.parametrize("name", ["", "-a", "a-", "a.b", "a b", "ü", "w" * 64, "a\n"])
def test_no_names_of_services(name):
    with pytest.raises(InvalidArgument):
        check_dns_name(name)


def test_a_hostile_name_costs_no_time():
    start = own_time()
    with pytest.raises(InvalidArgument):
        check_dns_name("a" + "-_" * 500_000 + "!")
    assert own_time() - start < 0.5


@pytest.mark.parametrize("name", ["a", "a.b_c-d", "0", "x" * 64])
def test_names_of_secrets(name):
    check_file_name(name)


@pytest.mark.parametrize("name", ["", ".a", "a.", "a/b", "x" * 65, "a\n"])
def test_no_names_of_secrets(name):
    with pytest.raises(InvalidArgument):
        check_file_name(name)


def test_readable_names_are_names_and_follow_the_seed():
    names = names_from(Random(3))
    some = [names() for _ in range(500)]
    for name in some:
        check_dns_name(name)
    assert len(set(some)) > 400
    again = names_from(Random(3))
    assert some[:5] == [again() for _ in range(5)]


@pytest.mark.parametrize(
    "word",
    [
        *(
            "busybox",
            "busybox:1",
            "library/busybox",
            "a/b/c:tag",
            "localhost/x",
            "host:5000/x:1",
            "127.0.0.1:5000/bb",
        ),
        *(
            "docker.io/library/a",
            "a--b",
            "a__b",
            "x@sha256:" + "a" * 64,
            "x:1@sha256:" + "b" * 64,
            "HOST.de/x",
        ),
        *("[::1]:5000/x", "x:" + "t" * 128),
    ],
)
def test_words_for_images(word):
    assert is_image_reference(word)


@pytest.mark.parametrize(
    "word",
    [
        *(
            "",
            "A",
            "a b",
            "a:",
            "a:b:c",
            "/a",
            "a/",
            "a//b",
            "-a",
            "a-",
            "a___b",
            "x@sha256:abc",
            "x@",
            "a:-t",
        ),
        *("f" * 64, "a" * 256, "a/" * 600, "x:" + "t" * 129, "x@sha256:" + "g" * 64, "host:port/x", "a\n"),
    ],
)
def test_no_words_for_images(word):
    assert not is_image_reference(word)
