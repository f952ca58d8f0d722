"""Images of the talks' larger stacks: small images of the distribution's programs with the names in the files.

Rsyslog stands for Fluentd and Elasticsearch, and busybox's web server for Kibana and the applications.  RabbitMQ,
HAProxy, etcd and ZooKeeper are real.
"""

import re
import subprocess
from collections.abc import Sequence

from skep.cli.cluster.door import FIRST_CONFIGURATION
from skep.model.door.settings import DIRECTORY
from skep.model.door.settings import NAME as DOOR
from skep.playground.images.archive import Archive, ArchivedDirectory, File
from tests.support.machines.stand_ins import image, local_program, script

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
KIBANA = "exec httpd -f -p 5601 -h /w\n"
DATABASE = """\
bin=$(echo /usr/lib/postgresql/*/bin)
if [ ! -e /data/db ]; then
    mkdir -p /data/new && chown postgres /data/new
    su postgres -c "$bin/initdb -D /data/new -A scram-sha-256 --pwfile /run/secrets/password -E UTF8 --no-locale -N" &&
        su postgres -c "$bin/postgres --single -D /data/new postgres" </tables.sql &&
        echo "host all all all scram-sha-256" >>/data/new/pg_hba.conf && mv /data/new /data/db
fi
exec su postgres -c "exec $bin/postgres -D /data/db -k /tmp -c listen_addresses='*'"
"""
RABBIT = """\
export HOME=/var/lib/rabbitmq PATH=/usr/lib/erlang/bin:$PATH RABBITMQ_LOGS=-
export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+S 1:1 +sbwt none"
mkdir -p $HOME && cd $HOME && rm -f .erlang.cookie && cp /run/secrets/cookie .erlang.cookie && chmod 400 .erlang.cookie
exec /usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server
"""
ERLANG = "base crypto asn1 eldap inets mnesia os-mon parsetools public-key runtime-tools ssl syntax-tools tools xmerl"
ORDERS = "exec httpd -f -p 5000 -h /w\n"
ORDER = """\
if amqp-publish -s haproxy -p -r orders -b "$QUERY_STRING" >/dev/null 2>&1; then
    printf 'Content-Type: text/plain\\r\\n\\r\\naccepted\\n'
else
    printf 'Status: 502 Bad Gateway\\r\\n\\r\\n'
fi
"""
INVOICES = """\
(while ! amqp-declare-queue -s rabbit1 -d -q orders; do sleep 0.5; done
: >/w/orders
while :; do amqp-consume -s haproxy -q orders -- sh -c 'cat; echo' >>/w/orders; sleep 0.5; done) &
exec httpd -f -p 8080 -h /w
"""
CLIENTS = """\
: >/tmp/accepted; : >/tmp/refused; i=0
while :; do
    i=$((i+1))
    if timeout 50 wget -q -O /dev/null "http://orders:5000/cgi-bin/order?$(hostname)-$i"; then
        echo "$(hostname)-$i" >>/tmp/accepted
    else
        echo "$(hostname)-$i" >>/tmp/refused; sleep 0.1
    fi
done
"""

FIRST = "[ -e /data/first ] || hostname >/data/first\n"
"""Marks a volume with the first container that had it."""
ETCD = f"""\
{FIRST}
exec etcd --name member$SLOT --data-dir /data/etcd --initial-cluster-state new \\
    --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://$SLOT.member:2379 \\
    --listen-peer-urls http://0.0.0.0:2380 --initial-advertise-peer-urls http://$SLOT.member:2380 \\
    --initial-cluster member1=http://1.member:2380,member2=http://2.member:2380,member3=http://3.member:2380
"""
ZOOKEEPER = f"""\
{FIRST}
echo $SLOT >/data/myid
cat >/tmp/zoo.cfg <<END
tickTime=500
initLimit=40
syncLimit=10
dataDir=/data
clientPort=2181
admin.enableServer=false
quorumListenOnAllIPs=true
server.1=1.member:2888:3888
server.2=2.member:2888:3888
server.3=3.member:2888:3888
END
exec java -Xmx96m -Dsun.net.inetaddr.ttl=1 -Dsun.net.inetaddr.negative.ttl=0 -cp '/usr/share/java/*' \\
    org.apache.zookeeper.server.quorum.QuorumPeerMain /tmp/zoo.cfg
"""
JAVA = 'exec /usr/lib/jvm/java-[0-9][0-9]-openjdk-*/bin/java "$@"\n'
ZKCLI = """\
exec timeout 30 java -Xmx48m -cp '/usr/share/java/*' org.apache.zookeeper.ZooKeeperMain -server 127.0.0.1:2181 "$@"
"""


def efk_images() -> Sequence[Archive]:
    """Return images for Elasticsearch, Fluentd, Filebeat and Kibana."""
    rsyslog = (["rsyslog"], ["usr/sbin/rsyslogd", "usr/lib/*/rsyslog"])
    index = {"usr/share/elasticsearch/data/index": File(b"")}
    search = {"w/cgi-bin/search": script(SEARCH)}
    return (
        image(["elasticsearch:7.17.0"], index | {"bin/e": script(STORE)}, ["/bin/e"], *rsyslog),
        image(["fluent/fluentd:v1.14"], {"bin/f": script(SHIPPER)}, ["/bin/f"], *rsyslog),
        image(["elastic/filebeat:7.17.0"], {"bin/b": script(BEAT)}, ["/bin/b"], ["curl"], ["usr/bin/curl"]),
        image(["kibana:7.17.0"], search | {"bin/k": script(KIBANA)}, ["/bin/k"]),
    )


