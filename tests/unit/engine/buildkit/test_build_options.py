"""What clients of BuildKit ask for is carried out or refused by its name."""

import pytest
from multidict import MultiDict

from skep.engine.build.interface import StepLimits
from skep.engine.buildkit import buildkit_pb2 as pb
from skep.engine.buildkit.options import (
    BuildOutput,
    CacheEntry,
    ClientDirectory,
    check_entitlements,
    check_network,
    check_syntax,
    exported,
    parse_options,
)
from skep.engine.buildkit.results import BYTES_MAX, RECORDS_MAX, BuildHistory, definition_of, image_of
from skep.engine.buildkit.routes import solve_request
from skep.engine.images.digest import Digest
from skep.engine.images.reference import parse_reference
from skep.errors import InvalidArgument, PermissionDenied, SkepError, Unimplemented
from skep.model.container import Ulimit


def test_every_option_that_is_honored_reaches_the_build() -> None:
    build = parse_options(
        "dockerfile.v0",
        {
            "filename": "other/Dockerfile",
            "target": "last",
            "build-arg:A": "1",
            "label:l": "v",
            "no-cache": "",
            "image-resolve-mode": "pull",
            "force-network-mode": "host",
            "add-hosts": "one=10.0.0.1,two=::1",
            "shm-size": "1000",
            "ulimit": "nofile=10:20,nproc=5",
            "memory": "2000",
            "cpuquota": "50000",
            "platform": "linux/amd64",
            "contextkey": "ctx",
            "local-sessionid:ctx": "shared",
            "context:Base": "docker-image://busybox:1",
            "context:more": "local:dir",
            "local-sessionid:dir": "shared2",
            "vcs:source": "https://example.org",
            "attest:provenance": "mode=min,inline-only=true",
        },
    )
    assert (build.filename, build.target, build.arguments, build.labels) == (
        "other/Dockerfile",
        "last",
        {"A": "1"},
        {"l": "v"},
    )
    assert (build.use_cache, build.pull, build.network) == (False, True, "host")
    assert build.images == {"base": "busybox:1"}
    assert build.directories == {"more": ClientDirectory("dir", "shared2")}
    assert build.hosts == ("one:10.0.0.1", "two:::1")
    assert build.limits == StepLimits(
        memory_bytes=2000,
        nano_cpus=500_000_000,
        shm_bytes=1000,
        ulimits=(Ulimit(name="nofile", soft=10, hard=20), Ulimit(name="nproc", soft=5, hard=5)),
    )
    assert (build.platforms, build.is_index) == (("linux/amd64",), False)
    assert (build.context, build.dockerfile) == (
        ClientDirectory("ctx", "shared"),
        ClientDirectory("dockerfile"),
    )


@pytest.mark.parametrize(
    ("attributes", "platforms", "is_index"),
    [
        ({}, ("",), False),
        ({"platform": "linux/arm64/v8"}, ("linux/arm64",), False),
        (
            {"platform": "linux/amd64, linux/aarch64,linux/arm64"},
            ("linux/amd64", "linux/arm64"),
            True,
        ),
        (
            {"platform": "linux/arm/v7", "build-arg:BUILDKIT_MULTI_PLATFORM": "1"},
            ("linux/arm/v7",),
            True,
        ),
    ],
)
def test_platforms_are_read_as_by_buildkit(
    attributes: dict[str, str], platforms: tuple[str, ...], is_index: bool
) -> None:
    build = parse_options("dockerfile.v0", attributes)
    assert (build.platforms, build.is_index) == (platforms, is_index)


