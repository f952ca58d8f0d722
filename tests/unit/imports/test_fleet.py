"""fleet's units as stack files."""

from typing import Any

import pytest

from skep.errors import InvalidArgument
from skep.imports.document import read_back
from skep.imports.fleet import imported, unit_of
from skep.manager.control.validation.service_rules import check_service_spec
from skep.model.permissions.processes import is_process

APACHE = """
[Unit]
Description=My Apache Frontend
After=docker.service db.service
Requires=docker.service

[Service]
TimeoutStartSec=0
User=core
ExecStartPre=-/usr/bin/docker kill apache-%i
ExecStartPre=-/usr/bin/docker rm apache-%i
ExecStartPre=/usr/bin/docker pull coreos/apache
ExecStart=/usr/bin/docker run -rm --name apache-%i -p 80:80 -e N=%i -e 'PRICE=5$' --link db:db \\
    -v data:/data -it coreos/apache /usr/sbin/apache2ctl -D FOREGROUND
ExecStop=/usr/bin/docker stop -t 5 apache-%i
Restart=always
RestartSec=10s

[X-Fleet]
Conflicts=apache@*.service
MachineMetadata="region=us-east-1" "diskType=SSD"
"""
DB = """
[Service]
ExecStart=/usr/bin/docker run --name db --net=host postgres
[X-Fleet]
Global=true
"""


def the_service(unit: str, name: str = "a.service") -> tuple[dict[str, Any], list[str]]:
    made = imported({name: unit}, "shop")
    (entry,) = made.document["services"].values()
    return entry, [str(one) for one in made.notes]


def test_instances_of_a_template_are_the_replicas_of_a_service() -> None:
    made = imported({"apache@1.service": APACHE, "apache@2.service": APACHE, "db.service": DB}, "shop")
    assert made.document["services"]["apache"] == {
        "image": "coreos/apache",
        "command": ["/usr/sbin/apache2ctl", "-D", "FOREGROUND"],
        "environment": ["N={{.Task.Slot}}", "PRICE=5$$"],
        "ports": ["80:80"],
        "volumes": ["data:/data"],
        "stdin_open": True,
        "tty": True,
        "stop_grace_period": "5s",
        "depends_on": ["db"],
        "deploy": {
            "replicas": 2,
            "restart_policy": {"condition": "any", "delay": "10s"},
            "placement": {
                "max_replicas_per_node": 1,
                "constraints": ["node.labels.region==us-east-1", "node.labels.diskType==SSD"],
            },
        },
    }
    assert made.document["services"]["db"] == {
        "image": "postgres",
        "network_mode": "host",
        "deploy": {"mode": "global", "restart_policy": {"condition": "none"}},
    }
    assert made.document["volumes"] == {"data": None}
    assert [str(one) for one in made.notes] == [
        "services.apache: environment: the container gets 'PRICE=5$' unchanged: systemd would replace its variables"
    ]
    stack, report = read_back(made.document)
    assert not report.problems
    assert stack.services["apache"].spec.task_template.container_spec is not None
    assert "PRICE=5$" in stack.services["apache"].spec.task_template.container_spec.env


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ("[X-Fleet]\nMachineOf=db.service", "MachineOf=db.service: dropped"),
        ("[X-Fleet]\nMachineID=abc", "MachineID: dropped"),
        ("[X-Fleet]\nGlobal=true\nMachineOf=a.service", "MachineOf=a.service: dropped: a global unit"),
        ("[X-Fleet]\nGlobal=true\nConflicts=a.service", "Conflicts=a.service: dropped: a global unit"),
        ("[X-Fleet]\nConflicts=other.service", "Conflicts=other.service: dropped"),
        ("[X-Fleet]\nFuture=x", "[X-Fleet] Future: not known, dropped"),
        ("[Service]\nExecStartPre=/bin/etcdctl set x y", "ExecStartPre: dropped"),
        ("[Service]\nWatchdogSec=3", "[Service] WatchdogSec: dropped"),
        ("[Unit]\nAfter=gone.service", "After: dropped: gone.service is not among the units"),
        ("[Service]\nRestart=sometimes", "Restart: dropped"),
        ("[Unit]\nOnFailure=b.service", "[Unit] OnFailure: dropped"),
        ("[Odd]\nA=b", "[Odd]: not known, dropped"),
    ],
)
def test_what_a_cluster_cannot_do_is_named(setting: str, note: str) -> None:
    _, notes = the_service(f"[Service]\nExecStart=/usr/bin/docker run busybox\n{setting}\n")
    assert [one for one in notes if one.startswith(f"services.a: {note}")], notes


