"""Certificates in secrets: which are refused, who chooses them, and that the front door gets them."""

import time
from base64 import encodebytes
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from skep.aio.clock import SystemClock
from skep.api.access.permissions import KnownObject
from skep.errors import FailedPrecondition, InvalidArgument
from skep.manager.acme.door_files import DoorFiles
from skep.manager.acme.own_certificates import (
    check_certificates,
    own_certificates,
    refuse_own_certificate,
)
from skep.manager.acme.state import NO_DOOR, names_of_routes
from skep.manager.acme.steps import Wanted
from skep.manager.control.files import remove_secret
from skep.manager.control.services import create_service
from skep.manager.control.validation.new_objects import new_service, planned_service
from skep.model.door.payloads import DoorPayload
from skep.model.secret import Secret, SecretSpec
from skep.model.service import Service, ServiceSpec
from skep.model.values.ids import SecretId, ServiceId, new_id
from skep.model.values.times import Timestamp
from skep.security.authority import Authority
from skep.security.keys import load_private_key
from skep.store.interface import Transaction
from skep.store.kinds import Payload
from skep.store.memory import MemoryStore
from tests.support.builders import a_service_spec
from tests.support.security.external_ca import server_certificate

APP = "app.example.com"
ROOT = Authority.create(name="own")
CHAIN, KEY = server_certificate(ROOT, APP)


def spec_with(secret: str, *, host: str = APP, stack: str = "", **labels: str) -> ServiceSpec:
    found = {"skep.http": host, "skep.http.tls": secret, **labels}
    if stack:
        found["com.docker.stack.namespace"] = stack
    return msgspec.structs.replace(a_service_spec("web"), labels=found)


def service(id: str, spec: ServiceSpec, age: str) -> Service:
    return Service(id=ServiceId(id), created_at=Timestamp(age), spec=msgspec.structs.replace(spec, name=id))


async def store_with(*services: Service, **secrets: bytes) -> MemoryStore:
    store = MemoryStore(SystemClock())

    def write(tx: Transaction) -> None:
        for name, data in secrets.items():
            tx.put(Secret(id=SecretId(name), spec=SecretSpec(name=name)))
            tx.put(Payload(id=f"secret/{name}", data=data))
        for one in services:
            tx.put(one)

    await store.update(write)
    return store


def encrypted(key: bytes) -> bytes:
    return load_private_key(key).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"phrase")
    )


OTHER_CHAIN, OTHER_KEY = server_certificate(ROOT, "other.example.com")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello", "secret site has no certificate"),
        (b"\xff-----BEGIN CERTIFICATE-----\n", "secret site has no certificate"),
        (CHAIN, "secret site has no private key"),
        (CHAIN + encrypted(KEY), "secret site has an encrypted key"),
        (CHAIN + OTHER_KEY, "secret site has a key that does not belong to its first certificate"),
        (ROOT.root_pem + CHAIN + KEY, "secret site has a key that does not belong"),
        (OTHER_CHAIN + OTHER_KEY, f"for other.example.com and not for {APP}"),
    ],
)
async def test_a_secret_without_a_usable_certificate_is_refused_by_name(data: bytes, words: str) -> None:
    store = await store_with(site=data)
    with pytest.raises(InvalidArgument, match=r"invalid label skep\.http\.tls=site: ") as refused:
        check_certificates(store.view(), spec_with("site"))
    assert words in str(refused.value)


@pytest.mark.parametrize("is_removed_first", [False, True])
async def test_a_certificate_is_not_removed_beside_a_new_service_that_names_it(
    is_removed_first: bool,
) -> None:
    """The manager that gets the second request does not show the result of the first one yet."""
    store = await store_with(site=CHAIN + KEY)
    behind = MemoryStore(SystemClock(), store.cluster)
    behind.faults.lag_s = 0.05
    create = partial(create_service, spec=spec_with("site"), new_id=new_id, new_name=str, now=Timestamp(""))
    if is_removed_first:
        await store.update(remove_secret, SecretId("site"))
        with pytest.raises(InvalidArgument, match="there is no secret site"):
            await behind.update(create)
    else:
        await store.update(create)
        with pytest.raises(InvalidArgument, match="secret 'site' is in use by the following service: web"):
            await behind.update(remove_secret, SecretId("site"))


