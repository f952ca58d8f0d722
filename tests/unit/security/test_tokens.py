"""Join tokens, with vectors of a real manager's making."""

import pytest

from skep.errors import FailedPrecondition, InvalidArgument
from skep.model.node import NodeRole
from skep.model.swarm import JoinTokens
from skep.security.tokens import check_root, join_token, new_join_tokens, parse_token, role_of

ROOT = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
DIGEST = "7cc358aa45100f42d57b76e9b235253bfc6fc830b3e45858d2bc473657aae3f7"
SECRET = "000avh9he7dy896m08s18udxr"
TOKEN = f"SWMTKN-1-33y0svi7o89e2roi9w5fachctdkdpg4vz6x9i88hhm0uddu7sn-{SECRET}"


def test_a_token_carries_the_roots_digest_and_the_secret():
    assert join_token(ROOT, SECRET) == TOKEN


def test_a_token_can_be_taken_apart():
    token = parse_token(TOKEN)
    assert token.root_sha256.hex() == DIGEST
    assert token.secret == SECRET


@pytest.mark.parametrize(
    "text",
    [
        "",
        "SWMTKN",
        "SWMTKN-1-x-y",
        TOKEN[:-1],
        TOKEN + "0",
        TOKEN.upper(),
        TOKEN.replace("SWMTKN-1", "SWMTKN-3"),
        f"SWMTKN-1-{'z' * 50}-{SECRET}",  # more than 256 bits
        TOKEN + "\n",
    ],
)
def test_what_is_no_token_is_refused_with_dockers_words(text):
    with pytest.raises(InvalidArgument, match="invalid join token"):
        parse_token(text)


def test_the_digest_covers_every_byte_of_the_root():
    check_root(parse_token(TOKEN), ROOT)
    with pytest.raises(FailedPrecondition, match="remote CA does not match fingerprint"):
        check_root(parse_token(TOKEN), ROOT.strip())


def test_the_secret_decides_the_role_and_counts_only_as_a_whole():
    tokens = new_join_tokens(ROOT)
    assert role_of(tokens.worker, tokens) is NodeRole.WORKER
    assert role_of(tokens.manager, tokens) is NodeRole.MANAGER
    assert role_of(tokens.worker[:-1], tokens) is None
    assert role_of(TOKEN, tokens) is None


def test_no_token_gives_no_role_even_where_none_was_made():
    assert role_of("", JoinTokens()) is None


def test_tokens_are_never_the_same_twice():
    first, second = new_join_tokens(ROOT), new_join_tokens(ROOT)
    assert len({first.worker, first.manager, second.worker, second.manager}) == 4