def test_options_of_docker_run_are_keys_of_the_service() -> None:
    entry, notes = the_service(
        "[Service]\nExecStart=docker run -dp 80:80 -e=A=1 -m 1g --ulimit nofile=1:2 --log-driver syslog "
        "--log-opt a=b --stop-timeout 3 --net front --mystery x --disable-content-trust "
        "--entrypoint /e busybox\nType=oneshot\n"
    )
    assert entry == {
        "image": "busybox",
        "ports": ["80:80"],
        "environment": ["A=1"],
        "mem_limit": "1g",
        "ulimits": {"nofile": {"soft": 1, "hard": 2}},
        "logging": {"driver": "syslog", "options": {"a": "b"}},
        "stop_grace_period": "3s",
        "networks": ["front"],
        "entrypoint": "/e",
        "deploy": {"mode": "replicated-job", "restart_policy": {"condition": "none"}},
    }
    assert notes == [
        f"services.a: ExecStart --{name}: dropped: --{name} has no key in a stack file"
        for name in ("mystery", "disable-content-trust")
    ]


@pytest.mark.parametrize(
    ("unit", "error"),
    [
        ("[Service]\nExecStart=/bin/sleep 3", r"a\.service: ExecStart does not begin with docker run"),
        ("[Service]\n", "expected one ExecStart"),
        ("[Service]\nExecStart=docker run", "names no image"),
        ("[Service]\nExecStart=docker run -Z x", "has no option -Z"),
        ("[Service]\nExecStart=docker run --name", "--name needs a value"),
        ("[Service]\nExecStart=docker run 'x", "No closing quotation"),
        ("nonsense", r"a\.service:1: expected \[SECTION\] or KEY=VALUE, not 'nonsense'"),
    ],
)
def test_what_is_no_unit_of_a_container_is_refused(unit: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        imported({"a.service": unit}, "shop")


def test_units_that_are_no_services_or_differ_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"a\.timer: only units of services"):
        imported({"a.timer": DB}, "shop")
    with pytest.raises(InvalidArgument, match="units of one template differ"):
        imported({"a@1.service": DB, "a@2.service": APACHE}, "shop")


def test_a_unit_is_read_as_systemd_reads_it() -> None:
    unit = unit_of("# a\n[S]\nA=1\nA=2\nB=x \\\n  y\n; b\nC=1\nC=\n", "u")
    assert unit.all("S", "A") == ("1", "2")
    assert unit.last("S", "B") == "x    y" or unit.last("S", "B").split() == ["x", "y"]
    assert unit.all("S", "C") == ()


def test_a_variable_without_a_value_gets_that_of_the_unit() -> None:
    unit = (
        "[Service]\nEnvironment=WORD=x\n"
        "ExecStart=/usr/bin/docker run -e WORD -e OTHER -e WORD=y -e A=1 busybox"
    )
    made = imported({"a.service": unit}, "s")
    assert made.document["services"]["a"]["environment"] == ["WORD=x", "OTHER", "WORD=y", "A=1"]
    (note,) = map(str, made.notes)
    assert note == (
        "services.a: ExecStart --env: OTHER has no value here: each deploy uses the value in its own environment"
    )


