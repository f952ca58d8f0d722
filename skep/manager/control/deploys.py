"""Ensures that only the newest of several concurrent deploys changes a stack.

A deploy records its revision, a config, before its first change.  The same transaction marks the deploys of earlier
revisions as replaced.  Requests of a replaced deploy are refused, in transactions that compare the revision.  So one of
two deploys always notices the other, whatever their commands do.
"""

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from msgspec.structs import replace

from skep.errors import FailedPrecondition
from skep.model.options.labels import DEPLOYING, REPLACED, STACK_REVISION, STACK_STATE
from skep.model.secret import Config, ConfigSpec
from skep.model.values.ids import ConfigId
from skep.model.values.stacks import STACK_LABEL
from skep.store.interface import Transaction

P = ParamSpec("P")
R = TypeVar("R")


def replace_deploys(tx: Transaction, spec: ConfigSpec) -> None:
    """Mark the stack's deploys in progress as replaced by the revision ``spec``, if it is a revision."""
    number, stack = spec.labels.get(STACK_REVISION), spec.labels.get(STACK_LABEL)
    if not number or not stack:
        return
    for config in tx.find(Config, stack=stack):
        labels = config.spec.labels
        if labels.get(STACK_STATE) == DEPLOYING and STACK_REVISION in labels:
            labels = {**labels, STACK_STATE: f"{REPLACED}{number}"}
            tx.put(replace(config, spec=replace(config.spec, labels=labels)))


def require_current(tx: Transaction, revision: str, stack: str) -> None:
    """Check that the deploy of ``stack`` with this revision is in progress, now and when the transaction commits.

    Raises:
        FailedPrecondition: A newer deploy has replaced it, or it has ended.
    """
    config = tx.rely_on(Config, ConfigId(revision))
    is_known = config is not None and STACK_REVISION in config.spec.labels
    # A user of one stack must not learn the state of another stack's deploy.
    if config is None or not is_known or config.spec.labels.get(STACK_LABEL, "") != stack:
        raise FailedPrecondition("the revision of this deploy was removed: deploy the stack again")
    labels = config.spec.labels
    if (state := labels.get(STACK_STATE, "")) != DEPLOYING:
        name = f"revision {labels[STACK_REVISION]} of {labels.get(STACK_LABEL, '')}"
        raise FailedPrecondition(f"the deploy of {name} cannot make further changes: {state}")


def fenced(
    operation: Callable[Concatenate[Transaction, P], R], revision: str, stack: str
) -> Callable[Concatenate[Transaction, P], R]:
    """Return ``operation`` with a check that the deploy with this revision is current.

    Args:
        revision: Id of the config, or an empty string outside of deploys.
        stack: Stack of the object that the operation changes.
    """
    if not revision:
        return operation

    def run(tx: Transaction, /, *args: P.args, **kwargs: P.kwargs) -> R:
        require_current(tx, revision, stack)
        return operation(tx, *args, **kwargs)

    return run
