"""Changes that make the records of a step cache lie."""

from typing import Any

from skep.engine.images.child import EMPTY_LAYER


def swap_layers(config: dict[str, Any]) -> None:
    """Each layer is said to be another one's content."""
    layers = config["layers"]
    blobs = [layer["blob"] for layer in layers]
    for layer, blob in zip(layers, blobs[1:] + blobs[:1], strict=True):
        layer["blob"] = blob


def swap_parents(config: dict[str, Any]) -> None:
    """Layers lie on top of others than those of the build."""
    layers = config["layers"]
    for number, layer in enumerate(layers):
        layer["parent"] = -1 if layer["parent"] >= 0 else (number + 1) % len(layers)


def tie_rings(config: dict[str, Any]) -> None:
    """Layers lie on top of each other."""
    for number, layer in enumerate(config["layers"]):
        layer["parent"] = number


def point_nowhere(config: dict[str, Any]) -> None:
    """Results name layers that are not there."""
    for record in config["records"]:
        record["layers"] = [{"layer": number, "createdAt": "2026-01-01T00:00:00Z"} for number in (-7, 99)]


def give_odd_times(config: dict[str, Any]) -> None:
    """Times are no times."""
    for record in config["records"]:
        record["layers"][0]["createdAt"] = "yesterday" * 1000


def give_impossible_times(config: dict[str, Any]) -> None:
    """Times look like times."""
    for record, time in zip(
        config["records"],
        ["2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01T24:61:61Z", "0000-01-01T00:00:00Z"] * 2,
        strict=False,
    ):
        record["layers"][0]["createdAt"] = time


def name_empty_layers(config: dict[str, Any]) -> None:
    """The layers of COPY have no files."""
    for layer in config["layers"]:
        layer["annotations"]["diffID"] = EMPTY_LAYER


def give_odd_digests(config: dict[str, Any]) -> None:
    """Blobs have names that are no digests."""
    for layer in config["layers"]:
        layer["blob"] = "sha256:../../../etc/passwd"