def placed(x_fleet: str, **others: str) -> tuple[dict[str, Any], list[str]]:
    """Return the entry of ``web.service`` beside ``others``, and all notes."""
    texts = {
        name: f"[Service]\nExecStart=docker run busybox\n[X-Fleet]\n{text}" for name, text in others.items()
    }
    web = f"[Service]\nExecStart=docker run busybox\n[X-Fleet]\n{x_fleet}"
    made = imported({"web.service": web, **{f"{name}.service": text for name, text in texts.items()}}, "shop")
    assert read_back(made.document)[1].problems == []
    return made.document["services"]["web"], [str(one) for one in made.notes]


def test_a_machine_has_every_key_of_the_metadata_with_one_of_its_values() -> None:
    entry, notes = placed(
        'MachineMetadata="disk=ssd" "region=us-east-1"\nMachineMetadata=region=us-west-1\nMachineMetadata=region=eu'
    )
    assert entry["deploy"]["placement"] == {
        "constraints": ["node.labels.disk==ssd", "node.labels.region in (us-east-1, us-west-1, eu)"]
    }
    assert notes == []


@pytest.mark.parametrize("setting", ["MachineOf=db.service", "X-ConditionMachineOf=db.service"])
def test_a_unit_runs_on_the_machine_of_another_one(setting: str) -> None:
    entry, notes = placed(setting, db="")
    assert entry["x-skep"] == {"affinity": "db"}
    assert notes == []


def test_a_unit_runs_apart_from_those_with_which_it_conflicts() -> None:
    entry, notes = placed(
        "Conflicts=d?.service\nX-Conflicts=cache*\nConflicts=gone@*.service", db="", cache="", mail=""
    )
    assert entry["x-skep"] == {"anti-affinity": "db,cache"}
    assert "placement" not in entry["deploy"]
    assert notes == ["services.web: Conflicts=gone@*.service: dropped: none of the units has such a name"]


def test_a_unit_that_conflicts_with_every_unit_has_its_machine_to_itself() -> None:
    entry, notes = placed("Conflicts=*", db="")
    assert entry["x-skep"] == {"anti-affinity": "db"}
    assert entry["deploy"]["placement"] == {"max_replicas_per_node": 1}
    assert notes == []


def test_a_specifier_in_a_rule_of_placement_is_the_units_name() -> None:
    units = {
        "web@1.service": "[Service]\nExecStart=docker run busybox\n[X-Fleet]\nMachineOf=%p-data@%i.service",
        "web-data@1.service": "[Service]\nExecStart=docker run busybox",
        "web-data@2.service": "[Service]\nExecStart=docker run busybox",
    }
    made = imported(units, "shop")
    assert made.document["services"]["web"]["x-skep"] == {"affinity": "web-data"}
    (note,) = map(str, made.notes)
    assert note == (
        "services.web: MachineOf=web-data@1.service: "
        "tasks run on nodes with any task of web-data, not with one instance"
    )


def test_the_labels_of_the_stack_name_its_services() -> None:
    unit = "[Service]\nExecStart=docker run busybox\n[X-Fleet]\n"
    made = imported(
        {
            "web.service": f"{unit}MachineOf=db.service\nConflicts=mail.service",
            "db.service": unit,
            "mail.service": unit,
        },
        "shop",
    )
    stack, _ = read_back(made.document)
    labels = stack.services["web"].spec.labels
    assert (labels["skep.affinity"], labels["skep.anti-affinity"]) == ("shop_db", "shop_mail")


FILES = """
[Service]
User=www-data
WorkingDirectory=/srv/www
ExecStart=/usr/bin/python3 -m http.server $PORT
Environment=PORT=8080
KillSignal=SIGINT
TimeoutStopSec=5
MemoryMax=64M
CPUQuota=50%
TasksMax=20
LimitNOFILE=1024:infinity
ReadOnlyPaths=/srv/shared -/srv/www
StateDirectory=files
RuntimeDirectory=files
PrivateTmp=yes
ProtectSystem=strict
Restart=always
"""


def a_process(unit: str) -> tuple[dict[str, Any], list[str]]:
    made = imported({"files.service": unit}, "shop", has_processes=True)
    stack, report = read_back(made.document)
    assert report.problems == []
    spec = stack.services["files"].spec
    assert is_process(spec.task_template.container_spec)
    check_service_spec(spec)
    return made.document["services"]["files"], [str(one) for one in made.notes]