def test_platforms_that_are_not_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="cannot parse platform specifier"):
        parse_options("dockerfile.v0", {"platform": "linux/amd64,linux/arm64/v8/x"})
    with pytest.raises(InvalidArgument, match="at most 16 platforms"):
        parse_options("dockerfile.v0", {"platform": "linux/amd64," * 17})


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"attest:sbom": ""}, "attestations are not supported: sbom"),
        ({"attest:provenance": "mode=max"}, "attestations are not supported: provenance"),
        (
            {"context:a": "ssh://ann:pw@example.org/x.git"},
            "named context a is not supported: ssh://xxxxx:xxxxx@example.org/x.git",
        ),
        ({"context:a": "oci-layout://b"}, "named context a is not supported: oci-layout://b"),
        ({"context:a": "input:b"}, "named context a is not supported: input:b"),
        ({"build-arg:BUILDKIT_SYNTAX": "some/frontend"}, "front end some/frontend is not supported"),
        ({"cgroup-parent": "x"}, "build option cgroup-parent is not supported"),
        ({"cpushares": "5"}, "build option cpushares is not supported"),
        ({"source-policy": "x"}, "build option source-policy is not supported"),
    ],
)
def test_what_is_not_done_is_refused_by_name(attributes: dict[str, str], text: str) -> None:
    with pytest.raises(Unimplemented) as error:
        parse_options("dockerfile.v0", attributes)
    assert text in str(error.value)


@pytest.mark.parametrize(
    "attributes",
    [
        {"add-hosts": "one"},
        {"shm-size": "-1"},
        {"memory": "much"},
        {"ulimit": "nofile=x"},
        {"cache-imports": "{"},
        {"build-arg:SOURCE_DATE_EPOCH": "yesterday"},
        {"build-arg:SOURCE_DATE_EPOCH": "-1"},
        {"build-arg:SOURCE_DATE_EPOCH": "999999999999"},
    ],
)
def test_values_that_cannot_be_read_are_invalid(attributes: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument):
        parse_options("dockerfile.v0", attributes)


@pytest.mark.parametrize(
    "image",
    [
        "",
        "docker/dockerfile:1",
        "docker.io/docker/dockerfile:1.7@sha256:abc",
        "docker/dockerfile:1.7-labs",
        "docker/dockerfile:experimental",
        "docker/dockerfile-upstream:master",
        "dockerfile.v0",
    ],
)
def test_dockers_own_front_end_is_ours(image: str) -> None:
    check_syntax(image)
    parse_options("gateway.v0", {"source": image, "cmdline": image})


@pytest.mark.parametrize(
    "image", ["me/frontend", "me/docker/dockerfile:1", "registry:5000/docker/dockerfile"]
)
def test_another_front_end_is_refused_by_name(image: str) -> None:
    with pytest.raises(Unimplemented, match=f"front end {image} is not supported"):
        check_syntax(image)


def test_outputs_are_images_files_or_nothing() -> None:
    image = exported([("moby", {"name": "a,b:1", "push": "true"})])
    assert image.output is BuildOutput.IMAGE
    assert image.tags == (parse_reference("a:latest"), parse_reference("b:1"))
    assert exported([]).output is BuildOutput.NONE
    assert exported([("local", {"dest": "x"})]).output is BuildOutput.LOCAL
    assert exported([("tar", {})]).output is BuildOutput.TAR


@pytest.mark.parametrize(
    ("exporters", "text"),
    [
        ([("local", {"platform-split": "true"})], "output option platform-split is not supported"),
        ([("tar", {"compression": "zstd"})], "output option compression is not supported"),
        ([("oci", {})], 'exporter "oci" could not be found'),
        ([("docker", {"dest": "x"})], 'exporter "docker" could not be found'),
        ([("moby", {"compression": "zstd"})], "output option compression is not supported"),
        ([("moby", {}), ("tar", {})], "multiple outputs are not supported"),
    ],
)
def test_other_outputs_are_refused_by_name(exporters: list[tuple[str, dict[str, str]]], text: str) -> None:
    with pytest.raises(Unimplemented, match=text):
        exported(exporters)


