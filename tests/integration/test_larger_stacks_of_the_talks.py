"""The talks' larger stacks, by the docker command: logs of every node collected.

The images are small ones of the distribution's programs under the names in the files: rsyslog in place of Fluentd and
Elasticsearch, busybox's web server in place of Kibana.
"""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from skep.playground.archive import File
from tests.support.playground_rig import (
    SKEP,
    TestCluster,
    TestNode,
    a_playground,
    container_pids,
    containers,
    remove_services,
    running,
    wait_running,
    wait_until,
)
from tests.support.stand_ins import image, load, script
from tests.support.talks import deploy, fetched

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
STORE = """\
(exec httpd -f -p 9200 -h /usr/share/elasticsearch/data) &
exec rsyslogd -n -iNONE -f /etc/rsyslog.conf
"""
SHIPPER = "exec rsyslogd -n -iNONE -f /etc/rsyslog.conf\n"
BEAT = """\
api() { curl -s -N --unix-socket /var/run/docker.sock "http://docker/v1.41$1"; }
follow() {
    api "/containers/$1/logs?stdout=1&follow=1" | while read -r line; do
        case $line in *report*) echo "<14>1 - $(hostname) $1 - - - report${line#*report}" ;; esac
    done | nc elasticsearch 9300
}
while sleep 0.5; do
    for id in $(api /containers/json | grep -o '"Id":"[0-9a-f]*"' | cut -d '"' -f 4); do
        [ -e "/tmp/$id" ] || { : >"/tmp/$id"; (follow "$id"; rm "/tmp/$id") & }
    done
done
"""
SEARCH = """\
printf 'Content-Type: text/plain\\r\\n\\r\\n'
wget -q -O - "$ELASTICSEARCH_HOSTS/index" | grep "$QUERY_STRING"
"""
SHIPPED = ("fluentd", "filebeat", "app", "batch")
"""One on each node."""
KIBANA = "exec httpd -f -p 5601 -h /w\n"


@pytest.fixture(scope="module")
def three() -> Iterator[TestCluster]:
    with a_playground("larger", managers=1, workers=2) as playground:
        yield playground


@pytest.fixture
def m1(three: TestCluster) -> Iterator[TestNode]:
    node = three.node("m1")
    yield node
    for stack in node.docker("stack", "ls", "--format", "{{.Name}}").stdout.split():
        node.docker("stack", "rm", stack)
    remove_services(node)


def node_of(cluster: TestCluster, service: str) -> TestNode:
    return next(node for node in cluster.nodes() if container_pids(node, service))


def test_logs_of_every_node_are_collected(three: TestCluster, m1: TestNode, tmp_path: Path) -> None:
    """By a log driver that sends to a shipper, and by a shipper that reads the API's socket."""
    rsyslog = (["rsyslog"], ["usr/sbin/rsyslogd", "usr/lib/*/rsyslog"])
    index = {"usr/share/elasticsearch/data/index": File(b"")}
    search = {"w/cgi-bin/search": script(SEARCH)}
    load(
        m1,
        tmp_path,
        image(["elasticsearch:7.17.0"], index | {"bin/e": script(STORE)}, ["/bin/e"], *rsyslog),
        image(["fluent/fluentd:v1.14"], {"bin/f": script(SHIPPER)}, ["/bin/f"], *rsyslog),
        image(["elastic/filebeat:7.17.0"], {"bin/b": script(BEAT)}, ["/bin/b"], ["curl"], ["usr/bin/curl"]),
        image(["kibana:7.17.0"], search | {"bin/k": script(KIBANA)}, ["/bin/k"]),
    )
    (tmp_path / "elasticsearch.conf").write_text(ELASTICSEARCH)
    (tmp_path / "fluentd.conf").write_text(FLUENTD)
    subprocess.run([SKEP, "--host", m1.socket, "cluster", "allow", "api-inspect"], check=True, timeout=60)
    deploy(m1, tmp_path, "efk", EFK)
    for name, count in {"elasticsearch": 1, "kibana": 1, **dict.fromkeys(SHIPPED, 3)}.items():
        wait_running(m1, f"efk_{name}", count, 120)
    kibana = node_of(three, "efk_kibana")

    def found(word: str) -> list[list[str]]:
        lines = fetched(kibana, "efk_kibana", f"http://127.0.0.1:5601/cgi-bin/search?{word}").splitlines()
        return [line.split() for line in lines]

    def numbers(word: str, origin: str) -> set[int]:
        return {int(line[-1]) for line in found(word) if line[1] == origin}

    names = {node.name for node in three.nodes()}
    tags = {}
    for node in three.nodes():
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
    assert "efk_fluentd 3/3 *:24224->24224/tcp" in shown
    assert "efk_filebeat 3/3 " in shown

    tag = tags["w1"]
    before = max(numbers("request", tag))
    killed = {task["ID"] for task in running(m1, "efk_fluentd")}
    for node in three.nodes():  # the driver finds none, on whatever node
        for id in container_pids(node, "efk_fluentd"):
            node.docker("kill", id)
    wait_until(
        lambda: len(new := running(m1, "efk_fluentd")) == 3 and not killed & {task["ID"] for task in new},
        "other shippers run",
        60,
    )
    wait_until(lambda: max(numbers("request", tag)) > before + 50, "what follows is collected", 60)
    lost = set(range(before + 50)) - numbers("request", tag)
    assert len(lost) < 20, f"what was written while no shipper ran is sent afterwards: {sorted(lost)}"
