"""The talks' larger stacks, by the docker command: logs of every node collected, RabbitMQ behind HAProxy under load."""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.machines.lab import database_images, efk_images, shop_images
from tests.support.machines.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    nodes_by_name,
    remove_stacks,
    running,
    wait_running,
    wait_until,
)
from tests.support.machines.stand_ins import load
from tests.support.machines.talks import deploy, fetched

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

EFK = """\
version: "3.8"
services:
  elasticsearch:
    image: elasticsearch:7.17.0
    environment:
      - discovery.type=single-node
    configs: [{source: elasticsearch, target: /etc/rsyslog.conf}]
    volumes:
      - esdata:/usr/share/elasticsearch/data
    healthcheck: {test: wget -q -O /dev/null http://127.0.0.1:9200/index, interval: 1s, retries: 30}
    networks: [efk]
    deploy:
      resources: {reservations: {memory: 16M}}
      placement:
        constraints: [node.role == manager]
  fluentd:
    image: fluent/fluentd:v1.14
    configs: [{source: fluentd, target: /etc/rsyslog.conf}]
    ports:
      - "24224:24224"
    networks: [efk]
    deploy:
      mode: global
  filebeat:
    image: elastic/filebeat:7.17.0
    user: root
    hostname: "{{.Node.Hostname}}"
    labels:
      skep.api: inspect
    volumes:
      - /var/run/docker.sock:/var/run/docker.sock:ro
    networks: [efk]
    deploy:
      mode: global
  kibana:
    image: kibana:7.17.0
    environment:
      ELASTICSEARCH_HOSTS: http://elasticsearch:9200
    ports:
      - "5601:5601"
    networks: [efk]
  app:
    image: busybox:1
    command: sh -c 'i=0; while sleep 0.2; do echo "request $$i"; i=$$((i+1)); done'
    logging:
      driver: syslog
      options:
        syslog-address: tcp://127.0.0.1:24224
        syslog-format: rfc5424
        tag: "{{.Name}}"
    deploy:
      mode: global
  batch:
    image: busybox:1
    command: sh -c 'i=0; while sleep 0.2; do echo "report $$i"; i=$$((i+1)); done'
    deploy:
      mode: global
networks:
  efk:
volumes:
  esdata:
configs:
  elasticsearch:
    file: ./elasticsearch.conf
  fluentd:
    file: ./fluentd.conf
    template_driver: golang
"""
ELASTICSEARCH = """\
module(load="imtcp")
input(type="imtcp" port="9300")
template(name="line" type="string" string="%hostname% %app-name% %msg%\\n")
action(type="omfile" file="/usr/share/elasticsearch/data/index" template="line" asyncWriting="off")
"""
FLUENTD = """\
module(load="imtcp")
input(type="imtcp" port="24224")
template(name="shipped" type="string" string="<14>1 - {{.Node.Hostname}} %app-name% - - - %msg%\\n")
action(type="omfwd" target="elasticsearch" port="9300" protocol="tcp" template="shipped"
       queue.type="LinkedList" action.resumeRetryCount="-1" action.resumeInterval="1")
"""
SHIPPED = ("fluentd", "filebeat", "app", "batch")
"""One on each node."""

DATABASE = """\
version: "3.8"
services:
  store:
    image: postgres:15
    secrets: [password]
    volumes: ["rows:/data"]
    networks: [rows]
    stop_signal: SIGINT
    deploy: {placement: {constraints: [node.role == manager]}}
  shipper:
    image: rsyslog:8
    secrets: [password]
    configs: [{source: shipper, target: /etc/rsyslog.conf}]
    ports: [{target: 514, published: 5514, mode: host}]
    networks: [rows]
    deploy: {mode: global}
  app:
    image: busybox:1
    command: sh -c 'i=0; while sleep 0.2; do echo "it is request $$i"; i=$$((i+1)); done'
    stop_grace_period: 1s
    logging:
      driver: syslog
      options: {syslog-address: "tcp://127.0.0.1:5514", syslog-format: rfc5424, tag: "{{.Name}}"}
    deploy: {replicas: 4, placement: {max_replicas_per_node: 2}}
networks: {rows: {}}
volumes: {rows: {}}
secrets:
  password: {file: ./password}
configs:
  shipper: {file: ./shipper.conf, template_driver: golang}
"""
TABLES = "create table lines (node text, task text, text text);\n"
SHIPPER = """\
module(load="imtcp")
module(load="ompgsql")
input(type="imtcp" port="514")
template(name="row" type="string" option.stdsql="on"
         string="insert into lines values ('{{.Node.Hostname}}', '%app-name%', '%msg%')")
action(type="ompgsql" server="store" db="postgres" user="postgres" pass="{{secret "password"}}" template="row"
       queue.type="LinkedList" action.resumeRetryCount="-1" action.resumeInterval="1")
"""

