"""crun's messages about commands that cannot be executed, in the words of runc, and with Docker's exit codes.

The messages are crun 1.8.1's and 1.29.1's, as they were printed or as they are in its sources.
"""

import pytest

from skep.engine.runtime.conmon import StartError, with_runcs_words


@pytest.mark.parametrize(
    ("said", "command", "words", "exit_code"),
    [
        (
            "executable file `nope` not found in $PATH: No such file or directory",
            "nope",
            'exec: "nope": executable file not found in $PATH',
            127,
        ),
        (
            "executable file `/nope` not found: No such file or directory",
            "/nope",
            'exec: "/nope": stat /nope: no such file or directory',
            127,
        ),
        (
            "executable file `./nope` not found in $PATH: No such file or directory",
            "./nope",
            'exec: "./nope": stat ./nope: no such file or directory',
            127,
        ),
        ("open executable: Permission denied", "/file", 'exec: "/file": permission denied', 126),
        ("open `/bin/file`: Permission denied", "file", 'exec: "file": permission denied', 126),
        ("open executable: Operation not permitted", "/bin", 'exec: "/bin": permission denied', 126),
        (
            "the path `/file` exists but it is not executable: Operation not permitted",
            "/file",
            'exec: "/file": permission denied',
            126,
        ),
        (
            "the path `/bin` is not a regular file: Operation not permitted",
            "/bin",
            'exec: "/bin": permission denied',
            126,
        ),
        (
            "chdir `/none`: No such file or directory",
            "sh",
            'chdir to cwd ("/none") set in config.json failed: no such file or directory',
            127,
        ),
    ],
)
def test_a_command_that_cannot_be_executed_is_named_in_runcs_words(
    said: str, command: str, words: str, exit_code: int
) -> None:
    for verb, beginning in (("create", "crun create failed"), ("exec", "exec failed")):
        message = with_runcs_words(said, command, verb)
        assert message == f"{beginning}: unable to start container process: {words}"
        assert StartError(message, verb).exit_code == exit_code


def test_other_messages_stay_as_they_are() -> None:
    for message in (
        'runc create failed: unable to start container process: exec: "nope": executable file not found in $PATH',
        "the requested cgroup controller `pids` is not available",
        "mount `/src` to `dst`: Permission denied",
        "open `/sys/fs/cgroup/skep/cgroup.procs`: Permission denied",
    ):
        assert with_runcs_words(message, "sh", "create") == message