async def test_a_missing_secret_is_refused_by_name() -> None:
    store = await store_with()
    with pytest.raises(InvalidArgument, match="there is no secret site"):
        check_certificates(store.view(), spec_with("site"))


async def test_a_rehearsal_that_knows_only_the_size_of_a_secret_refuses_nothing() -> None:
    store = await store_with(site=bytes(2000))
    check_certificates(store.view(), spec_with("site"))
    await store.update(lambda tx: tx.delete(Payload, "secret/site"))
    check_certificates(store.view(), spec_with("site"))


async def test_the_front_door_gets_the_chain_and_its_key_alone() -> None:
    spec = spec_with("site")
    store = await store_with(service("web", spec, "1"), site=b"# a comment\n" + KEY + CHAIN + ROOT.root_pem)
    check_certificates(store.view(), spec_with("site"))
    [file] = DoorFiles().present(store.view()).values()
    payload = msgspec.json.decode(file.data, type=DoorPayload)
    assert payload.certificates == {APP: (CHAIN + ROOT.root_pem + KEY).decode()}
    assert names_of_routes(store.view()).stacks == {}


async def test_a_service_that_leaves_the_stack_of_a_host_no_longer_chooses_its_certificate() -> None:
    owner = service("owner", spec_with("auto", stack="one", **{"skep.http.share": "true"}), "1")
    member = service("member", spec_with("site", host=f"{APP}/more", stack="one"), "2")
    store, files = await store_with(owner, member, site=CHAIN + KEY), DoorFiles()
    assert len(files.present(store.view())) == 1
    moved = service("member", spec_with("site", host=f"{APP}/more", stack="two"), "2")
    async with store.watch(Service) as watch:
        await store.update(lambda tx: tx.put(moved))
        [event] = (await anext(aiter(watch))).events
    assert files.on_event(event)
    assert files.present(store.view()) == {}


async def test_a_wildcard_certificate_serves_the_hosts_below_it() -> None:
    chain, key = server_certificate(ROOT, "*.example.com")
    store = await store_with(site=chain + key)
    for host in (APP, "*.example.com"):
        check_certificates(store.view(), spec_with("site", host=host))
    with pytest.raises(InvalidArgument, match=r"not for a.b.example.com"):
        check_certificates(store.view(), spec_with("site", host="a.b.example.com"))


async def test_the_stack_that_has_a_host_chooses_its_certificate() -> None:
    owner = service("owner", spec_with("auto", stack="one", **{"skep.http.share": "true"}), "1")
    store = await store_with(owner, site=CHAIN + KEY)
    guest = spec_with("site", host=f"{APP}/guest", stack="two")
    with pytest.raises(InvalidArgument, match="another service chooses the certificate"):
        check_certificates(store.view(), guest)
    check_certificates(store.view(), spec_with("site", host=f"{APP}/more", stack="one"))
    await store.update(lambda tx: tx.put(service("guest", guest, "2")))  # written at the same moment
    assert own_certificates(store.view()) == {}
    assert names_of_routes(store.view()) == Wanted({APP: "one"}, NO_DOOR)


async def test_an_update_of_something_else_does_not_check_the_secret_again() -> None:
    spec = spec_with("site")
    store = await store_with(service("web", spec, "1"), site=OTHER_CHAIN + OTHER_KEY)
    check_certificates(store.view(), spec_with("site", other="label"), ServiceId("web"))
    with pytest.raises(InvalidArgument):
        check_certificates(store.view(), spec_with("site", host=f"{APP},b.example.com"), ServiceId("web"))


async def test_a_secret_with_a_certificate_in_use_stays() -> None:
    store = await store_with(service("web", spec_with("site"), "1"), site=CHAIN + KEY)
    with pytest.raises(InvalidArgument, match="secret 'site' is in use by the following service: web"):
        await store.update(remove_secret, SecretId("site"))


