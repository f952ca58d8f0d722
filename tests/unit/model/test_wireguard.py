"""Public keys of WireGuard in a node's description."""

from skep.model.networks.wireguard import PUBLIC_KEYS_LABEL, PublicKey, public_keys_label, published_keys

OLD, NEW = PublicKey(bytes(range(32)), 4799), PublicKey(bytes(range(1, 33)), 4800)


def test_keys_are_read_as_they_were_published() -> None:
    assert published_keys({PUBLIC_KEYS_LABEL: public_keys_label([OLD, NEW])}) == (OLD, NEW)
    assert published_keys({PUBLIC_KEYS_LABEL: public_keys_label([])}) == ()
    assert published_keys({}) == ()


def test_what_is_malformed_is_left_out_and_more_than_two_are_not_taken() -> None:
    good = public_keys_label([OLD])
    for bad in ("", "@", "x@4799", good.replace("4799", "0"), good.replace("4799", "65536"), "AAAA@4799"):
        assert published_keys({PUBLIC_KEYS_LABEL: f"{bad},{good}"}) == (OLD,)
    assert len(published_keys({PUBLIC_KEYS_LABEL: ",".join([good] * 5)})) == 2
