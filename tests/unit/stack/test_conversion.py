"""A document as specs of services, networks, secrets and configs."""

import json
from typing import Any

import pytest

from skep.model.values.encoding import to_json
from skep.stack.compose.conversion import find_cycle, stack_of
from skep.stack.compose.document import parse
from skep.stack.compose.merging import canonical
from skep.stack.compose.reading import ProblemReport
from skep.stack.project import Stack


def read(text: str, contents: dict[tuple[str, str], bytes] | None = None) -> tuple[Stack, ProblemReport]:
    report = ProblemReport()
    return stack_of(canonical(parse(text, "f")), "shop", contents or {}, report), report


def spec(service: str, rest: str = "") -> Any:
    """The spec of one service with an image, of ``service``: the rest of its keys in flow style."""
    stack, report = read(f"services: {{web: {{image: w, {service}}}}}\n{rest}")
    assert not report.problems, [str(one) for one in report.problems]
    return json.loads(to_json(stack.services["web"].spec))


def container(service: str, rest: str = "") -> Any:
    found = spec(service, rest)["TaskTemplate"]["ContainerSpec"]
    return {key: value for key, value in found.items() if key not in ("Image", "Labels")}


NAMESPACE = {"com.docker.stack.namespace": "shop"}


def test_ports_and_names_that_differ_do_not_collide() -> None:
    _, report = read(
        "services: {v: {image: v, ports: ['80:80', '81']}, w: {image: w, ports: ['80:80/udp', '81', "
        "{target: 80, published: 80, mode: host}], networks: [a, b]}}\n"
        "networks: {a: {external: true, name: n}, b: {external: true, name: n}}"
    )
    assert not report.problems


def test_dependencies_are_a_label_by_which_the_cluster_keeps_the_order() -> None:
    stack, report = read(
        "services: {web: {image: w, depends_on: {db: {condition: service_healthy, restart: true}, "
        "gone: {required: false}, migrate: {condition: service_completed_successfully, required: false}}}, "
        "db: {image: d}, migrate: {image: m, depends_on: [db]}}"
    )
    assert not report.problems
    labels = {name: one.spec.labels.get("skep.depends-on") for name, one in stack.services.items()}
    assert labels == {
        "web": "shop_db=service_healthy+restart,shop_migrate=service_completed_successfully+optional",
        "db": None,
        "migrate": "shop_db=service_started",
    }


def test_a_service_of_nothing_but_an_image_is_as_docker_stack_makes_it() -> None:
    assert spec("") == {
        "Name": "shop_web",
        "Labels": NAMESPACE | {"com.docker.stack.image": "w"},
        "TaskTemplate": {
            "ContainerSpec": {"Image": "w", "Labels": NAMESPACE},
            "ForceUpdate": 0,
            "Networks": [{"Target": "shop_default", "Aliases": ["web"]}],
        },
        "Mode": {"Replicated": {"Replicas": 1}},
        "EndpointSpec": {"Mode": "vip"},
    }