async def test_a_user_needs_the_right_to_the_secret() -> None:
    store = await store_with()
    labels = {"com.docker.stack.namespace": "one"}
    secret = Secret(id=SecretId("s1"), spec=SecretSpec(name="site", labels=labels))
    await store.update(lambda tx: tx.put(secret))
    known = KnownObject(id="s1", stack="one")
    assert ("secret", known, "site") in new_service(store.view(), spec_with("site", stack="two")).uses
    assert ("secret", known, "site") in planned_service(store.view(), spec_with("site", stack="two")).uses


def certificate_with(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    """Return a certificate of the app with this key, and the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, APP)])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2028, 1, 1, tzinfo=UTC))
    )
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(APP)]), critical=False)
    text = builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return text + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def certificate_with_rsa(bits: int) -> bytes:
    return certificate_with(rsa.generate_private_key(65537, bits))


def der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return bytes([tag, 0x82]) + len(content).to_bytes(2, "big") + content


def crafted_dsa_key(bits: int) -> bytes:
    """Return a key for which OpenSSL computes a power of these many bits."""
    p, q, g, x = (der(2, b"\0" + ((1 << bits) - n).to_bytes(bits // 8, "big")) for n in (1, 3, 5, 7))
    kind = bytes.fromhex("06072a8648ce380401")
    return b64pem(der(0x30, b"\x02\x01\x00", der(0x30, kind, der(0x30, p, q, g)), der(4, x)))


def b64pem(data: bytes) -> bytes:
    return b"-----BEGIN PRIVATE KEY-----\n" + encodebytes(data) + b"-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (partial(certificate_with_rsa, 1024), "RSA key of 1024 bits. Use 2048 to 4096"),
        (partial(certificate_with_rsa, 4096 + 64), "RSA key of 4160 bits. Use 2048 to 4096"),
        (
            lambda: certificate_with(ec.generate_private_key(ec.BrainpoolP256R1())),
            "a key of the curve brainpoolP256r1",
        ),
        (lambda: CHAIN + crafted_dsa_key(30_000), "a private key of"),
        (lambda: CHAIN + crafted_dsa_key(5_000), "has a key that does not belong"),
        (lambda: CHAIN + KEY + b"#" * 32 * 1024, "Write only a chain and its key into it"),
    ],
)
async def test_keys_that_cost_time_are_refused_before_they_are_read(
    data: Callable[[], bytes], words: str
) -> None:
    store = await store_with(site=data())
    before = time.process_time()
    with pytest.raises(InvalidArgument, match="the secret site has") as refused:
        check_certificates(store.view(), spec_with("site"))
    assert words in str(refused.value)
    assert time.process_time() - before < 1.0  # OpenSSL takes 11 s for the longest


async def test_a_certificate_of_many_hosts_is_read_at_once_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data = certificate_with(rsa.generate_private_key(65537, 2048))
    spec = spec_with("site", host=f"{APP}, {APP}/a, {APP}/b")
    store = await store_with(service("web", spec, "1"), site=data)
    before = time.process_time()
    assert own_certificates(store.view())[APP].problem == ""
    took_s, before = time.process_time() - before, time.process_time()
    load_pem_private_key(data[data.index(b"-----BEGIN PRIVATE") :], password=None)
    assert took_s < (time.process_time() - before) / 4  # without OpenSSL's check of the primes
    monkeypatch.setattr(x509, "load_pem_x509_certificates", None)
    assert own_certificates(store.view())[APP].problem == ""
    assert len(DoorFiles().present(store.view())) == 1


async def test_a_certificate_of_a_secret_is_renewed_by_another_secret() -> None:
    store = await store_with(service("web", spec_with("site"), "1"), site=CHAIN + KEY)
    with pytest.raises(FailedPrecondition, match=r"in the secret site: .* skep secret rotate site FILE"):
        refuse_own_certificate(store.view(), APP)
    refuse_own_certificate(store.view(), "other.example.com")
