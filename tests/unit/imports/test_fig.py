"""``fig.yml`` as a stack file."""

import pytest

from skep.errors import InvalidArgument
from skep.imports.document import read_back
from skep.imports.fig import imported
from skep.stack.compose.document import FileProblems

FIG = """
web:
  build: .
  dockerfile: Dockerfile.web
  command: python app.py
  links: [db, "redis:cache", "gone:x"]
  ports: ["8000:8000"]
  volumes: [".:/code", "pool:/pool"]
  volumes_from: [data]
  volume_driver: flocker
  mac_address: 02:42:ac:11:65:43
  environment: {VERSION: 1.10}
db:
  image: postgres
  mem_limit: 64m
  log_driver: syslog
  log_opt: {syslog-address: "udp://192.0.2.1:514"}
redis: {image: redis, net: "container:db"}
data: {image: busybox, volumes: [/var/lib/data], net: host}
"""


def test_a_file_of_version_1_is_a_stack() -> None:
    made = imported(FIG, "fig.yml", "shop")
    services = made.document["services"]
    assert services["web"] == {
        "build": {"context": ".", "dockerfile": "Dockerfile.web"},
        "command": "python app.py",
        "ports": ["8000:8000"],
        "volumes": [".:/code", "pool:/pool", "data-var-lib-data:/var/lib/data"],
        "environment": {"VERSION": "1.10"},
        "depends_on": ["db", "redis"],
    }
    assert services["db"]["logging"] == {
        "driver": "syslog",
        "options": {"syslog-address": "udp://192.0.2.1:514"},
    }
    assert services["redis"] == {"image": "redis", "networks": {"default": {"aliases": ["cache"]}}}
    assert services["data"] == {
        "network_mode": "host",
        "image": "busybox",
        "volumes": ["data-var-lib-data:/var/lib/data"],
    }
    assert made.document["volumes"] == {"data-var-lib-data": None, "pool": {"driver": "flocker"}}
    assert [f"{one.path}: {one.text.split(':')[0]}" for one in made.notes] == [
        "services.web.links: all services of the stack now reach redis as cache, not only this one",
        "services.web.links: dropped",
        "services.web.volumes_from: a volume is on one node",
        "services.redis.net: dropped",
        "services.web.mac_address: dropped",
    ]
    _, report = read_back(made.document)
    assert not report.problems


def test_a_file_of_another_version_is_refused_with_its_place() -> None:
    with pytest.raises(
        FileProblems, match=r"^fig\.yml:2:1: version: this file is not a Compose file of version 1"
    ):
        imported("# old\nversion: '3'\nservices: {}\n", "fig.yml", "shop")
    with pytest.raises(FileProblems, match=r"^fig\.yml:1:1: web: a service of version 1 needs image"):
        imported("web: {command: x}\n", "fig.yml", "shop")
    with pytest.raises(FileProblems, match="there are no services"):
        imported("{}", "fig.yml", "shop")


def test_a_list_that_is_a_mapping_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="expected a list"):
        imported("web: {image: w, links: {a: b}}", "fig.yml", "shop")