@pytest.mark.parametrize(
    ("service", "made"),
    [
        ("command: 'a \"b c\"', entrypoint: [x]", {"Command": ["x"], "Args": ["a", "b c"]}),
        ("environment: {B: 1.10, A: true, N: }", {"Env": ["A=true", "B=1.10", "N"]}),
        (
            "cap_add: [net_admin, CAP_SYS_TIME], cap_drop: [all]",
            {"CapabilityAdd": ["CAP_NET_ADMIN", "CAP_SYS_TIME"], "CapabilityDrop": ["ALL"]},
        ),
        (
            "extra_hosts: ['a:1.2.3.4', 'b=::1'], dns: 1.1.1.1",
            {"Hosts": ["1.2.3.4 a", "::1 b"], "DNSConfig": {"Nameservers": ["1.1.1.1"]}},
        ),
        (
            "ulimits: {nofile: {soft: 1, hard: 2}, core: 0}",
            {"Ulimits": [{"Name": "core", "Soft": 0, "Hard": 0}, {"Name": "nofile", "Soft": 1, "Hard": 2}]},
        ),
        (
            "healthcheck: {test: curl x, interval: 1m30s, retries: 2}",
            {"Healthcheck": {"Test": ["CMD-SHELL", "curl x"], "Interval": 90_000_000_000, "Retries": 2}},
        ),
        ("healthcheck: {disable: true}", {"Healthcheck": {"Test": ["NONE"]}}),
        (
            "security_opt: ['no-new-privileges:true', seccomp=unconfined]",
            {
                "Privileges": {
                    "CredentialSpec": None,
                    "SELinuxContext": None,
                    "Seccomp": {"Mode": "unconfined"},
                    "NoNewPrivileges": True,
                }
            },
        ),
        (
            "security_opt: ['label:type:a_t', 'label=level:s0:c1,c2', label=user:u, label:role:r]",
            {
                "Privileges": {
                    "CredentialSpec": None,
                    "SELinuxContext": {
                        "Disable": False,
                        "User": "u",
                        "Role": "r",
                        "Type": "a_t",
                        "Level": "s0:c1,c2",
                    },
                    "NoNewPrivileges": False,
                }
            },
        ),
        (
            "stop_grace_period: 20s, init: true, user: u, working_dir: /d, hostname: h, read_only: true, tty: true",
            {
                "StopGracePeriod": 20_000_000_000,
                "Init": True,
                "User": "u",
                "Dir": "/d",
                "Hostname": "h",
                "ReadOnly": True,
                "TTY": True,
            },
        ),
        (
            "volumes: ['/a:/b:ro,rslave', {type: tmpfs, target: /t, tmpfs: {size: 1m, mode: 0700}}], tmpfs: /u:size=2m",
            {
                "Mounts": [
                    {
                        "Type": "bind",
                        "Source": "/a",
                        "Target": "/b",
                        "ReadOnly": True,
                        "BindOptions": {"Propagation": "rslave"},
                    },
                    {"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1 << 20, "Mode": 0o700}},
                    {"Type": "tmpfs", "Target": "/u", "TmpfsOptions": {"SizeBytes": 2 << 20}},
                ]
            },
        ),
    ],
)
def test_a_key_reaches_the_container(service: str, made: Any) -> None:
    assert container(service) == made


@pytest.mark.parametrize(
    ("service", "labels"),
    [
        ("privileged: true", {"skep.privileged": "true"}),
        ("devices: ['/dev/a:/dev/b:r', {source: /dev/c}]", {"skep.devices": "/dev/a:/dev/b:r,/dev/c"}),
        ("gpus: all", {"skep.gpus": "all"}),
        (
            "volumes: ['/a:/b:ro,z', '/c:/d', {type: bind, source: /e, target: /f, bind: {selinux: Z}}]",
            {"skep.relabel": "/b=z,/f=Z"},
        ),
        ("gpus: [{capabilities: [gpu], device_ids: [a, b]}]", {"skep.gpus": "device=a,b"}),
        (
            "deploy: {resources: {reservations: {devices: [{capabilities: [gpu], count: 2}]}}}",
            {"skep.gpus": "2"},
        ),
        (
            "shm_size: 64m, pid: host, ipc: host",
            {"skep.shm-size": "67108864", "skep.pid": "host", "skep.ipc": "host"},
        ),
        (
            "cpuset: 0-1, cpu_shares: 512, memswap_limit: -1",
            {"skep.cpuset-cpus": "0-1", "skep.cpu-shares": "512", "skep.memory-swap": "-1"},
        ),
        (
            "blkio_config: {weight: 300, device_read_bps: [{path: /dev/sda, rate: 1mb}]}",
            {"skep.blkio-weight": "300", "skep.device-read-bps": "/dev/sda:1mb"},
        ),
    ],
)
def test_rights_over_the_node_are_labels_of_the_container(service: str, labels: dict[str, str]) -> None:
    assert spec(service)["TaskTemplate"]["ContainerSpec"]["Labels"] == NAMESPACE | labels


@pytest.mark.parametrize(
    ("service", "ports", "labels"),
    [
        ("ports: ['80']", [("tcp", 80, 0, "ingress")], {}),
        ("ports: ['8000-8001:80-81/udp']", [("udp", 80, 8000, "ingress"), ("udp", 81, 8001, "ingress")], {}),
        (
            "ports: ['127.0.0.1:22:22']",
            [("tcp", 22, 22, "ingress")],
            {"skep.publish.22/tcp.host-ip": "127.0.0.1"},
        ),
        ("ports: ['[::1]:22:22']", [("tcp", 22, 22, "ingress")], {"skep.publish.22/tcp.host-ip": "::1"}),
        ("ports: [{target: 80, published: '90', mode: host}]", [("tcp", 80, 90, "host")], {}),
    ],
)
def test_ports_are_published(service: str, ports: list[tuple[Any, ...]], labels: dict[str, str]) -> None:
    found = spec(service)
    made = [
        (one["Protocol"], one["TargetPort"], one.get("PublishedPort", 0), one["PublishMode"])
        for one in found["EndpointSpec"]["Ports"]
    ]
    assert made == ports
    assert {name: value for name, value in found["Labels"].items() if name.startswith("skep.")} == labels


def test_the_deploy_section_reaches_the_spec() -> None:
    found = spec(
        "deploy: {replicas: 0, labels: {a: b}, endpoint_mode: dnsrr,"
        " update_config: {delay: 1s, order: start-first, failure_action: rollback},"
        " resources: {limits: {cpus: '0.5', memory: 1g, pids: 9}, reservations: {memory: 1m,"
        " generic_resources: [{discrete_resource_spec: {kind: gpu, value: 2}}]}},"
        " placement: {constraints: [node.role == worker], preferences: [{spread: node.labels.zone}],"
        " max_replicas_per_node: 2}, restart_policy: {condition: on-failure, max_attempts: 3}}"
    )
    template = found["TaskTemplate"]
    assert found["Mode"] == {"Replicated": {"Replicas": 0}}
    assert found["Labels"]["a"] == "b"
    assert found["EndpointSpec"] == {"Mode": "dnsrr"}
    assert found["UpdateConfig"] == {
        "Parallelism": 1,
        "Delay": 10**9,
        "FailureAction": "rollback",
        "MaxFailureRatio": 0.0,
        "Order": "start-first",
    }
    assert template["Resources"] == {
        "Limits": {"NanoCPUs": 500_000_000, "MemoryBytes": 1 << 30, "Pids": 9},
        "Reservations": {
            "MemoryBytes": 1 << 20,
            "GenericResources": [{"DiscreteResourceSpec": {"Kind": "gpu", "Value": 2}}],
        },
    }
    assert template["Placement"] == {
        "Constraints": ["node.role == worker"],
        "Preferences": [{"Spread": {"SpreadDescriptor": "node.labels.zone"}}],
        "MaxReplicas": 2,
    }
    assert template["RestartPolicy"] == {"Condition": "on-failure", "MaxAttempts": 3}


@pytest.mark.parametrize(
    ("word", "policy"),
    [
        ("'no'", {"Condition": "none"}),
        ("always", {"Condition": "any"}),
        ("on-failure:3", {"Condition": "on-failure", "MaxAttempts": 3}),
    ],
)
def test_restart_of_a_container_is_that_of_the_service(word: str, policy: dict[str, Any]) -> None:
    assert spec(f"restart: {word}")["TaskTemplate"]["RestartPolicy"] == policy


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (
            "dockerfile: d, target: t, network: host, shm_size: 1g",
            "--file d --target t --network host --shm-size 1g",
        ),
        ("args: {A: 1, B: }, labels: [l=m]", "--build-arg A=1 --build-arg B --label l=m"),
        ("args: [A=1, B]", "--build-arg A=1 --build-arg B"),
        ("ssh: [default, k=/k]", "--ssh default --ssh k=/k"),
        ("ssh: {default: , k: /k}", "--ssh default --ssh k=/k"),
        ("extra_hosts: ['a:1.2.3.4', 'b=::1']", "--add-host a:1.2.3.4 --add-host b:::1"),
        ("extra_hosts: ['a:host-gateway']", "--add-host a:host-gateway"),
        ("extra_hosts: {a: [1.2.3.4, 5.6.7.8]}", "--add-host a:1.2.3.4 --add-host a:5.6.7.8"),
        ("cache_from: [a], cache_to: [b], tags: [t:1]", "--cache-from a --cache-to b --tag t:1"),
        (
            "additional_contexts: {x: /y}, platforms: [linux/arm64]",
            "--build-context x=/y --platform linux/arm64",
        ),
        ("no_cache: true, pull: true", "--no-cache --pull"),
        ("no_cache: false", ""),
    ],
)
def test_a_build_has_the_options_of_docker_build(build: str, arguments: str) -> None:
    stack, report = read(f"services: {{web: {{build: {{context: /c, {build}}}}}}}")
    assert not report.problems, [str(one) for one in report.problems]
    made = stack.services["web"].build
    assert made is not None
    assert (made.context, " ".join(made.arguments)) == ("/c", arguments)


