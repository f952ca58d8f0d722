"""What a node in no swarm is asked."""

from tests.conformance.script.steps import create, delete, get, init, post, service

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
