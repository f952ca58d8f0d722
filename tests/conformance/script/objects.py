"""Secrets, configs and networks."""

from tests.conformance.script.steps import delete, get, post

FILES = (
    post(
        "a secret",
        "/v1.41/secrets/create",
        {"Name": "s1", "Labels": {"a": "b"}, "Data": "aGVsbG8="},
        keep="s1",
    ),
    post("a secret again", "/v1.41/secrets/create", {"Name": "s1", "Data": "aGVsbG8="}),
    post("a secret without a name", "/v1.41/secrets/create", {"Data": "aGVsbG8="}),
    post("a secret with a bad name", "/v1.41/secrets/create", {"Name": "a/b", "Data": "aGVsbG8="}),
    post("a secret with a long name", "/v1.41/secrets/create", {"Name": "s" * 65, "Data": "aGVsbG8="}),
    post("a secret without data", "/v1.41/secrets/create", {"Name": "s2"}),
    post("a secret too large", "/v1.41/secrets/create", {"Name": "s2", "Data": "QUFB" * 171_000}),
    post("a secret that is no base64", "/v1.41/secrets/create", {"Name": "s2", "Data": "no base64!"}),
    post("a secret with a nameless driver", "/v1.41/secrets/create", {"Name": "s2", "Driver": {}}),
    get("the secret", "/v1.41/secrets/s1", keep="s1"),
    get("the secret by the beginning of its id", "/v1.41/secrets/{s1.prefix}"),
    get("no such secret", "/v1.41/secrets/nosuch"),
    get("secrets by name", '/v1.41/secrets?filters={"name":["s"]}'),
    get("secrets by full names", '/v1.41/secrets?filters={"names":["s"]}'),
    get("secrets by label", '/v1.41/secrets?filters={"label":["a=b"]}'),
    get("secrets by another label", '/v1.41/secrets?filters={"label":["a=c"]}'),
    post(
        "new labels for the secret",
        "/v1.41/secrets/{s1}/update?version={s1.version}",
        {"Name": "s1", "Labels": {"x": "y"}},
    ),
    post("a stale update of the secret", "/v1.41/secrets/{s1}/update?version={s1.version}", {"Name": "s1"}),
    get("the secret after that", "/v1.41/secrets/s1", keep="s1"),
    post("a new name for the secret", "/v1.41/secrets/s1/update?version={s1.version}", {"Name": "s9"}),
    post(
        "new data for the secret",
        "/v1.41/secrets/s1/update?version={s1.version}",
        {"Name": "s1", "Data": "eA=="},
    ),
    post("a secret update without version", "/v1.41/secrets/s1/update", {"Name": "s1"}),
    post("an update of no secret", "/v1.41/secrets/nosuch/update?version=1", {"Name": "s1"}),
    post(
        "a config",
        "/v1.41/configs/create",
        {"Name": "c1", "Labels": {"a": "b"}, "Data": "aGVsbG8="},
        keep="c1",
    ),
    post("a config again", "/v1.41/configs/create", {"Name": "c1", "Data": "aGVsbG8="}),
    post("a config without data", "/v1.41/configs/create", {"Name": "c2"}),
    post("a config with a bad name", "/v1.41/configs/create", {"Name": ".c", "Data": "aGVsbG8="}),
    get("the config", "/v1.41/configs/c1", keep="c1"),
    get("no such config", "/v1.41/configs/nosuch"),
    post(
        "new data for the config",
        "/v1.41/configs/c1/update?version={c1.version}",
        {"Name": "c1", "Data": "eA=="},
    ),
    post("a config update without version", "/v1.41/configs/c1/update?version=x", {"Name": "c1"}),
    delete("a removal of no secret", "/v1.41/secrets/nosuch"),
    delete("a removal of no config", "/v1.41/configs/nosuch"),
)

NETWORKS = (
    post(
        "a network",
        "/v1.41/networks/create",
        {"Name": "ov1", "Driver": "overlay", "Attachable": True},
        keep="ov1",
    ),
    post(
        "a network again",
        "/v1.41/networks/create",
        {"Name": "ov1", "Driver": "overlay", "CheckDuplicate": True},
    ),
    post("a network with a bad name", "/v1.41/networks/create", {"Name": "a b", "Driver": "overlay"}),
    post(
        "an attachable ingress",
        "/v1.41/networks/create",
        {"Name": "ov2", "Driver": "overlay", "Ingress": True, "Attachable": True},
    ),
    post("another ingress", "/v1.41/networks/create", {"Name": "ov2", "Driver": "overlay", "Ingress": True}),
    post(
        "a network with a bad subnet",
        "/v1.41/networks/create",
        {"Name": "ov2", "Driver": "overlay", "IPAM": {"Config": [{"Subnet": "nonsense"}]}},
    ),
    post(
        "a network with a gateway elsewhere",
        "/v1.41/networks/create",
        {
            "Name": "ov2",
            "Driver": "overlay",
            "IPAM": {"Config": [{"Subnet": "10.8.0.0/24", "Gateway": "10.9.0.1"}]},
        },
    ),
    post(
        "a network with a range elsewhere",
        "/v1.41/networks/create",
        {
            "Name": "ov2",
            "Driver": "overlay",
            "IPAM": {"Config": [{"Subnet": "10.8.0.0/24", "IPRange": "10.9.0.0/25"}]},
        },
    ),
    post(
        "a network with the cluster's label",
        "/v1.41/networks/create",
        {"Name": "ov2", "Driver": "overlay", "Labels": {"com.docker.swarm.predefined": "true"}},
    ),
    post("a network called host", "/v1.41/networks/create", {"Name": "host", "Driver": "overlay"}),
    post("a network with a wrong type", "/v1.41/networks/create", {"Name": 5}),
    get("the network", "/v1.41/networks/ov1?scope=swarm"),
    get("no such network", "/v1.41/networks/nosuch"),
    delete("a removal of no network", "/v1.41/networks/nosuch"),
)
