"""What the options of ``RUN --mount`` mean."""

import pytest

from skep.engine.build.dockerfile.mounts import RunMount, mount_origin, parse_mount
from skep.errors import InvalidArgument, SkepError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("target=/a", RunMount(target="/a")),
        (
            "type=bind,from=s,source=x,dst=/a,rw",
            RunMount(origin="s", source="x", target="/a", read_only=False),
        ),
        (
            "type=cache,target=/$V,id=c,sharing=locked,mode=700",
            RunMount(type="cache", target="/v", id="c", sharing="locked", mode=0o700),
        ),
        ("type=tmpfs,target=/t,size=2m", RunMount(type="tmpfs", target="/t", size_bytes=2 << 20)),
        ('type=secret,"id=a,b",required', RunMount(type="secret", id="a,b", required=True)),
        ("type=secret,id=a,env=TOKEN,uid=5", RunMount(type="secret", id="a", env="TOKEN", uid=5)),
        ("type=ssh", RunMount(type="ssh")),
        (
            "type=cache,target=/c,from=s,source=/x,uid=1,gid=2",
            RunMount(type="cache", target="/c", origin="s", source="/x", uid=1, gid=2),
        ),
        ("type=tmpfs,target=/t,size=1.5g", RunMount(type="tmpfs", target="/t", size_bytes=3 << 29)),
    ],
)
def test_a_mount_is_what_its_options_say(text: str, expected: RunMount) -> None:
    assert parse_mount(text, lambda word: word.replace("$V", "v")) == expected


def test_only_caches_and_memory_are_written_to_unless_asked_for() -> None:
    read_only = {kind: RunMount(type=kind).is_read_only for kind in ("bind", "cache", "tmpfs", "secret")}
    assert read_only == {"bind": True, "cache": False, "tmpfs": False, "secret": True}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("type=foo,target=/a", 'unsupported mount type "foo"'),
        ("target=/a,foo=x", "unexpected key 'foo' in 'foo=x'"),
        ("target=/a,foo", "invalid field 'foo' must be a key=value pair"),
        ("type=bind,target=/a,uid=1", 'uid not allowed for "bind" type mounts'),
        ("type=bind,target=/a,required", "unexpected key 'required' for mount type 'bind'"),
        ("type=bind,target=/a,sharing=shared", "invalid cache sharing set for bind mount"),
        ("type=secret", "invalid secret mount. one of source, target required"),
        ("type=secret,id=a,from=b", "secret mount should not have a from"),
        ("type=secret,id=a,sharing=shared", "secret mount should not define sharing"),
        ("type=ssh,source=a", "ssh does not support source"),
        ("from=$X,target=/a", "'from' doesn't support variable expansion, define alias stage instead"),
        ("type=tmpfs,target=/a,size=x", "invalid value for size: x"),
        ("type=cache,target=/a,mode=99", "invalid value 99 for mode"),
        ("type=cache,target=/a,ro=maybe", "invalid value for ro: maybe"),
    ],
)
def test_what_is_no_mount_is_refused(text: str, error: str) -> None:
    with pytest.raises(SkepError) as raised:
        parse_mount(text, str)
    assert error in str(raised.value)


def test_quotes_that_do_not_end_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="failed to parse csv mounts"):
        parse_mount('"target=/a', str)


def test_a_relative_target_is_below_the_working_directory() -> None:
    assert RunMount(target="a/../b").target_below("/work") == "/work/b"
    assert RunMount(target="/b").target_below("/work") == "/b"
    assert RunMount().target_below("/work") == "/work"
    for mount in (RunMount(target="/"), RunMount(target="//"), RunMount(target="..")):
        with pytest.raises(InvalidArgument, match='invalid mount target "/"'):
            mount.target_below("/work")


def test_the_stage_of_a_mount_is_known_while_its_other_options_have_variables() -> None:
    assert mount_origin("type=$TYPE,from=base,target=$DIR") == "base"
    assert mount_origin("type=cache,target=/a") == ""
    with pytest.raises(InvalidArgument, match="doesn't support variable expansion"):
        mount_origin("from=${X},target=/a")