def test_a_push_needs_a_name() -> None:
    assert not exported([("image", {"name": "a", "push": "false"})]).is_pushed
    for kind in ("image", "moby"):  # the node says that it has a snapshotter, so buildx leaves the push to it
        assert exported([(kind, {"name": "a", "push": "true"})]).is_pushed
    for name in ("", ",", ",,"):
        with pytest.raises(InvalidArgument, match="tag is needed when pushing to registry"):
            exported([("image", {"name": name, "push": "true"})])


def test_the_names_of_an_image_are_tags() -> None:
    names = exported([("image", {"name": ",a,a:latest,,docker.io/library/a:latest,b:1,"})]).tags
    assert names == (parse_reference("a:latest"), parse_reference("b:1"))
    for name in (f"a@sha256:{'0' * 64}", f"b:1,a:1@sha256:{'0' * 64}"):
        with pytest.raises(InvalidArgument, match="build tag cannot contain a digest"):
            exported([("image", {"name": name})])
    for name in ("A", "a b", "a, b", "https://a/b", "a:", "0" * 64):
        with pytest.raises(InvalidArgument):
            exported([("moby", {"name": name})])


def test_the_hosts_network_needs_its_entitlement() -> None:
    build = parse_options("dockerfile.v0", {"force-network-mode": "host"})
    check_network(build, ["network.host"])
    check_network(parse_options("dockerfile.v0", {}), [])
    with pytest.raises(PermissionDenied, match=r"network\.host is not allowed"):
        check_network(build, [])


