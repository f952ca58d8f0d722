"""The requests that a real engine and Skep are asked, in order, good and bad.

``{web}`` in a path or body stands for the id of what an earlier step named ``keep="web"`` made or showed,
``{web.version}`` for its version.  Steps before ``INIT`` find a node that is in no swarm.
"""

from typing import Any

import msgspec


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One request.  ``body``: JSON, or bytes as they are; ``keep``: remember the object in the answer by this name."""

    name: str
    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = {}
    keep: str = ""


IMAGE = "busybox:1"


def service(
    name: str | None = None, /, *, image: str = IMAGE, container: Any = None, task: Any = None, **spec: Any
) -> Any:
    """A service spec as a client would send it: ``container`` and ``task`` add to the nested objects."""
    body: dict[str, Any] = {
        "TaskTemplate": {"ContainerSpec": {"Image": image, **(container or {})}, **(task or {})},
        **spec,
    }
    return body if name is None else {"Name": name, **body}


def create(name: str, body: Any, keep: str = "") -> Step:
    return Step(name=name, method="POST", path="/v1.41/services/create", body=body, keep=keep)


def get(name: str, path: str, keep: str = "") -> Step:
    return Step(name=name, method="GET", path=path, keep=keep)


def post(name: str, path: str, body: Any = None, keep: str = "") -> Step:
    return Step(name=name, method="POST", path=path, body=body, keep=keep)


def delete(name: str, path: str) -> Step:
    return Step(name=name, method="DELETE", path=path)


def port(**fields: Any) -> Any:
    return {"Mode": "vip", "Ports": [{"TargetPort": 80, **fields}]}


def init(**fields: Any) -> Any:
    return {"ListenAddr": "10.77.0.1:2377", "AdvertiseAddr": "10.77.0.1", **fields}


SECOND = 1_000_000_000

BEFORE_INIT = (
    get("services before init", "/v1.41/services"),
    get("a service before init", "/v1.41/services/web"),
    create("a creation before init", service("web")),
    get("tasks before init", "/v1.41/tasks"),
    get("nodes before init", "/v1.41/nodes"),
    get("swarm before init", "/v1.41/swarm"),
    get("unlock key before init", "/v1.41/swarm/unlockkey"),
    post("swarm update before init", "/v1.41/swarm/update?version=1", {"Name": "default"}),
    get("secrets before init", "/v1.41/secrets"),
    get("configs before init", "/v1.41/configs"),
    post("a secret before init", "/v1.41/secrets/create", {"Name": "s", "Data": "aGk="}),
    delete("a removal before init", "/v1.41/services/web"),
    get("service logs before init", "/v1.41/services/web/logs?stdout=1"),
    post("leave before init", "/v1.41/swarm/leave"),
    post("unlock before init", "/v1.41/swarm/unlock", {"UnlockKey": "x"}),
    create("broken JSON before init", b"{bad}"),
    get("an unknown filter before init", '/v1.41/services?filters={"bogus":["x"]}'),
)

INITS = (
    post("init with broken JSON", "/v1.41/swarm/init", b"{bad}"),
    post("init without a body", "/v1.41/swarm/init"),
    post("init with a wrong type", "/v1.41/swarm/init", {"ListenAddr": 5}),
    post("init with a port of a wrong type", "/v1.41/swarm/init", init(DataPathPort=-1)),
    post("init without an address to listen on", "/v1.41/swarm/init", {}),
    post("init listening on nonsense", "/v1.41/swarm/init", init(ListenAddr="no such thing")),
    post("init listening on a port that is none", "/v1.41/swarm/init", init(ListenAddr="10.77.0.1:x")),
    post("init listening with another protocol", "/v1.41/swarm/init", init(ListenAddr="udp://10.77.0.1:1")),
    post("init advertising nonsense", "/v1.41/swarm/init", init(AdvertiseAddr="nosuch0")),
    post("init advertising zero", "/v1.41/swarm/init", init(AdvertiseAddr="0.0.0.0")),
    post("init with another name", "/v1.41/swarm/init", init(Spec={"Name": "other"})),
    post("init with a bad data path address", "/v1.41/swarm/init", init(DataPathAddr="nosuch0")),
    post("init with a data path port too low", "/v1.41/swarm/init", init(DataPathPort=80)),
    post("init with a data path port too high", "/v1.41/swarm/init", init(DataPathPort=60000)),
    post("init with a pool that is none", "/v1.41/swarm/init", init(DefaultAddrPool=["pool"])),
    post(
        "init with a pool too small",
        "/v1.41/swarm/init",
        init(DefaultAddrPool=["10.9.0.0/28"], SubnetSize=24),
    ),
    post(
        "init with subnets too small",
        "/v1.41/swarm/init",
        init(DefaultAddrPool=["10.9.0.0/16"], SubnetSize=30),
    ),
    post("init with an availability that is none", "/v1.41/swarm/init", init(Availability="busy")),
    post("join without managers", "/v1.41/swarm/join", {"ListenAddr": "10.77.0.1:2377", "JoinToken": "x"}),
    post("join without an address to listen on", "/v1.41/swarm/join", {"RemoteAddrs": ["10.77.0.1"]}),
    post(
        "join with an empty manager address",
        "/v1.41/swarm/join",
        {"ListenAddr": "10.77.0.1", "RemoteAddrs": [""]},
    ),
    post(
        "join with a token that is none",
        "/v1.41/swarm/join",
        {"ListenAddr": "10.77.0.1:2377", "RemoteAddrs": ["10.77.0.2:2377"], "JoinToken": "nonsense"},
    ),
)

INIT = post("init", "/v1.41/swarm/init", init())

DIALECT = (
    get("an unknown path", "/v1.41/nosuch"),
    get("the root", "/"),
    get("a version too new", "/v9.9/services"),
    get("a version too old", "/v1.11/services"),
    get("no version", "/services"),
    Step(name="another method", method="PUT", path="/v1.41/services"),
    Step(name="HEAD of a list", method="HEAD", path="/v1.41/services"),
    get("filters that are no JSON", "/v1.41/services?filters={bad"),
    get("filters of a wrong type", "/v1.41/services?filters=[1]"),
    get("filters of wrong values", '/v1.41/services?filters={"name":5}'),
    get("filters of a wrong set", '/v1.41/services?filters={"name":{"web":5}}'),
    get("filters in the older form", '/v1.41/services?filters={"name":["nosuch"]}'),
    get("filters in the newer form", '/v1.41/services?filters={"name":{"nosuch":true}}'),
    get("an unknown filter", '/v1.41/services?filters={"bogus":["x"]}'),
    get("an unknown filter of tasks", '/v1.41/tasks?filters={"bogus":["x"]}'),
    get("an unknown filter of nodes", '/v1.41/nodes?filters={"bogus":["x"]}'),
    get("an unknown filter of secrets", '/v1.41/secrets?filters={"bogus":["x"]}'),
    get("an unknown filter of configs", '/v1.41/configs?filters={"bogus":["x"]}'),
    get("an unknown filter of networks", '/v1.41/networks?filters={"bogus":["x"]}'),
    get("a status that is no boolean", "/v1.41/services?status=maybe"),
)

BAD_JSON = tuple(
    create(f"a body {name}", body)
    for name, body in (
        ("that is empty", b""),
        ("of blanks", b"  \n"),
        ("with an unquoted key", b"{bad}"),
        ("that breaks off", b'{"Name": "web"'),
        ("that breaks off in a string", b'{"Name": "we'),
        ("that breaks off in a literal", b"tru"),
        ("with a wrong literal", b"trux"),
        ("with a trailing comma", b'{"Name": "web",}'),
        ("without a comma", b'{"Name": "web" "Labels": {}}'),
        ("without a colon", b'{"Name" "web"}'),
        ("with a bad list", b'{"TaskTemplate": {"ContainerSpec": {"Args": ["a" "b"]}}}'),
        ("with a bad number", b'{"Mode": {"Replicated": {"Replicas": 01}}}'),
        ("with a bad fraction", b'{"Mode": {"Replicated": {"Replicas": 1.}}}'),
        ("with a bad exponent", b'{"Mode": {"Replicated": {"Replicas": 1e}}}'),
        ("with a minus alone", b'{"Mode": {"Replicated": {"Replicas": -}}}'),
        ("with a bad escape", b'{"Name": "\\q"}'),
        ("with a bad code point", b'{"Name": "\\u12x4"}'),
        ("with a control character", b'{"Name": "a\x01b"}'),
        ("with a line break in a string", b'{"Name": "a\nb"}'),
        ("that is a list", b"[]"),
        ("that is a string", b'"web"'),
        ("that is a number", b"12"),
        ("that is null", b"null"),
        ("that is nothing but an object", b"{}"),
        ("with something behind it", b'{"Name": "-bad-"} and more'),
        ("with bytes that are no text", b'{"Name": "\xff\xfe"}'),
        ("with half a surrogate pair", b'{"Name": "\\ud800"}'),
        ("nested ten thousand deep", b'{"Labels": ' + b"[" * 10_001 + b"]" * 10_001 + b"}"),
    )
)

WRONG_TYPES = tuple(
    create(f"wrong type: {name}", body)
    for name, body in (
        ("a name that is a number", {"Name": 5}),
        ("a name that is a list", {"Name": ["web"]}),
        ("a name that is a boolean", {"Name": True}),
        ("labels that are a list", {"Labels": []}),
        ("labels with numbers", {"Labels": {"a": 1}}),
        ("a template that is a string", {"TaskTemplate": "x"}),
        ("an image that is an object", {"TaskTemplate": {"ContainerSpec": {"Image": {}}}}),
        ("args that are a string", {"TaskTemplate": {"ContainerSpec": {"Args": "sleep 1"}}}),
        ("args with numbers", {"TaskTemplate": {"ContainerSpec": {"Args": ["sleep", 1]}}}),
        ("replicas that are a string", {"Mode": {"Replicated": {"Replicas": "3"}}}),
        ("negative replicas", {"Mode": {"Replicated": {"Replicas": -1}}}),
        ("replicas with a fraction", {"Mode": {"Replicated": {"Replicas": 1.5}}}),
        ("replicas with an exponent", b'{"Mode": {"Replicated": {"Replicas": 1e3}}}'),
        ("too many replicas for 64 bits", b'{"Mode": {"Replicated": {"Replicas": 18446744073709551616}}}'),
        ("a delay that is a word", {"TaskTemplate": {"RestartPolicy": {"Delay": "5s"}}}),
        ("attempts below zero", {"TaskTemplate": {"RestartPolicy": {"MaxAttempts": -1}}}),
        ("memory with a unit", {"TaskTemplate": {"Resources": {"Limits": {"MemoryBytes": "64m"}}}}),
        (
            "memory beyond 64 bits",
            b'{"TaskTemplate": {"Resources": {"Limits": {"MemoryBytes": 9223372036854775808}}}}',
        ),
        ("a port that is a string", {"EndpointSpec": {"Ports": [{"TargetPort": "80"}]}}),
        ("a port beyond 32 bits", {"EndpointSpec": {"Ports": [{"TargetPort": 4294967296}]}}),
        ("a negative port", {"EndpointSpec": {"Ports": [{"PublishedPort": -1}]}}),
        ("ports that are an object", {"EndpointSpec": {"Ports": {}}}),
        ("a mode that is a string", {"Mode": "global"}),
        ("a condition that is a number", {"TaskTemplate": {"RestartPolicy": {"Condition": 1}}}),
        ("an update order that is a number", {"UpdateConfig": {"Order": 1}}),
        ("a ratio that is a string", {"UpdateConfig": {"MaxFailureRatio": "0.1"}}),
        ("tty that is a string", {"TaskTemplate": {"ContainerSpec": {"TTY": "yes"}}}),
        ("mounts that are strings", {"TaskTemplate": {"ContainerSpec": {"Mounts": ["a:b"]}}}),
        ("a mount type that is a number", {"TaskTemplate": {"ContainerSpec": {"Mounts": [{"Type": 1}]}}}),
        (
            "a file mode below zero",
            {"TaskTemplate": {"ContainerSpec": {"Secrets": [{"File": {"Mode": -1}}]}}},
        ),
        ("init that is a number", {"TaskTemplate": {"ContainerSpec": {"Init": 1}}}),
        ("the second of two errors", {"TaskTemplate": {"ContainerSpec": {"TTY": 1, "Image": 2}}, "Name": 3}),
        ("names in another case", {"NAME": 5}),
    )
)

BAD_SPECS = tuple(
    create(f"refused: {name}", body)
    for name, body in (
        ("a name with a blank", service("a b")),
        ("a name with a dot", service("a.b")),
        ("a name that begins with a dash", service("-web")),
        ("a name of 64 characters", service("w" * 64)),
        ("a name of 64 strange characters", service("ü" * 64)),
        ("no container", {"Name": "web"}),
        ("no image", service("web", image="")),
        ("an image with capitals", service("web", image="BusyBox")),
        ("an image with a blank", service("web", image="busy box")),
        ("an image with two tags", service("web", image="busybox:1:2")),
        ("an image with a bad digest", service("web", image="busybox@sha256:abc")),
        ("an image that is an id", service("web", image="a" * 64)),
        ("an image with a quote", service("web", image='busy"box\n')),
        ("an image name too long", service("web", image="a" * 300)),
        ("two modes", service("web", Mode={"Replicated": {"Replicas": 1}, "Global": {}})),
        ("replicas beyond 63 bits", service("web", Mode={"Replicated": {"Replicas": 2**64 - 1}})),
        ("jobs beyond 63 bits", service("web", Mode={"ReplicatedJob": {"MaxConcurrent": 2**64 - 1}})),
        (
            "a job with an update config",
            service("web", Mode={"GlobalJob": {}}, UpdateConfig={"Parallelism": 1}),
        ),
        ("too little cpu", service("web", task={"Resources": {"Limits": {"NanoCPUs": 1000}}})),
        ("negative cpu", service("web", task={"Resources": {"Limits": {"NanoCPUs": -1}}})),
        ("nearly enough cpu", service("web", task={"Resources": {"Reservations": {"NanoCPUs": 999_999}}})),
        ("too little memory", service("web", task={"Resources": {"Limits": {"MemoryBytes": 1024}}})),
        ("negative memory", service("web", task={"Resources": {"Reservations": {"MemoryBytes": -5}}})),
        ("a negative restart delay", service("web", task={"RestartPolicy": {"Delay": -1}})),
        ("a negative restart window", service("web", task={"RestartPolicy": {"Window": -1}})),
        (
            "a restart condition that is none",
            service("web", task={"RestartPolicy": {"Condition": "sometimes"}}),
        ),
        ("a constraint without operator", service("web", task={"Placement": {"Constraints": ["node.role"]}})),
        ("a constraint with a bad key", service("web", task={"Placement": {"Constraints": ["!x==y"]}})),
        (
            "a constraint with a bad value",
            service("web", task={"Placement": {"Constraints": ["node.role==~"]}}),
        ),
        ("a negative update delay", service("web", UpdateConfig={"Delay": -1})),
        ("a negative monitor", service("web", UpdateConfig={"Monitor": -1})),
        ("a ratio over 1", service("web", UpdateConfig={"MaxFailureRatio": 1.5})),
        ("a negative ratio", service("web", UpdateConfig={"MaxFailureRatio": -0.5})),
        ("a failure action that is none", service("web", UpdateConfig={"FailureAction": "panic"})),
        ("an update order that is none", service("web", UpdateConfig={"Order": "upwards"})),
        ("a rollback order that is none", service("web", RollbackConfig={"Order": "upwards"})),
        ("a resolution mode that is none", service("web", EndpointSpec={"Mode": "magic"})),
        (
            "ingress ports with dnsrr",
            service(
                "web", EndpointSpec={"Mode": "dnsrr", "Ports": [{"TargetPort": 80, "PublishedPort": 80}]}
            ),
        ),
        (
            "one port twice",
            service(
                "web",
                EndpointSpec={"Ports": [{"PublishedPort": 80}, {"PublishedPort": 80, "PublishMode": "host"}]},
            ),
        ),
        (
            "a mount of a strange type",
            service("web", container={"Mounts": [{"Type": "magic", "Target": "/a"}]}),
        ),
        (
            "a propagation that is none",
            service("web", container={"Mounts": [{"Target": "/a", "BindOptions": {"Propagation": "x"}}]}),
        ),
        (
            "two mounts on one target",
            service(
                "web",
                container={"Mounts": [{"Target": "/a", "Source": "/b"}, {"Target": "/a", "Source": "/c"}]},
            ),
        ),
        ("a health interval too short", service("web", container={"Healthcheck": {"Interval": 5}})),
        ("a health timeout too short", service("web", container={"Healthcheck": {"Timeout": 5}})),
        ("a health start too short", service("web", container={"Healthcheck": {"StartPeriod": 5}})),
        ("negative health retries", service("web", container={"Healthcheck": {"Retries": -1}})),
        (
            "a secret without id",
            service("web", container={"Secrets": [{"SecretName": "s", "File": {"Name": "s"}}]}),
        ),
        (
            "a secret without target",
            service("web", container={"Secrets": [{"SecretID": "x", "SecretName": "s"}]}),
        ),
        (
            "a secret without file name",
            service("web", container={"Secrets": [{"SecretID": "x", "SecretName": "s", "File": {}}]}),
        ),
        (
            "an unknown secret",
            service(
                "web", container={"Secrets": [{"SecretID": "x", "SecretName": "s", "File": {"Name": "s"}}]}
            ),
        ),
        (
            "two unknown secrets",
            service(
                "web",
                container={
                    "Secrets": [
                        {"SecretID": "x", "SecretName": "s", "File": {"Name": "s"}},
                        {"SecretID": "y", "SecretName": "t", "File": {"Name": "t"}},
                    ]
                },
            ),
        ),
        (
            "two secrets with one target",
            service(
                "web",
                container={
                    "Secrets": [
                        {"SecretID": "x", "SecretName": "s", "File": {"Name": "f"}},
                        {"SecretID": "y", "SecretName": "t", "File": {"Name": "f"}},
                    ]
                },
            ),
        ),
        (
            "a config without target",
            service("web", container={"Configs": [{"ConfigID": "x", "ConfigName": "c"}]}),
        ),
        (
            "a config with two targets",
            service(
                "web",
                container={
                    "Configs": [{"ConfigID": "x", "ConfigName": "c", "File": {"Name": "c"}, "Runtime": {}}]
                },
            ),
        ),
        (
            "an unknown config",
            service(
                "web", container={"Configs": [{"ConfigID": "x", "ConfigName": "c", "File": {"Name": "c"}}]}
            ),
        ),
        ("an empty credential spec", service("web", container={"Privileges": {"CredentialSpec": {}}})),
        (
            "a credential spec said twice",
            service("web", container={"Privileges": {"CredentialSpec": {"File": "a", "Registry": "b"}}}),
        ),
        (
            "a credential spec said three times",
            service(
                "web",
                container={"Privileges": {"CredentialSpec": {"File": "a", "Registry": "b", "Config": "c"}}},
            ),
        ),
        ("an unknown network", service("web", task={"Networks": [{"Target": "nosuch"}]})),
        ("the ingress network", service("web", task={"Networks": [{"Target": "ingress"}]})),
        ("an unknown runtime", service("web", task={"Runtime": "magic"})),
        ("a plugin without spec", service("web", task={"Runtime": "plugin"})),
        ("an attachment", service("web", task={"Runtime": "attachment"})),
        ("a template that is none", service("web", container={"Hostname": "{{.Nosuch}}"})),
        ("a template that breaks off", service("web", container={"Env": ["A={{.Node"]})),
    )
)

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

SERVICES = (
    create(
        "a service",
        service(
            "web",
            container={"Args": ["sleep", "1"], "Env": ["A=b"], "Init": False, "DNSConfig": {}},
            task={"Resources": {"Limits": {}, "Reservations": {}}, "Placement": {}},
            Labels={"l": "1"},
            Mode={"Replicated": {"Replicas": 2}},
            EndpointSpec={"Mode": "vip"},
        ),
        keep="web",
    ),
    create("a service with the same name", service("web")),
    create("a service with the name in another case", service("WEB")),
    create(
        "a service with everything",
        service(
            "full",
            container={
                "Labels": {"a": "b"},
                "Command": ["sh"],
                "Args": ["-c", "true"],
                "Hostname": "h-{{.Task.Slot}}",
                "Env": ["X={{.Node.Hostname}}"],
                "Dir": "/tmp",
                "User": "1000:1000",
                "Groups": ["7"],
                "Privileges": {"SELinuxContext": {"Disable": True}},
                "Init": True,
                "StopSignal": "SIGINT",
                "TTY": True,
                "OpenStdin": True,
                "ReadOnly": True,
                "Mounts": [
                    {"Type": "volume", "Source": "v", "Target": "/v", "VolumeOptions": {"NoCopy": True}},
                    {
                        "Target": "/b",
                        "Source": "/etc",
                        "ReadOnly": True,
                        "BindOptions": {"NonRecursive": True},
                    },
                    {"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1024, "Mode": 448}},
                    {"Type": "bind", "Target": "/e", "Source": "/etc", "BindOptions": {}},
                ],
                "StopGracePeriod": 3 * SECOND,
                "Healthcheck": {"Test": ["CMD-SHELL", "true"], "Interval": SECOND, "Retries": 2},
                "Hosts": ["10.0.0.1 db"],
                "DNSConfig": {"Nameservers": ["10.0.0.2"], "Search": ["x"], "Options": ["ndots:1"]},
                "Secrets": [
                    {
                        "SecretID": "{s1}",
                        "SecretName": "s1",
                        "File": {"Name": "s1", "UID": "0", "GID": "0", "Mode": 292},
                    }
                ],
                "Configs": [
                    {
                        "ConfigID": "{c1}",
                        "ConfigName": "c1",
                        "File": {"Name": "/c1", "UID": "0", "GID": "0", "Mode": 292},
                    }
                ],
                "Isolation": "magic",
                "Sysctls": {"net.core.somaxconn": "10"},
                "CapabilityAdd": ["CAP_NET_ADMIN"],
                "CapabilityDrop": ["CAP_CHOWN"],
                "Ulimits": [{"Name": "nofile", "Hard": 100, "Soft": 50}],
            },
            task={
                "Resources": {
                    "Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 67_108_864, "Pids": 50},
                    "Reservations": {
                        "NanoCPUs": 1_000_000,
                        "GenericResources": [
                            {"DiscreteResourceSpec": {"Kind": "gpu", "Value": 1}},
                            {"NamedResourceSpec": {"Kind": "card", "Value": "a"}},
                        ],
                    },
                },
                "RestartPolicy": {"Condition": "on-failure", "Delay": SECOND, "Window": SECOND},
                "Placement": {
                    "Constraints": ["node.role==manager"],
                    "Preferences": [{"Spread": {"SpreadDescriptor": "node.labels.zone"}}],
                    "MaxReplicas": 2,
                    "Platforms": [{"Architecture": "amd64", "OS": "linux"}],
                },
                "Networks": [{"Target": "ov1", "Aliases": ["alias"], "DriverOpts": {"a": "b"}}],
                "LogDriver": {"Name": "json-file", "Options": {"max-size": "1m"}},
                "ForceUpdate": 3,
            },
            UpdateConfig={"Parallelism": 2, "Delay": SECOND, "MaxFailureRatio": 0.5},
            RollbackConfig={"FailureAction": "continue", "Order": "start-first"},
            EndpointSpec={
                "Ports": [
                    {"Name": "http", "TargetPort": 80, "PublishedPort": 8080},
                    {"Protocol": "udp", "TargetPort": 53, "PublishedPort": 5353, "PublishMode": "host"},
                    {"Protocol": "magic", "TargetPort": 90, "PublishMode": "magic"},
                ]
            },
        ),
        keep="full",
    ),
    get("the service with everything", "/v1.41/services/full"),
    get("the service with everything and defaults", "/v1.41/services/full?insertDefaults=true"),
    create("a global service", service("glob", Mode={"Global": {}}, task={"RestartPolicy": {}}), keep="glob"),
    get("the global service", "/v1.41/services/glob"),
    create("a job", service("job", Mode={"ReplicatedJob": {"MaxConcurrent": 2}}), keep="job"),
    get("the job", "/v1.41/services/job"),
    create("a global job", service("gjob", Mode={"GlobalJob": {}}), keep="gjob"),
    get("the global job", "/v1.41/services/gjob"),
    create(
        "a service with nulls",
        {
            "Name": "nulls",
            "Labels": None,
            "TaskTemplate": {"ContainerSpec": {"Image": IMAGE, "Env": None, "Init": None}, "Placement": None},
            "Mode": None,
            "EndpointSpec": None,
        },
        keep="nulls",
    ),
    get("the service with nulls", "/v1.41/services/nulls"),
    create(
        "a service in strange case",
        {"name": "cased", "tasktemplate": {"CONTAINERSPEC": {"image": IMAGE}}},
        keep="cased",
    ),
    get("the service in strange case", "/v1.41/services/cased"),
    create("a service with unknown fields", {**service("more"), "Bogus": 1}, keep="more"),
    create("a port that another service has", service("other", EndpointSpec=port(PublishedPort=8080))),
    create(
        "a host port that another service has",
        service("other", EndpointSpec=port(PublishedPort=8080, PublishMode="host")),
    ),
    create(
        "an ingress port that another has on its host",
        service("other", EndpointSpec=port(Protocol="udp", PublishedPort=5353)),
    ),
    create(
        "a host port that another has too",
        service("shares", EndpointSpec=port(Protocol="udp", PublishedPort=5353, PublishMode="host")),
        keep="shares",
    ),
    get("the service", "/v1.41/services/web", keep="web"),
    get("the service by its id", "/v1.41/services/{web}"),
    get("the service by the beginning of its id", "/v1.41/services/{web.prefix}"),
    get("the service by its name in another case", "/v1.41/services/WEB"),
    get("the service with defaults", "/v1.41/services/web?insertDefaults=true"),
    get("defaults that are no boolean", "/v1.41/services/web?insertDefaults=maybe"),
    get("no such service", "/v1.41/services/nosuch"),
    get("services by name", '/v1.41/services?filters={"name":["we"]}'),
    get("services by mode", '/v1.41/services?filters={"mode":["global"]}'),
    get("services by a mode that is none", '/v1.41/services?filters={"mode":["magic"]}'),
    get("services by label", '/v1.41/services?filters={"label":["l=1"]}'),
    get("services by a label without value", '/v1.41/services?filters={"label":["l"]}'),
    get("services by runtime", '/v1.41/services?filters={"runtime":["plugin"]}'),
    get("services with their status", '/v1.41/services?status=true&filters={"name":["web"]}'),
    get("tasks of no service", '/v1.41/tasks?filters={"service":["nosuch"]}'),
    get("tasks of no node", '/v1.41/tasks?filters={"node":["nosuch"]}'),
    get("tasks in no state", '/v1.41/tasks?filters={"desired-state":["dancing"]}'),
    get("tasks that should run", '/v1.41/tasks?filters={"desired-state":["running"],"service":["nulls"]}'),
    get("no such task", "/v1.41/tasks/nosuch"),
    get("logs of no service", "/v1.41/services/nosuch/logs?stdout=1"),
    get("logs of no stream", "/v1.41/services/web/logs"),
    get("logs with a strange tail", "/v1.41/services/web/logs?stdout=1&tail=some"),
    get("logs with a negative tail", "/v1.41/services/web/logs?stdout=1&tail=-1"),
    get("logs since nonsense", "/v1.41/services/web/logs?stdout=1&since=yesterday"),
    get("logs of no task", "/v1.41/tasks/nosuch/logs?stdout=1"),
)

UPDATES = (
    post("an update without version", "/v1.41/services/web/update", service("web")),
    post("an update with a strange version", "/v1.41/services/web/update?version=x", service("web")),
    post(
        "an update with a version too large",
        "/v1.41/services/web/update?version=18446744073709551616",
        service("web"),
    ),
    post("an update with a negative version", "/v1.41/services/web/update?version=-1", service("web")),
    post("a stale update", "/v1.41/services/web/update?version=1", service("web")),
    post("an update of no service", "/v1.41/services/nosuch/update?version=1", service("web")),
    post("another name", "/v1.41/services/web/update?version={web.version}", service("web9")),
    post(
        "another mode",
        "/v1.41/services/web/update?version={web.version}",
        service("web", Mode={"Global": {}}),
    ),
    post(
        "an update with a bad image",
        "/v1.41/services/web/update?version={web.version}",
        service("web", image="A"),
    ),
    post("an update with broken JSON", "/v1.41/services/web/update?version=1", b"{bad}"),
    post(
        "an update to an unknown network",
        "/v1.41/services/web/update?version=1",
        service("web", task={"Networks": [{"Target": "nosuch"}]}),
    ),
    post(
        "a rollback with nothing before",
        "/v1.41/services/web/update?version={web.version}&rollback=previous",
        service("web"),
    ),
    post(
        "a strange rollback",
        "/v1.41/services/web/update?version={web.version}&rollback=magic",
        service("web"),
    ),
    post(
        "strange credentials",
        "/v1.41/services/web/update?version={web.version}&registryAuthFrom=magic",
        service("web"),
    ),
    post(
        "credentials from nothing before",
        "/v1.41/services/web/update?version={web.version}&registryAuthFrom=previous-spec",
        service("web"),
    ),
    get("the service before an update", "/v1.41/services/web", keep="web"),
    post(
        "an update",
        "/v1.41/services/web/update?version={web.version}",
        service("web", image="busybox:2", Labels={"n": "2"}),
    ),
    post(
        "the same update again",
        "/v1.41/services/web/update?version={web.version}",
        service("web", image="busybox:2"),
    ),
    get("the service after the update", "/v1.41/services/web", keep="web"),
    post(
        "a rollback",
        "/v1.41/services/web/update?version={web.version}&rollback=previous",
        service("web", image="busybox:2"),
    ),
    get("the service after the rollback", "/v1.41/services/web", keep="web"),
    post(
        "new ports that are taken",
        "/v1.41/services/web/update?version={web.version}",
        service("web", EndpointSpec=port(PublishedPort=8080)),
    ),
)

NODES = (
    get("nodes by role", '/v1.41/nodes?filters={"role":["manager"]}'),
    get("nodes by a role that is none", '/v1.41/nodes?filters={"role":["king"]}'),
    get("nodes by membership", '/v1.41/nodes?filters={"membership":["accepted"]}'),
    get("nodes by a membership that is none", '/v1.41/nodes?filters={"membership":["gold"]}'),
    get("nodes by name", '/v1.41/nodes?filters={"name":["nosuch"]}'),
    get("no such node", "/v1.41/nodes/nosuch"),
    get("the node", "/v1.41/nodes/{node}", keep="node"),
    post(
        "a node update without version",
        "/v1.41/nodes/{node}/update",
        {"Role": "manager", "Availability": "active"},
    ),
    post(
        "a node update without role",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Availability": "active"},
    ),
    post(
        "a node update with a strange role",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Role": "king", "Availability": "active"},
    ),
    post(
        "a node update without availability",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Role": "manager"},
    ),
    post(
        "a node update with a strange availability",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Role": "manager", "Availability": "busy"},
    ),
    post(
        "a node update with wrong types",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Role": 1, "Labels": []},
    ),
    post(
        "a stale node update",
        "/v1.41/nodes/{node}/update?version=999999",
        {"Role": "manager", "Availability": "active"},
    ),
    post(
        "an update of no node",
        "/v1.41/nodes/nosuch/update?version=1",
        {"Role": "manager", "Availability": "active"},
    ),
    post(
        "the last manager's demotion",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Role": "worker", "Availability": "active"},
    ),
    get("the node before an update", "/v1.41/nodes/{node}", keep="node"),
    post(
        "a node update",
        "/v1.41/nodes/{node}/update?version={node.version}",
        {"Labels": {"zone": "a"}, "Role": "MANAGER", "Availability": "Active"},
    ),
    get("the node after the update", "/v1.41/nodes/{node}", keep="node"),
    delete("a removal of the manager", "/v1.41/nodes/{node}"),
    delete("a forced removal of the manager", "/v1.41/nodes/{node}?force=1"),
    delete("a removal of no node", "/v1.41/nodes/nosuch"),
)

SWARM = (
    get("the swarm", "/v1.41/swarm", keep="swarm"),
    get("the unlock key", "/v1.41/swarm/unlockkey"),
    post("an unlock of what is not locked", "/v1.41/swarm/unlock", {"UnlockKey": "x"}),
    post("another init", "/v1.41/swarm/init", init()),
    post(
        "a join of what has joined",
        "/v1.41/swarm/join",
        {"ListenAddr": "10.77.0.1:2377", "RemoteAddrs": ["10.77.0.2"]},
    ),
    post("a leave of the last manager", "/v1.41/swarm/leave"),
    post("a swarm update without version", "/v1.41/swarm/update", {"Name": "default"}),
    post(
        "a swarm update with another name", "/v1.41/swarm/update?version={swarm.version}", {"Name": "other"}
    ),
    post(
        "a swarm update with a short expiry",
        "/v1.41/swarm/update?version={swarm.version}",
        {"Name": "default", "CAConfig": {"NodeCertExpiry": 5}},
    ),
    post(
        "a swarm update with a negative period",
        "/v1.41/swarm/update?version={swarm.version}",
        {"Name": "default", "Dispatcher": {"HeartbeatPeriod": -5}},
    ),
    post(
        "a swarm update with a strange rotation",
        "/v1.41/swarm/update?version={swarm.version}&rotateWorkerToken=maybe",
        {"Name": "default"},
    ),
    post(
        "a swarm update with a strange history",
        "/v1.41/swarm/update?version={swarm.version}",
        {"Orchestration": {"TaskHistoryRetentionLimit": "many"}},
    ),
    post("a stale swarm update", "/v1.41/swarm/update?version=999999", {"Name": "default"}),
    get("the swarm before an update", "/v1.41/swarm", keep="swarm"),
    post(
        "a swarm update",
        "/v1.41/swarm/update?version={swarm.version}&rotateWorkerToken=true",
        {
            "Name": "default",
            "Labels": {"a": "b"},
            "Orchestration": {"TaskHistoryRetentionLimit": 3},
            "Raft": {
                "SnapshotInterval": 10000,
                "KeepOldSnapshots": 0,
                "LogEntriesForSlowFollowers": 500,
                "ElectionTick": 10,
                "HeartbeatTick": 1,
            },
            "Dispatcher": {"HeartbeatPeriod": 5 * SECOND},
            "CAConfig": {"NodeCertExpiry": 7_776_000 * SECOND},
        },
    ),
    get("the swarm after the update", "/v1.41/swarm", keep="swarm"),
)

REMOVALS = (
    delete("a secret in use", "/v1.41/secrets/s1"),
    delete("a config in use", "/v1.41/configs/c1"),
    delete("a network in use", "/v1.41/networks/ov1"),
    delete("a removal of no service", "/v1.41/services/nosuch"),
    delete("a removal", "/v1.41/services/full"),
    delete("the removal again", "/v1.41/services/full"),
    create("the freed name and port", service("full", EndpointSpec=port(PublishedPort=8080)), keep="full2"),
    delete("the freed secret", "/v1.41/secrets/s1"),
    delete("the freed config", "/v1.41/configs/c1"),
)


def _large(size: int) -> bytes:
    """A service spec that would be taken if it were not so large."""
    return (
        b'{"Name": "large", "TaskTemplate": {"ContainerSpec": {"Image": "busybox"}}, "Labels": {"x": "'
        + b"x" * size
        + b'"}}'
    )


TWINS = 17
"""So many ids, that begin with one of 16 characters, have two that begin alike."""

AMBIGUOUS = (
    *(
        create(
            f"twin {number}",
            service(f"twin{number}", Mode={"Replicated": {"Replicas": 0}}),
            keep=f"twin{number}",
        )
        for number in range(TWINS)
    ),
    get("a service by a beginning that several have", "/v1.41/services/{twins}"),
    delete("a removal by a beginning that several have", "/v1.41/services/{twins}"),
    get("a node by no word", "/v1.41/nodes/%20"),
)

LARGE = (
    create("a body of 3 MB", _large(3_000_000)),
    create("a body of 5 MB", _large(5_000_000)),
    create("a body of 100 MB", _large(100_000_000)),
)

IN_SWARM = (
    *DIALECT,
    *BAD_JSON,
    *WRONG_TYPES,
    *BAD_SPECS,
    *FILES,
    *NETWORKS,
    *SERVICES,
    *UPDATES,
    *NODES,
    *SWARM,
    *REMOVALS,
    *AMBIGUOUS,
    *LARGE,
)
"""What a manager is asked, with the node it runs on kept as ``node``."""