def test_content_is_in_the_names_of_secrets_and_configs() -> None:
    def names(content: bytes, label: str = "a") -> tuple[str, ...]:
        text = (
            "services: {w: {image: w, configs: [c], secrets: [s]}}\n"
            f"configs: {{c: {{file: x, labels: [{label}]}}}}\nsecrets: {{s: {{file: y}}}}"
        )
        stack, report = read(text, {("configs", "c"): content, ("secrets", "s"): content})
        assert not report.problems
        return stack.configs["c"].name, stack.secrets["s"].name

    one, other = names(b"1"), names(b"2")
    assert one == names(b"1")
    assert one[0] != other[0]
    assert one[1] != other[1]
    assert names(b"1", "b")[0] != one[0]
    assert one[0].startswith("shop_c-")
    assert one[0].rpartition("-")[2] != one[1].rpartition("-")[2]


@pytest.mark.parametrize(("section", "kib"), [("secrets", 500), ("configs", 1000)])
def test_a_secret_or_config_that_is_too_large_is_refused_before_anything_is_sent(
    section: str, kib: int
) -> None:
    text = f"services: {{w: {{image: w}}}}\n{section}: {{c: {{file: x}}}}"
    _, report = read(text, {(section, "c"): b"x" * (kib << 10)})
    assert not report.problems
    _, report = read(text, {(section, "c"): b"x" * ((kib << 10) + 1)})
    assert [str(one) for one in report.problems] == [
        f"f:2:{len(section) + 14}: {section}.c.file: it is larger than {kib} KiB"
    ]