def test_records_of_builds_are_bounded_together() -> None:
    history = BuildHistory()
    for number in range(RECORDS_MAX + 2):
        history.keep(pb.BuildHistoryRecord(ref=f"small-{number}"))
    assert len(history.records) == RECORDS_MAX
    for number in range(4):
        record = pb.BuildHistoryRecord(ref=f"large-{number}")
        record.frontend_attrs["x"] = "x" * (BYTES_MAX // 3)
        history.keep(record)
    assert list(history.records) == ["large-2", "large-3"]


def test_entitlements_that_are_not_given_are_refused_by_name() -> None:
    check_entitlements(["network.host"])
    with pytest.raises(PermissionDenied, match=r"granting entitlement security\.insecure"):
        check_entitlements(["security.insecure"])


def test_sources_and_places_of_caches_are_known_by_name_and_never_refused() -> None:
    build = parse_options(
        "dockerfile.v0",
        {
            "cache-from": "busybox,gone:1",
            "cache-imports": '[{"Type":"registry","Attrs":{"ref":"a"}},{"Type":"gha"}]',
            "build-arg:BUILDKIT_INLINE_CACHE": "1",
        },
    )
    assert [one.name for one in build.cache_sources] == ["busybox", "gone:1", "a", "gha"]
    assert build.inline_cache


def test_arguments_that_mean_something_to_the_builder_are_arguments_too() -> None:
    given = {
        "SOURCE_DATE_EPOCH": "1700000000",
        "BUILDKIT_SANDBOX_HOSTNAME": "box",
        "BUILDKIT_CACHE_MOUNT_NS": "mine",
        "BUILDKIT_DOCKERFILE_CHECK": "skip=all",
        "BUILDKIT_SYNTAX": "dockerfile.v0",
    }
    build = parse_options("dockerfile.v0", {f"build-arg:{name}": value for name, value in given.items()})
    assert build.arguments == given
    assert (build.epoch_s, build.hostname, build.cache_namespace) == (1700000000, "box", "mine")
    assert (build.checks, build.has_syntax) == ("skip=all", True)
    assert parse_options("dockerfile.v0", {"hostname": "other"}).hostname == "other"


@pytest.mark.parametrize(
    "address", ["https://example.org/x.git#v1:docs", "http://example.org/x.tar", "git://h/x", "git@h:x.git"]
)
def test_a_named_context_may_be_at_an_address(address: str) -> None:
    assert parse_options("dockerfile.v0", {"context:Docs": address}).remotes == {"docs": address}


@pytest.mark.parametrize(
    "name", ["alpine", "alpine:latest", "docker.io/library/alpine", "index.docker.io/alpine"]
)
def test_a_named_context_stands_for_every_spelling_of_an_image(name: str) -> None:
    build = parse_options("dockerfile.v0", {f"context:{name}": "docker-image://busybox:1"})
    assert build.images == {"alpine": "busybox:1"}


def test_times_are_rewritten_where_the_export_asks_for_it() -> None:
    assert exported([("moby", {"rewrite-timestamp": "true"})]).rewrites_times
    assert not exported([("moby", {"rewrite-timestamp": "false"})]).rewrites_times


def test_stages_may_be_built_without_the_cache() -> None:
    build = parse_options("dockerfile.v0", {"no-cache": "One,two"})
    assert (build.use_cache, build.stages_without_cache) == (True, ("one", "two"))


def test_the_request_of_docker_20_becomes_buildkits() -> None:
    query = MultiDict(
        [
            ("session", "s"),
            ("remote", "client-session"),
            ("t", "a"),
            ("t", "b:1"),
            ("buildargs", '{"A":"1","B":null}'),
            ("labels", '{"l":"v"}'),
            ("networkmode", "host"),
            ("extrahosts", "one:10.0.0.1"),
            ("extrahosts", "two:::1"),
            ("nocache", "1"),
            ("pull", "1"),
            ("dockerfile", "Other"),
            ("ulimits", '[{"Name":"nofile","Soft":1,"Hard":2}]'),
            ("cachefrom", '["c"]'),
        ]
    )
    request = solve_request(query, "ref")
    assert dict(request.frontend_attrs) == {
        "build-arg:A": "1",
        "label:l": "v",
        "force-network-mode": "host",
        "add-hosts": "one=10.0.0.1,two=::1",
        "no-cache": "",
        "image-resolve-mode": "pull",
        "filename": "Other",
        "ulimit": "nofile=1:2",
        "cache-from": "c",
    }
    assert list(request.entitlements) == ["network.host"]
    assert dict(request.exporters[0].attrs) == {"name": "a,b:1"}


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ({"squash": "1"}, "build option squash is not supported"),
        ({"securityopt": '["x"]'}, "build option securityopt is not supported"),
        ({"networkmode": "mine"}, 'network mode "mine" not supported by buildkit'),
        ({"buildargs": "{"}, "invalid value of buildargs"),
    ],
)
def test_what_docker_20_asks_for_in_vain_is_refused_by_name(query: dict[str, str], text: str) -> None:
    with pytest.raises(SkepError) as error:
        solve_request(MultiDict({"remote": "client-session", **query}), "ref")
    assert text in str(error.value)


def test_a_result_of_a_build_is_a_context_of_another() -> None:
    id = Digest("sha256:" + "a" * 64)
    definition = pb.Definition.FromString(definition_of(id).SerializeToString())
    assert image_of(definition) == id
    build = parse_options(
        "dockerfile.v0", {"context:base": "input:base-target"}, {"base-target": image_of(definition)}
    )
    assert build.images == {"base": id}
    other = pb.Op(source=pb.SourceOp(identifier="https://example.org/x")).SerializeToString()
    with pytest.raises(Unimplemented, match="LLB definitions"):
        image_of(pb.Definition(**{"def": [other]}))
    with pytest.raises(InvalidArgument, match="cannot be decoded"):
        image_of(pb.Definition(**{"def": [b"\xff"]}))


def test_a_cache_with_a_password_in_its_name_is_shown_without_it() -> None:
    for ref in ("u:pa55@h/cache:1", "https://u:pa55@h/cache:1"):
        assert CacheEntry("registry", {"ref": ref}).name.endswith("xxxxx:xxxxx@h/cache:1")
    assert CacheEntry("local", {"src": "a/b@c"}).name == "a/b@c"
