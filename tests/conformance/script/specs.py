"""Services that can never work."""

from tests.conformance.script.steps import create, service

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
