"""What ``skep backup`` says that a backup holds."""

from skep.cli.maintain.backup import _described


def test_one_of_a_kind_is_not_called_many() -> None:
    counts = {"services": 2, "secrets": 1, "configs": 0}
    assert _described(counts) == "2 services, 1 secret, 0 configs"