RABBITS = """\
version: "3.8"
x-rabbit: &rabbit
  image: rabbitmq:3-management
  environment:
    RABBITMQ_CONFIG_FILE: /etc/rabbitmq/rabbitmq
  configs: [{source: rabbitmq, target: /etc/rabbitmq/rabbitmq.conf}]
  secrets: [{source: cookie, target: cookie, mode: 0400}]
  networks: [rabbits]
services:
  rabbit1:
    <<: *rabbit
    hostname: rabbit1
    volumes: [rabbit1:/var/lib/rabbitmq]
    deploy: {placement: {constraints: [node.hostname == NODE1]}}
  rabbit2:
    <<: *rabbit
    hostname: rabbit2
    volumes: [rabbit2:/var/lib/rabbitmq]
    deploy: {placement: {constraints: [node.hostname == NODE2]}}
  rabbit3:
    <<: *rabbit
    hostname: rabbit3
    volumes: [rabbit3:/var/lib/rabbitmq]
    deploy: {placement: {constraints: [node.hostname == NODE3]}}
  haproxy:
    image: haproxy:2.6
    configs: [{source: haproxy, target: /usr/local/etc/haproxy/haproxy.cfg}]
    ports: ["5672:5672"]
    networks: [rabbits, apps]
  orders:
    image: shop/orders-python
    ports: ["5000:5000"]
    networks: [apps]
    deploy:
      replicas: 2
      labels: {skep.drain: 3s}
  invoices:
    image: shop/invoices-spring
    ports: ["8080:8080"]
    networks: [apps, rabbits]
  clients:
    image: shop/clients
    networks: [apps]
    deploy: {replicas: 2}
networks: {rabbits: {}, apps: {}}
volumes: {rabbit1: {}, rabbit2: {}, rabbit3: {}}
configs:
  rabbitmq: {file: ./rabbitmq.conf}
  haproxy: {file: ./haproxy.cfg}
secrets:
  cookie: {file: ./cookie}
"""
RABBITMQ = """\
loopback_users = none
cluster_formation.peer_discovery_backend = classic_config
cluster_formation.classic_config.nodes.1 = rabbit@rabbit1
cluster_formation.classic_config.nodes.2 = rabbit@rabbit2
cluster_formation.classic_config.nodes.3 = rabbit@rabbit3
"""
HAPROXY = """\
resolvers docker
    nameserver dns 127.0.0.11:53
    hold valid 1s
defaults
    mode tcp
    timeout connect 2s
    timeout client 10m
    timeout server 10m
listen amqp
    bind :5672
    balance roundrobin
    default-server check inter 500ms on-marked-down shutdown-sessions resolvers docker init-addr none
    server rabbit1 rabbit1:5672
    server rabbit2 rabbit2:5672
    server rabbit3 rabbit3:5672
"""
CLUSTER_MEMBERS = """\
HOME=/var/lib/rabbitmq /usr/lib/erlang/bin/erl -noinput -hidden -sname look$$ -eval "
    Others = rpc:call('rabbit@$(hostname)', erlang, nodes, []),
    [io:format(\\"~s~n\\", [Name]) || Name <- ['rabbit@$(hostname)' | Others]], halt()."
"""


@pytest.fixture(scope="module")
def four() -> Iterator[TestCluster]:
    with a_playground("larger", managers=1, workers=3) as playground:
        yield playground


@pytest.fixture
def m1(four: TestCluster) -> Iterator[TestNode]:
    node = four.node("m1")
    yield node
    remove_stacks(node)


def inside(node: TestNode, service: str, *command: str) -> str:
    (id,) = container_pids(node, service)
    return node.docker("exec", id, *command).stdout