def test_a_given_name_is_kept_and_what_is_external_is_not_made() -> None:
    text = """
services: {w: {image: w, configs: [a, b], networks: [n, m], volumes: ["v:/v", "x:/x"]}}
configs: {a: {content: c, name: mine}, b: {external: true, name: there}}
networks: {n: {external: {name: old}}, m: {driver_opts: {encrypted: ""}, attachable: true,
  ipam: {config: [{subnet: 10.9.0.0/24}]}}}
volumes: {v: {driver_opts: {type: nfs}}, x: {external: true}}
"""
    stack, report = read(text)
    assert not report.problems
    assert stack.configs["a"].name == "mine"
    assert (stack.configs["b"].name, stack.configs["b"].is_external) == ("there", True)
    assert (stack.networks["n"].name, stack.networks["n"].is_external) == ("old", True)
    body = stack.networks["m"].body
    assert (body["Options"], body["Attachable"], body["IPAM"]["Config"]) == (
        {"encrypted": ""},
        True,
        [{"Subnet": "10.9.0.0/24"}],
    )
    made = stack.services["w"].spec.task_template.container_spec
    assert made is not None
    assert [one.source for one in made.mounts] == ["shop_v", "x"]


def test_a_cluster_volume_is_named_at_the_top_of_the_file_or_by_its_group() -> None:
    text = """
services: {w: {image: w, volumes: [
  {type: cluster, source: orders, target: /o},
  {type: cluster, source: data, target: /d, read_only: true, cluster: {}},
  {type: cluster, source: "group:fast", target: /g}]}}
volumes: {orders: {external: true}, data: {}}
"""
    stack, report = read(text)
    assert not report.problems
    made = stack.services["w"].spec.task_template.container_spec
    assert made is not None
    assert [(one.type, one.source, one.target, one.read_only) for one in made.mounts] == [
        ("cluster", "orders", "/o", False),
        ("cluster", "shop_data", "/d", True),
        ("cluster", "group:fast", "/g", False),
    ]
    assert all(one.cluster_options is not None for one in made.mounts)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "services: {w: {image: w, volumes: [{type: cluster, source: v, target: /v}]}}",
            "f:1:36: services.w.volumes[0]: there is no volume v: declare it in the volumes at the top of the file",
        ),
        (
            "services: {w: {image: w, volumes: [{type: cluster, target: /v}]}}",
            "f:1:36: services.w.volumes[0]: it has no source: expected a volume, or group:NAME",
        ),
        (
            "services: {w: {image: w, volumes: ['/a:/b:nocopy']}}",
            "f:1:36: services.w.volumes[0]: nocopy concerns volumes, and this is a directory of the machine",
        ),
        (
            "services: {w: {image: w, volumes: ['v:/b:rshared']}}\nvolumes: {v: }",
            "f:1:36: services.w.volumes[0]: rshared concerns directories of the machine, and this is a volume",
        ),
        (
            "services: {w: {image: w, volumes: ['/a:/b:ro,rw']}}",
            "f:1:36: services.w.volumes[0]: 'ro,rw' is both read-only and writable",
        ),
        (
            "services: {w: {image: w, ports: ['80:80', '127.0.0.1:80:80']}}",
            "f:1:43: services.w.ports[1]: the port answers on all addresses already: it has one address",
        ),
        (
            "services: {w: {image: w, ports: ['127.0.0.1:80:80', '10.0.0.1:80:80']}}",
            "f:1:53: services.w.ports[1]: the port answers on 127.0.0.1 already: it has one address",
        ),
        (
            "services: {w: {image: w, restart: 'on-failure:²'}}",
            (
                "f:1:35: services.w.restart: 'on-failure:²' is unknown: "
                "expected no, always, unless-stopped, on-failure or on-failure:N"
            ),
        ),
        ("services: {}", "f:1:11: services: there are no services"),
        (
            "web: {image: x}",
            "f:1:1: services: there are no services: this is a file of version 1; put everything below services:",
        ),
        ("services: {w: {}}", "f:1:15: services.w.image: the service has neither image nor build"),
        (
            "servces: {}\nservices: {w: {image: w}}",
            "f:1:1: servces: unknown key: did you mean services?",
        ),
        (
            "services: {w: {image: w, imagee: x}}",
            "f:1:26: services.w.imagee: unknown key: did you mean image?",
        ),
        (
            "services: {w: {image: w, dns: [10.0.0.1, ns1]}}",
            "f:1:31: services.w.dns: expected an IP address, not 'ns1'",
        ),
        (
            "services: {w: {image: w, extra_hosts: ['a:b:c:d']}}",
            "f:1:39: services.w.extra_hosts: expected an IP address, not 'b:c:d'",
        ),
        (
            "services: {w: {image: w, extra_hosts: {a: db}}}",
            "f:1:39: services.w.extra_hosts: expected an IP address, not 'db'",
        ),
        ("services: {w: {image: [w]}}", "f:1:23: services.w.image: expected a text, not a list"),
        (
            "services: {w: {image: w, ports: ['1:2:3:4']}}",
            "f:1:34: services.w.ports[0]: expected [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL], not the text '1:2:3:4'",
        ),
        (
            "services: {w: {image: w, ports: ['80-82:80']}}",
            "f:1:34: services.w.ports[0]: '80-82:80' has ranges of different lengths",
        ),
        (
            "services: {w: {image: w, volumes: ['v:/v']}}",
            "f:1:36: services.w.volumes[0]: there is no volume v: declare it in the volumes at the top of the file",
        ),
        (
            "services: {w: {image: w, volumes: ['/a:/v', '/b:/v']}}",
            "f:1:35: services.w.volumes: two mounts have the target /v",
        ),
        (
            "services: {w: {image: w, networks: [n]}}",
            "f:1:36: services.w.networks: there is no network n: declare it in the networks at the top of the file",
        ),
        (
            "services: {w: {image: w, secrets: [s]}}",
            "f:1:36: services.w.secrets[0]: there is no secret s: declare it in the secrets at the top of the file",
        ),
        (
            "services: {w: {image: w, depends_on: [v]}}",
            "f:1:15: services.w.depends_on: w depends on v, which is not there",
        ),
        (
            "services: {w: {image: w, depends_on: [v]}, v: {image: v, depends_on: [w]}}",
            "f:1:15: services.w.depends_on: services depend on each other in a circle: w -> v -> w",
        ),
        (
            "services: {web: {image: w, depends_on: {d: {condition: service_heathy}}}, d: {image: d}}",
            (
                "f:1:56: services.web.depends_on.d.condition: 'service_heathy' is unknown: expected service_started, "
                "service_healthy or service_completed_successfully: did you mean service_healthy?"
            ),
        ),
        (
            "services: {v: {image: v, ports: ['80:80']}, w: {image: w, ports: ['80:81']}}",
            (
                "f:1:48: services.w.ports: port 80/tcp is published by v already: publish another one, or in mode "
                "host on nodes of their own"
            ),
        ),
        (
            "services: {w: {image: w}}\nconfigs: {a: {name: c, content: x}, b: {name: c, content: y}}",
            "f:2:40: configs.b: its name in the cluster is c, which a already uses: give it another name",
        ),
        (
            "services: {w: {image: w, networks: [a, b]}}\nnetworks: {a: {name: n}, b: {name: n}}",
            "f:2:29: networks.b: its name in the cluster is n, which a already uses: give it another name",
        ),
        (
            "services: {w: {image: w, deploy: {mode: global, replicas: 2}}}",
            "f:1:59: services.w.deploy.replicas: replicas can only be used with replicated or replicated-job mode",
        ),
        (
            "services: {w: {image: w, x-skep: {drain: never}}}",
            (
                "f:1:34: services.w.x-skep: invalid label skep.drain=never: "
                "expected a duration like 30s or 5m, at most 8760 h"
            ),
        ),
        (
            "services: {w: {image: w, x-skep: {priority: urgent}}}",
            "f:1:45: services.w.x-skep.priority: expected a whole number, not the text 'urgent'",
        ),
        (
            "services: {w: {image: w, x-skep: {priority: 1001}}}",
            "f:1:45: services.w.x-skep.priority: 1001 is out of range: expected -1000 to 1000",
        ),
        (
            "services: {w: {image: w, scale: 2, deploy: {replicas: 3}}}",
            "f:1:33: services.w.scale: deploy.replicas says 3",
        ),
        (
            "services: {w: {image: w, deploy: {mode: global-job, update_config: {delay: 1s}}}}",
            "f:1:68: services.w.deploy.update_config: a job has no updates: its tasks end",
        ),
        (
            "services: {w: {image: w, x-skep: {cron: '@daily'}}}",
            (
                "f:1:41: services.w.x-skep.cron: label skep.cron is for jobs: "
                "expected mode replicated-job or global-job, the service is replicated"
            ),
        ),
        (
            "services: {w: {image: w, deploy: {mode: global-job}, x-skep: {cron: '0 25 * * *'}}}",
            "f:1:69: services.w.x-skep.cron: invalid label skep.cron=0 25 * * *: its hour (0 to 23) is invalid",
        ),
        (
            "services: {w: {image: w, deploy: {mode: global-job},\n x-skep: {job-ttl: 1h, cron: '@daily'}}}",
            (
                "f:2:30: services.w.x-skep.cron: labels skep.cron and skep.job-ttl cannot be used together: a job with "
                "a schedule is kept for its next run"
            ),
        ),
        (
            "services: {w: {image: w, deploy: {mode: global-job},\n x-skep: {schedule: '@daily'}}}",
            "f:2:11: services.w.x-skep.schedule: unknown key: did you mean cron?",
        ),
        (
            "services: {w: {image: w, deploy: {mode: global-job},\n x-skep: {cron: {schedule: '@daily', zone: UTC}}}}",
            "f:2:38: services.w.x-skep.cron.zone: unknown key",
        ),
        (
            "services: {w: {image: w, deploy: {labels: {skep.cron: '@daily'}}}}",
            (
                "f:1:34: services.w.deploy: label skep.cron is for jobs: "
                "expected mode replicated-job or global-job, the service is replicated"
            ),
        ),
        (
            "services: {w: {image: w, userns_mode: host}}",
            (
                "f:1:39: services.w.userns_mode: a service cannot choose it: the node's userns-remap applies to all "
                "its tasks"
            ),
        ),
        (
            "services: {w: {image: w}}\nsecrets: {s: {content: x}}",
            "f:2:24: secrets.s.content: a secret's value does not belong in the file: use file or environment",
        ),
        (
            "services: {w: {image: w}}\nsecrets: {s: {driver: vault}}",
            "f:2:23: secrets.s.driver: the data cannot come from a driver: use file or environment",
        ),
        (
            "services: {w: {image: w}}\nnetworks: {n: {external: true, driver: overlay}}",
            'f:2:40: networks.n.driver: conflicting parameters "external" and "driver"',
        ),
        (
            "services: {w: {image: w}}\nconfigs: {c: {content: x, environment: Y}}",
            "f:2:40: configs.c.environment: expected one of file, content and environment, not content and environment",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, problem: str) -> None:
    _, report = read(text)
    assert [str(one) for one in report.problems] == [problem]


def test_what_has_no_effect_is_said() -> None:
    _, report = read(
        "services: {w: {image: w, expose: ['1'], develop: {watch: []}, links: [v]}, v: {image: v}}"
    )
    assert not report.problems
    assert [one.path for one in report.warnings] == ["services.w.develop", "services.w.expose"]


def test_a_circle_is_found_wherever_it_begins() -> None:
    assert find_cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    assert find_cycle({str(n): [str(n + 1)] for n in range(5000)}) == []


@pytest.mark.parametrize(
    ("text", "mode"), [("0400", 0o400), ("'0400'", 0o400), ("'400'", 0o400), ("256", 0o400)]
)
def test_the_mode_of_a_secret_is_octal_in_quotes_too(text: str, mode: int) -> None:
    (found,) = container(f"secrets: [{{source: s, mode: {text}}}]", "secrets: {s: {external: true}}")[
        "Secrets"
    ]
    assert found["File"]["Mode"] == mode
