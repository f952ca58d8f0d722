"""Changes that make the records of a step cache false."""

from typing import Any

from skep.engine.images.child import EMPTY_LAYER


def swap_layers(config: dict[str, Any]) -> None:
    """Exchange the contents that the records name for the layers."""
    layers = config["layers"]
    blobs = [layer["blob"] for layer in layers]
    for layer, blob in zip(layers, blobs[1:] + blobs[:1], strict=True):
        layer["blob"] = blob


def swap_parents(config: dict[str, Any]) -> None:
    """Put layers on top of other layers than in the build."""
    layers = config["layers"]
    for number, layer in enumerate(layers):
        layer["parent"] = -1 if layer["parent"] >= 0 else (number + 1) % len(layers)


def tie_rings(config: dict[str, Any]) -> None:
    """Put layers on top of each other in a ring."""
    for number, layer in enumerate(config["layers"]):
        layer["parent"] = number


def point_nowhere(config: dict[str, Any]) -> None:
    """Let results name layers that do not exist."""
    for record in config["records"]:
        record["layers"] = [{"layer": number, "createdAt": "2026-01-01T00:00:00Z"} for number in (-7, 99)]


def give_odd_times(config: dict[str, Any]) -> None:
    """Replace times by texts that are not times."""
    for record in config["records"]:
        record["layers"][0]["createdAt"] = "yesterday" * 1000


def give_impossible_times(config: dict[str, Any]) -> None:
    """Replace times by impossible times in the right form."""
    for record, time in zip(
        config["records"],
        ["2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01T24:61:61Z", "0000-01-01T00:00:00Z"] * 2,
        strict=False,
    ):
        record["layers"][0]["createdAt"] = time


def name_empty_layers(config: dict[str, Any]) -> None:
    """Let the results of COPY name layers without files."""
    for layer in config["layers"]:
        layer["annotations"]["diffID"] = EMPTY_LAYER


def give_odd_digests(config: dict[str, Any]) -> None:
    """Replace the names of blobs by texts that are not digests."""
    for layer in config["layers"]:
        layer["blob"] = "sha256:../../../etc/passwd"
