"""Sources of bind mounts that cannot be looked at."""

import errno
import os
from collections.abc import Iterable
from pathlib import Path

import pytest

from skep.engine.api_sockets import NONE
from skep.engine.volumes.bind_sources import BindSources
from skep.errors import InvalidArgument
from skep.model.container import Mount


def refuses(_mounts: Iterable[Mount]) -> list[Mount]:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


async def test_a_source_that_cannot_be_looked_at_is_refused_in_dockers_words(tmp_path: Path) -> None:
    mount = Mount(type="bind", source=f"{tmp_path}/a\0b", target="/x")
    said = 'invalid mount config for type "bind": stat '
    with pytest.raises(InvalidArgument) as error:
        await BindSources().check([mount], NONE.others)
    assert str(error.value) == f"{said}{tmp_path}/a\0b: invalid argument"
    with pytest.raises(InvalidArgument) as error:
        await BindSources().check([Mount(type="bind", source=str(tmp_path), target="/x")], refuses)
    assert str(error.value) == f"{said}{tmp_path}: Permission denied"