def test_a_unit_of_a_plain_program_becomes_a_process_on_request() -> None:
    entry, notes = a_process(FILES)
    assert entry == {
        "image": "scratch",
        "command": ["/usr/bin/python3", "-m", "http.server", "$$PORT"],
        "labels": {"skep.executor": "process"},
        "network_mode": "host",
        "user": "www-data",
        "working_dir": "/srv/www",
        "stop_signal": "SIGINT",
        "volumes": [
            "/srv/www:/srv/www:ro",
            "/srv/shared:/srv/shared:ro",
            "/var/lib/files:/var/lib/files",
        ],
        "tmpfs": ["/run/files"],
        "mem_limit": "64m",
        "cpus": "0.5",
        "pids_limit": 20,
        "ulimits": {"nofile": {"soft": 1024, "hard": -1}},
        "environment": ["PORT=8080"],
        "stop_grace_period": "5s",
        "deploy": {"restart_policy": {"condition": "any"}},
    }
    assert [note.partition(": ")[2].partition(": ")[0] for note in notes] == [
        "ExecStart",
        "StateDirectory",
        "command",
    ]
    made = imported({"files.service": FILES, "db.service": DB}, "shop", has_processes=True)
    assert made.document["services"]["db"]["image"] == "postgres", "a container stays one"


def test_settings_that_a_process_cannot_have_are_named() -> None:
    entry, notes = a_process(
        "[Service]\nUser=root\nGroup=adm\nExecStart=-/opt/app/run --config /etc/app\nWorkingDirectory=/opt/app\n"
        "MemoryMax=10%\nStandardOutput=null\nBindPaths=/srv/a:/data:rbind\nReadOnlyPaths=/etc/app\n"
        "ExecStartPre=/bin/mkdir /x\nSupplementaryGroups=audio video\n"
    )
    assert entry["command"] == ["/opt/app/run", "--config", "/etc/app"]
    assert (entry["user"], entry["group_add"]) == ("65534:adm", ["audio", "video"])
    assert (entry["working_dir"], entry["volumes"]) == ("/opt/app", ["/srv/a:/data"])
    assert [note.removeprefix("services.files: ").partition(":")[0] for note in notes] == [
        "ExecStart",
        "User",
        "MemoryMax",
        "ExecStartPre",
        "[Service] StandardOutput",
    ]


@pytest.mark.parametrize(
    ("setting", "error"),
    [("Type=forking", "stay in the foreground"), ("LimitNOFILE=many", "LimitNOFILE=many: expected a number")],
)
def test_a_unit_that_cannot_be_a_process_is_refused(setting: str, error: str) -> None:
    with pytest.raises(InvalidArgument, match=error):
        a_process(f"[Service]\nExecStart=/bin/a\n{setting}")


def test_a_shell_command_of_a_unit_stays_one() -> None:
    entry, _ = a_process("[Service]\nExecStart=/bin/sh -c 'while true; do date; sleep 5; done'")
    assert entry["command"] == ["/bin/sh", "-c", "while true; do date; sleep 5; done"]


def test_a_unit_waits_for_no_sidekick_that_starts_after_it() -> None:
    run = "[Service]\nExecStart=/usr/bin/docker run --name {0} {0}\n"
    made = imported(
        {
            "app@1.service": "[Unit]\nWants=announce@%i.service\nRequires=db.service\n" + run.format("app"),
            "announce@1.service": "[Unit]\nBindsTo=app@%i.service\nAfter=app@%i.service\n"
            + run.format("announce"),
            "db.service": run.format("db"),
        },
        "shop",
    )
    services = made.document["services"]
    assert {name: one.get("depends_on") for name, one in services.items()} == {
        "app": ["db"],
        "announce": ["app"],
        "db": None,
    }
    assert not [note for note in made.notes if "circle" in str(note)]