def database_images(tables: str) -> Sequence[Archive]:
    """Return images of PostgreSQL and of an rsyslog that writes into it.

    ``tables``: SQL that a new database begins with, a statement a line.
    """
    programs = [f"usr/lib/postgresql/*/bin/{name}" for name in ("initdb", "postgres", "psql")]
    libraries = [f"usr/lib/postgresql/*/lib/{name}.so" for name in ("plpgsql", "dict_snowball")]
    entries = {
        "etc/passwd": File(b"root:x:0:0:root:/:/bin/sh\npostgres:x:70:70:postgres:/:/bin/sh\n"),
        "tables.sql": File(tables.encode()),
        "bin/d": script(DATABASE),
    }
    shown = subprocess.run(
        ["apt-cache", "depends", "postgresql"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    server = re.findall(r"postgresql-[0-9]+", shown)[0]
    packages = [server, server.replace("-", "-client-")]
    folders = ["usr/share/postgresql", "usr/share/zoneinfo"]
    return (
        image(["postgres:15"], entries, ["/bin/d"], [*packages, "tzdata"], [*programs, *libraries, *folders]),
        image(
            ["rsyslog:8"],
            {"bin/f": script(SHIPPER)},
            ["/bin/f"],
            ["rsyslog", "rsyslog-pgsql"],
            ["usr/sbin/rsyslogd", "usr/lib/*/rsyslog"],
        ),
    )


def door_image(local: str = "") -> Archive:
    """Return the image that the Dockerfile of the front door makes.

    ``local``: path of an HAProxy of this machine that takes the place of the package.
    """
    accounts = {
        "etc/passwd": File(b"root:x:0:0:root:/:/bin/sh\nhaproxy:x:100:100:haproxy:/:/bin/false\n"),
        "etc/group": File(b"root:x:0:\nhaproxy:x:100:\n"),
    }
    configuration = File("".join(f"{line}\n" for line in FIRST_CONFIGURATION).encode())
    command = ["haproxy", "-W", "-S", f"{DIRECTORY}/master.sock", "-f", f"{DIRECTORY}/haproxy.cfg"]
    entries = {**accounts, f"{DIRECTORY.removeprefix('/')}/haproxy.cfg": configuration}
    if local:
        return image([f"{DOOR}:latest"], {**entries, **local_program("bin/haproxy", local)}, command)
    return image([f"{DOOR}:latest"], entries, command, ["haproxy"], ["usr/sbin/haproxy"])


def shop_images() -> Sequence[Archive]:
    """Return images for RabbitMQ, HAProxy, and the applications of the shop."""
    erlang = [f"erlang-{name}" for name in ERLANG.split()]
    tools = (["amqp-tools"], ["usr/bin/amqp-*"])
    return (
        image(
            ["rabbitmq:3-management"],
            {"bin/rabbit": script(RABBIT)},
            ["/bin/rabbit"],
            ["rabbitmq-server", *erlang],
            ["usr/lib/erlang", "usr/lib/rabbitmq"],
        ),
        image(
            ["haproxy:2.6"],
            {},
            ["haproxy", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"],
            ["haproxy"],
            ["usr/sbin/haproxy"],
        ),
        image(
            ["shop/orders-python:latest"],
            {"bin/o": script(ORDERS), "w/cgi-bin/order": script(ORDER)},
            ["/bin/o"],
            *tools,
        ),
        image(
            ["shop/invoices-spring:latest"],
            {"w": ArchivedDirectory(), "bin/i": script(INVOICES)},
            ["/bin/i"],
            *tools,
        ),
        image(["shop/clients:latest"], {"bin/c": script(CLIENTS)}, ["/bin/c"]),
    )


def etcd_image() -> Archive:
    """Return an image for a member of etcd, which is the task's slot of a service with the alias ``member``."""
    programs = (["etcd-server", "etcd-client"], ["usr/bin/etcd", "usr/bin/etcdctl"])
    return image(["etcd:3"], {"bin/member": script(ETCD)}, ["/bin/member"], *programs)


def zookeeper_image() -> Archive:
    """Return an image for a member of ZooKeeper, as of etcd, with ``zkcli``."""
    depends = ["apt-cache", "depends", "default-jre-headless"]
    shown = subprocess.run(depends, capture_output=True, text=True, check=True, timeout=60).stdout
    java = re.findall(r"openjdk-[0-9]+-jre-headless", shown)[0]
    programs = {"bin/member": script(ZOOKEEPER), "bin/java": script(JAVA), "bin/zkcli": script(ZKCLI)}
    paths = ["usr/lib/jvm/java-[0-9][0-9]-openjdk-*", "etc/java-*-openjdk", "usr/share/java"]
    return image(["zookeeper:3"], programs, ["/bin/member"], ["zookeeper", java], paths)
