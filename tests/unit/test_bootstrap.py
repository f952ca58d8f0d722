"""Settings that the node writes and the manager reads."""

import msgspec
import pytest

from skep.bootstrap import ManagerConfig
from skep.configuration.configuration import Configuration
from skep.store.space import QUOTA_BYTES


@pytest.mark.parametrize("settings", [ManagerConfig, Configuration])
def test_the_stores_quota_has_the_same_default_everywhere(settings: type[msgspec.Struct]) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(settings)}
    assert defaults["store_quota"] == QUOTA_BYTES