def published(node: TestNode, rest: str) -> str:
    """What a machine's own client gets from a published port."""
    where = f"--net={node.description['netns']}"
    command = ["nsenter", where, "busybox", "wget", "-q", "-O", "-", f"http://127.0.0.1:{rest}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def node_of(cluster: TestCluster, service: str) -> TestNode:
    return next(node for node in cluster.nodes() if container_pids(node, service))


def test_logs_of_every_node_are_collected(four: TestCluster, m1: TestNode, tmp_path: Path) -> None:
    """By a log driver that sends to a shipper, and by a shipper that reads the API's socket."""
    load(m1, tmp_path, *efk_images())
    (tmp_path / "elasticsearch.conf").write_text(ELASTICSEARCH)
    (tmp_path / "fluentd.conf").write_text(FLUENTD)
    subprocess.run([SKEP, "--host", m1.socket, "cluster", "allow", "api-inspect"], check=True, timeout=60)
    deploy(m1, tmp_path, "efk", EFK)
    for name, count in {"elasticsearch": 1, "kibana": 1, **dict.fromkeys(SHIPPED, 4)}.items():
        wait_running(m1, f"efk_{name}", count, 120)
    kibana = node_of(four, "efk_kibana")

    def found(word: str) -> list[list[str]]:
        lines = fetched(kibana, "efk_kibana", f"http://127.0.0.1:5601/cgi-bin/search?{word}").splitlines()
        return [line.split() for line in lines]

    def numbers(word: str, origin: str) -> set[int]:
        return {int(line[-1]) for line in found(word) if line[1] == origin}

    names = {node.name for node in four.nodes()}
    tags = {}
    for node in four.nodes():
        ((app,), (batch,)) = (containers(node, f"efk_{name}") for name in ("app", "batch"))
        tags[node.name] = app["Names"][0].removeprefix("/")
        for word, origin in (("request", tags[node.name]), ("report", batch["Id"])):
            wait_until(
                lambda word=word, origin=origin: len(numbers(word, origin)) > 5, f"{word}s of {node.name}", 60
            )
        assert {line[0] for line in found("report") if line[1] == batch["Id"]} == {node.name}
    assert {line[0] for line in found("request")} <= names, (
        "which shippers they came by: the port is the mesh's"
    )
    shown = m1.docker("service", "ls", "--format", "{{.Name}} {{.Replicas}} {{.Ports}}").stdout.splitlines()
    assert "efk_fluentd 4/4 *:24224->24224/tcp" in shown
    assert "efk_filebeat 4/4 " in shown

    tag = tags["w1"]
    before = max(numbers("request", tag))
    killed = {task["ID"] for task in running(m1, "efk_fluentd")}
    for node in four.nodes():  # the driver finds none, on whatever node
        for id in container_pids(node, "efk_fluentd"):
            node.docker("kill", id)
    wait_until(
        lambda: len(new := running(m1, "efk_fluentd")) == 4 and not killed & {task["ID"] for task in new},
        "other shippers run",
        60,
    )
    wait_until(lambda: max(numbers("request", tag)) > before + 50, "what follows is collected", 60)
    lost = set(range(before + 50)) - numbers("request", tag)
    assert len(lost) < 20, f"what was written while no shipper ran is sent afterwards: {sorted(lost)}"


def test_logs_of_every_node_are_rows_of_a_database(four: TestCluster, m1: TestNode, tmp_path: Path) -> None:
    """Each node has a shipper for its own tasks.  Tasks come and go, and the database is killed meanwhile."""
    load(m1, tmp_path, *database_images(TABLES))
    (tmp_path / "shipper.conf").write_text(SHIPPER)
    (tmp_path / "password").write_text("secret")
    deploy(m1, tmp_path, "logs", DATABASE)
    wait_running(m1, "logs_store", 1, 120)
    wait_running(m1, "logs_shipper", 4, 120)
    host_names = {node["ID"]: name for name, node in nodes_by_name(m1).items()}

    def tasks() -> dict[str, str]:
        """Name of each running task -> its node."""
        return {
            f"logs_app.{task['Slot']}.{task['ID']}": host_names[task["NodeID"]]
            for task in running(m1, "logs_app")
        }

    def rows() -> dict[str, list[tuple[str, int]]]:
        """Name of each task that has rows -> node and number of each."""
        query = ("psql", "-h", "/tmp", "-U", "postgres", "-Atc", "select task, node, text from lines")
        found: dict[str, list[tuple[str, int]]] = {}
        for line in psql(m1, *query).splitlines():
            task, node, text = line.split("|")
            found.setdefault(task, []).append((node, int(text.removeprefix("it is request"))))
        return found

    def arrive(names: Mapping[str, str], further: int) -> bool:
        """Return whether each task has ``further`` rows by the shipper of its node."""
        found = rows()
        return all(found.get(name, []).count((node, further)) == 1 for name, node in names.items())

    wait_running(m1, "logs_app", 4, 60)
    first = tasks()
    assert sorted(first.values()) == ["m1", "w1", "w2", "w3"]
    wait_until(lambda: arrive(first, 20), "rows of every node's task are in the database", 120)

    m1.docker("service", "scale", "--detach", "logs_app=8")
    wait_running(m1, "logs_app", 8, 60)
    more = tasks()
    assert sorted(more.values()) == sorted(2 * [*first.values()])
    wait_until(lambda: arrive(more, 20), "rows of the new tasks are there", 120)

    reached = max(number for _, number in rows()[next(iter(first))])
    (killed,) = container_pids(m1, "logs_store")
    m1.docker("kill", killed)
    wait_until(lambda: killed not in container_pids(m1, "logs_store"), "the database is replaced", 60)
    wait_running(m1, "logs_store", 1, 120)
    wait_until(lambda: arrive(first, reached + 100), "what follows is in the database, with what it had", 180)

    m1.docker("service", "scale", "--detach", "logs_app=2")
    wait_running(m1, "logs_app", 2, 60)
    kept = tasks()
    assert kept.items() < more.items()
    reached = max(number for name in kept for _, number in rows()[name])
    wait_until(lambda: arrive(kept, reached + 50), "rows of those that remain go on", 120)
    found = rows()
    assert found.keys() == more.keys()
    for name, node in more.items():
        numbers = [number for _, number in found[name]]
        assert {one for one, _ in found[name]} == {node}
        assert sorted(numbers) == [*range(len(numbers))], f"{name}: each line is one row"


def psql(m1: TestNode, *command: str) -> str:
    """Run a query in the database, or return nothing while it does not answer."""
    (id,) = container_pids(m1, "logs_store")
    words = (
        "exec",
        "-e",
        "PGPASSWORD=secret",
        id,
        "sh",
        "-c",
        'exec /usr/lib/postgresql/*/bin/"$0" "$@"',
    )
    return m1.docker(*words, *command, check=False).stdout


def test_orders_go_through_haproxy_to_rabbitmq_under_load(
    four: TestCluster, m1: TestNode, tmp_path: Path
) -> None:
    """A broker on each node, the applications scaled out and in, then a broker killed."""
    load(m1, tmp_path, *shop_images())
    (tmp_path / "rabbitmq.conf").write_text(RABBITMQ)
    (tmp_path / "haproxy.cfg").write_text(HAPROXY)
    (tmp_path / "cookie").write_text("erlang")
    file = RABBITS
    for number, node in enumerate(four.nodes(), 1):
        file = file.replace(f"NODE{number}", node.name)
    deploy(m1, tmp_path, "shop", file)
    brokers = ("shop_rabbit1", "shop_rabbit2", "shop_rabbit3")
    for name, count in {**dict.fromkeys(brokers, 1), "shop_haproxy": 1, "shop_orders": 2}.items():
        wait_running(m1, name, count, 120)
    invoices = node_of(four, "shop_invoices")

    def logged(name: str) -> set[str]:
        return {
            line
            for node in four.nodes()
            for id in container_pids(node, "shop_clients")
            for line in node.docker("exec", id, "cat", f"/tmp/{name}").stdout.splitlines()
        }

    def arrived() -> set[str]:
        return set(fetched(invoices, "shop_invoices", "http://127.0.0.1:8080/orders").splitlines())

    wait_until(lambda: len(arrived()) > 20, "orders are accepted, and arrive", 180)
    members = ["rabbit@rabbit1", "rabbit@rabbit2", "rabbit@rabbit3"]
    for broker in brokers:  # a cluster of three, not three brokers
        where = node_of(four, broker)
        wait_until(
            lambda where=where, broker=broker: (
                sorted(inside(where, broker, "sh", "-c", CLUSTER_MEMBERS).split()) == members
            ),
            f"{broker} is in the cluster",
            120,
        )
    refused = logged("refused")  # while the brokers came up
    for replicas in (6, 2):
        m1.docker("service", "scale", "--detach", f"shop_orders={replicas}")
        wait_running(m1, "shop_orders", replicas, 60)
        wanted = len(logged("accepted")) + 50
        wait_until(lambda wanted=wanted: len(logged("accepted")) > wanted, "orders go on", 60)
    assert logged("refused") == refused, "no order is refused while applications come and go"
    for node in four.nodes():
        assert published(node, "5000/cgi-bin/order?by-the-mesh") == "accepted\n"
        assert published(node, "8080/orders")

    accepted = logged("accepted")
    third = node_of(four, "shop_rabbit3")
    (killed,) = container_pids(third, "shop_rabbit3")
    third.docker("kill", killed)
    wait_until(lambda: killed not in container_pids(third, "shop_rabbit3"), "the broker is replaced", 60)
    wait_running(m1, "shop_rabbit3", 1, 120)
    seen = logged("accepted") | logged("refused")
    wait_until(lambda: len(logged("accepted") - seen) > 50, "orders go on with the others", 120)
    later = logged("accepted") - seen
    wait_until(lambda: accepted | later <= arrived(), "every order that was accepted arrives", 120)
