"""Nodes, the swarm, removals, ambiguous words and bodies too large."""

from tests.conformance.script.steps import SECOND, create, delete, get, init, port, post, service

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
