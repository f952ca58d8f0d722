"""Image archives: the bytes depend on the content alone."""

import hashlib
import io
import tarfile

import msgspec

from skep.playground.images.archive import (
    Archive,
    ArchivedDirectory,
    Entry,
    File,
    SymbolicLink,
    image_archive,
)

ENTRIES: dict[str, Entry] = {
    "bin/sh": SymbolicLink("busybox"),
    "bin/busybox": File(b"\x7fELF", 0o755),
    "tmp": ArchivedDirectory(0o1777),
}


def an_archive(entries: dict[str, Entry] = ENTRIES, tag: str = "box:1") -> Archive:
    return image_archive(entries, tags=[tag], created="2020-01-01T00:00:00Z", config={"Cmd": ["sh"]})


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in files if file}


def test_the_same_files_give_the_same_bytes_in_any_order() -> None:
    assert an_archive() == an_archive(dict(reversed(list(ENTRIES.items()))))


def test_a_tag_is_no_part_of_the_image_id() -> None:
    assert an_archive(tag="box:1").image_id == an_archive(tag="box:2").image_id


def test_the_image_id_is_the_digest_of_the_configuration() -> None:
    archive = an_archive()
    files = members(archive.data)
    [image] = msgspec.json.decode(files["manifest.json"])
    assert archive.image_id == f"sha256:{hashlib.sha256(files[image['Config']]).hexdigest()}"
    assert image["RepoTags"] == ["box:1"]


def test_the_layer_has_the_digest_that_the_configuration_names() -> None:
    files = members(an_archive().data)
    [image] = msgspec.json.decode(files["manifest.json"])
    [diff_id] = msgspec.json.decode(files[image["Config"]])["rootfs"]["diff_ids"]
    assert diff_id == f"sha256:{hashlib.sha256(files[image['Layers'][0]]).hexdigest()}"


def test_directories_stand_before_what_is_in_them_and_belong_to_root() -> None:
    files = members(an_archive().data)
    [image] = msgspec.json.decode(files["manifest.json"])
    with tarfile.open(fileobj=io.BytesIO(files[image["Layers"][0]])) as layer:
        assert layer.getnames() == ["bin", "bin/busybox", "bin/sh", "tmp"]
        assert {(member.uid, member.gid, member.mtime) for member in layer} == {(0, 0, 0)}
        assert layer.getmember("tmp").mode == 0o1777
