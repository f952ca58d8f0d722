"""Objects that labels name belong to the stack of an operator."""

import pytest

from skep.model.secret import Secret, SecretSpec
from skep.model.service import Service
from skep.model.values.ids import SecretId
from skep.model.values.stacks import STACK_LABEL
from skep.store.level import LEVEL
from tests.component.test_users_on_a_manager import SHOP, Rig, a_spec, labeled, rig
from tests.support.builders import a_service
from tests.support.store.store_transactions import put

__all__ = ("rig",)


@pytest.mark.parametrize(
    ("label", "form"),
    [
        ("skep.depends-on", "{}=service_started+restart"),
        ("skep.affinity", "{}"),
        ("skep.anti-affinity", "{}"),
        ("skep.affinity.preferred", "{}"),
        ("skep.anti-affinity.preferred", "{}"),
    ],
)
async def test_a_service_that_a_label_names_is_one_of_the_stack(rig: Rig, label: str, form: str) -> None:
    await rig.api.store.update(lambda tx: tx.raise_level(LEVEL))
    for name, labels in (("payments_api", {STACK_LABEL: "payments"}), ("database", SHOP)):
        await rig.api.store.update(put, labeled(a_service(name), labels))

    async def created(name: str) -> tuple[int, str]:
        spec = a_spec()
        spec["Name"] = f"shop_{len(rig.api.store.view().find(Service))}"
        spec["Labels"] = SHOP | {label: form.format(name)}
        status, text, _ = await rig.exchange("operator:shop", "POST /services/create", spec)
        return status, text

    for name in ("database", "shop_later"):
        assert (await created(name))[0] == 201, (await created(name))[1]
    for name in ("payments_api", "payments_none", "none"):  # the refusal does not say whether it exists
        status, text = await created(name)
        assert (status, f"the service {name} does not belong to the stack shop" in text) == (403, True), text


@pytest.mark.parametrize("label", ["skep.http.tls", "skep.http.more.tls"])
async def test_a_certificate_of_the_front_door_is_a_secret_of_the_stack(rig: Rig, label: str) -> None:
    """The door would serve the site of another stack with its private key."""
    for name, labels in (("payments_tls", {STACK_LABEL: "payments"}), ("shop_tls", SHOP), ("tls", {})):
        secret = Secret(id=SecretId(name), spec=SecretSpec(name=name, labels=labels))
        await rig.api.store.update(put, secret)

    async def exchange(path: str, secret: str) -> tuple[int, str]:
        spec = a_spec()
        spec["Name"] = "shop_web"
        spec["Labels"] = SHOP | {"skep.http": "a.example", "skep.http.more": "b.example", label: secret}
        plan = {"Services": [{"Spec": spec}]}
        status, text, _ = await rig.exchange("operator:shop", path, plan if "check" in path else spec)
        return status, text

    for path in ("POST /services/create", "POST /skep/stacks/check"):
        for name in ("payments_tls", "payments_none", "tls", "none"):
            status, text = await exchange(path, name)
            assert (status, f"the secret {name} does not belong to the stack shop" in text) == (403, True), (
                text
            )
    assert (await exchange("POST /skep/stacks/check", "shop_later"))[0] == 200, "the deploy creates it first"
    assert (await exchange("POST /services/create", "shop_tls"))[0] == 201
