"""RUN, the instructions of the image's configuration, ONBUILD, contexts and times, each rule as a case."""

from tests.support.builds.dockerfile_cases import Case

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

RUN = (
    Case(
        "RUN has a shell form and an exec form",
        'FROM BASE\nRUN echo a > /o && \\\n  echo b >> /o\nRUN ["/bin/sh", "-c", "echo \\"c d\\" >> /o"]\nRUN [ "echo", "$HOME" ]\n',
        gives={"o": "a\nb\nc d\n"},
        shows=(" $HOME\n",),
    ),
    Case(
        "text that is not a JSON list runs in the shell",
        "FROM BASE\nRUN ['echo', 'a'] || echo shell > /o\n",
        gives={"o": "shell\n"},
    ),
    Case(
        "a JSON list holds strings only",
        'FROM BASE\nRUN ["echo", 1]\n',
        fails="arrays must be comprised of strings only",
    ),
    Case(
        "a failing command fails the build",
        "FROM BASE\nRUN echo seen && exit 3\n",
        fails="did not complete successfully: exit code: 3",
        shows=("seen",),
    ),
    Case(
        "a here-document is a script",
        "FROM BASE\nARG A=b\nRUN <<EOF\n  echo $A > /o\n  echo two >> /o\nEOF\nRUN <<-'END'\n\techo $A >> /o\n\tEND\nRUN << 'SPACE' cat >> /o\nspace $A\nSPACE\n",
        gives={"o": "b\ntwo\nb\nspace $A\n"},
    ),
    Case(
        "here-documents feed one or several commands",
        "FROM BASE\nRUN <<EOT sh\n  set -e\n  echo one > /o\nEOT\nRUN <<A cat > /a && <<B cat > /b\nI am\nfirst\nA\nsecond\nB\nRUN cat <<EOF >> /o\n$((1+1))\nEOF\n",
        gives={"o": "one\n2\n", "a": "I am\nfirst\n", "b": "second\n"},
    ),
    Case(
        "a here-document can have a shebang",
        "FROM BASE\nRUN <<EOF\n#!/bin/cat\nshown as it is $HOME\nEOF\n",
        shows=("shown as it is $HOME",),
        lacks=("dev/pipes", "dev/pipes/EOF"),
    ),
    Case(
        "an unterminated here-document is refused",
        "FROM BASE\nRUN <<EOF\necho\n",
        fails="unterminated heredoc",
    ),
    Case(
        "SHELL runs commands in shell form",
        'FROM BASE\nSHELL ["/bin/sh", "-ec"]\nRUN false; echo no > /o || true\nRUN echo a\n',
        fails="exit code: 1",
    ),
    Case(
        "SHELL is part of the image",
        'FROM BASE\nSHELL ["/bin/ash", "-c"]\nCMD a b\nENTRYPOINT c\n',
        config={
            "Config.Shell": ["/bin/ash", "-c"],
            "Config.Cmd": ["/bin/ash", "-c", "a b"],
            "Config.Entrypoint": ["/bin/ash", "-c", "c"],
        },
    ),
    Case(
        "SHELL takes JSON form only",
        "FROM BASE\nSHELL /bin/ash -c\n",
        fails="SHELL requires the arguments to be in JSON form",
    ),
    Case(
        "network none has the loopback interface only",
        "FROM BASE\nRUN --network=none ls /sys/class/net > /o\n",
        gives={"o": "lo\n"},
    ),
    Case(
        "an unknown network mode is refused",
        "FROM BASE\nRUN --network=x true\n",
        fails='invalid network mode "x"',
    ),
    Case(
        "network host needs its entitlement",
        "FROM BASE\nRUN --network=host true\n",
        fails="network.host is not allowed",
    ),
    Case(
        "network host works with its entitlement",
        "FROM BASE\nRUN --network=host ls -d /sys/class/net/lo > /o\n",
        options=("--allow", "network.host"),
        gives={"o": "/sys/class/net/lo\n"},
    ),
    Case(
        "security sandbox is the default",
        "FROM BASE\nRUN --security=sandbox echo a > /o\n",
        gives={"o": "a\n"},
        is_beyond=True,
    ),
    Case(
        "security insecure is refused",
        "FROM BASE\nRUN --security=insecure true\n",
        fails="security.insecure is not allowed",
        is_beyond=True,
    ),
    Case(
        "devices are refused by name",
        "FROM BASE\nRUN --device=vendor.com/d=x true\n",
        fails="device",
        skep_says="RUN --device is not supported: vendor.com/d=x",
    ),
    Case(
        "an unknown flag is refused",
        "FROM BASE\nRUN --mounts=x true\n",
        fails="nknown flag:",
        skep_says="Unknown flag: mounts",
    ),
    Case(
        "BUILDKIT_SANDBOX_HOSTNAME sets the host name",
        "FROM BASE\nRUN hostname > /o\n",
        options=("--build-arg", "BUILDKIT_SANDBOX_HOSTNAME=box"),
        gives={"o": "box\n"},
    ),
)

MOUNTS = (
    Case(
        "bind mounts are read-only",
        "FROM BASE AS s\nRUN mkdir /d && echo of-stage > /d/f\nFROM BASE\nRUN --mount=target=/c --mount=type=bind,from=s,source=/d,dst=/s "
        "cat /c/f /s/f > /o; ! echo x > /c/f && ! echo x > /s/f\nRUN --mount=from=s,source=d/f,target=/one cat /one >> /o\n",
        files={"f": "of-context\n"},
        gives={"o": "of-context\nof-stage\nof-stage\n"},
        lacks=("c", "s", "one"),
    ),
    Case(
        "writes to a bind mount are discarded",
        "FROM BASE\nRUN --mount=target=/c,rw echo more >> /c/f && cat /c/f > /o\nRUN --mount=target=/c cat /c/f >> /o\n",
        files={"f": "a\n"},
        gives={"o": "a\nmore\na\n"},
    ),
    Case(
        "a relative target is below the working directory",
        "FROM BASE\nWORKDIR /w\nRUN --mount=target=in cat /w/in/f > /o\nRUN --mount=target=. cat /w/f >> /o\nRUN --mount=type=tmpfs,target=t df /w/t | grep -c tmpfs >> /o\n",
        files={"f": "a\n"},
        gives={"o": "a\na\n1\n"},
    ),
    Case("the root is no target", "FROM BASE\nRUN --mount=target=/ true\n", fails='invalid mount target "/"'),
    Case(
        "a missing source is refused",
        "FROM BASE\nRUN --mount=source=nosuch,target=/x true\n",
        fails="nosuch",
        skep_says="nosuch",
    ),
    Case(
        "mount options substitute variables",
        "FROM BASE AS s\nRUN echo s > /f\nFROM BASE\nARG T=bind D=/in\nRUN --mount=type=$T,from=s,target=${D} cat /in/f > /o\n",
        gives={"o": "s\n"},
    ),
    Case(
        "from does not substitute variables",
        "FROM BASE\nARG S=x\nRUN --mount=from=$S,target=/x true\n",
        fails="'from' doesn't support variable expansion, define alias stage instead",
    ),
    Case(
        "a cache is kept by its id",
        "FROM BASE\nRUN --mount=type=cache,target=/kept-UNIQUE echo a > /kept-UNIQUE/f\nRUN --mount=type=cache,id=/kept-UNIQUE,target=/other cat /other/f > /o\n"
        "RUN --mount=type=cache,target=/kept-UNIQUE,ro ! touch /kept-UNIQUE/g 2>/dev/null\nRUN --mount=type=cache,id=second-UNIQUE,target=/kept-UNIQUE ls /kept-UNIQUE | wc -l >> /o\n",
        gives={"o": "a\n0\n"},
    ),
    Case(
        "a cache starts with the files of from",
        "FROM BASE AS s\nRUN mkdir -p /x/d && echo base > /x/d/f && chown 5:6 /x/d/f\nFROM BASE\n"
        "RUN --mount=type=cache,id=c-UNIQUE,from=s,source=/x/d,target=/c cat /c/f > /o && stat -c %u:%g /c/f >> /o && echo more >> /c/f\n"
        "RUN --mount=type=cache,id=c-UNIQUE,from=s,source=/x/d,target=/c cat /c/f >> /o\n"
        "RUN --mount=type=cache,id=c-UNIQUE,target=/c ls /c | wc -l >> /o\nRUN --mount=from=s,source=/x/d,target=/s cat /s/f >> /o\n",
        gives={"o": "base\n5:6\nbase\nmore\n0\nbase\n"},
    ),
    Case(
        "owner and mode apply to a new cache",
        "FROM BASE\nRUN --mount=type=cache,id=m-UNIQUE,target=/c,mode=0700,uid=7,gid=8 stat -c %a:%u:%g /c > /o; chmod 755 /c\n"
        "RUN --mount=type=cache,id=m-UNIQUE,target=/c,mode=0700,uid=7,gid=8 stat -c %a:%u:%g /c >> /o\nRUN --mount=type=cache,id=m-UNIQUE,target=/c stat -c %a:%u:%g /c >> /o\n",
        gives={"o": "700:7:8\n755:7:8\n755:0:0\n"},
    ),
    Case(
        "BUILDKIT_CACHE_MOUNT_NS separates caches",
        "FROM BASE\nRUN --mount=type=cache,id=ns-UNIQUE,target=/c ls /c | wc -l > /o; touch /c/f\n",
        options=("--build-arg", "BUILDKIT_CACHE_MOUNT_NS=other"),
        gives={"o": "0\n"},
    ),
    Case(
        "an unknown sharing mode is refused",
        "FROM BASE\nRUN --mount=type=cache,target=/c,sharing=mine true\n",
        fails='unsupported sharing value "mine"',
    ),
    Case(
        "a tmpfs mount has a size",
        "FROM BASE\nRUN --mount=type=tmpfs,target=/m,size=1m df -k /m | tail -n 1 | awk '{print $2}' > /o; touch /m/x\n",
        gives={"o": "1024\n"},
        lacks=("m", "m/x"),
    ),
    Case(
        "a secret is a file, a variable or both",
        "FROM BASE\nRUN --mount=type=secret,id=s stat -c %a:%u /run/secrets/s > /o && cat /run/secrets/s >> /o\n"
        "RUN --mount=type=secret,id=s,target=/a/b,mode=0440,uid=5 stat -c %a:%u /a/b >> /o\n"
        'RUN --mount=type=secret,id=s,env=TOKEN echo "$TOKEN" >> /o && ! test -e /run/secrets/s\n'
        'RUN --mount=type=secret,id=s,env=TOKEN,target=/both cat /both >> /o && test -n "$TOKEN"\n'
        "RUN --mount=type=secret,id=none test ! -e /run/secrets/none\n",
        files={"token": "value\n"},
        options=("--secret", "id=s,src=CONTEXT/token"),
        gives={"o": "400:0\nvalue\n440:5\nvalue\n\nvalue\n"},
        lacks=("run/secrets/s", "a/b", "both"),
    ),
    Case(
        "a missing required secret fails the build",
        "FROM BASE\nRUN --mount=type=secret,id=none,required true\n",
        fails="secret none: not found",
    ),
    Case(
        "a missing required ssh agent fails the build",
        "FROM BASE\nRUN --mount=type=ssh,required=true true\n",
        fails="ssh",
        skep_says="ssh agent default: not found",
    ),
    Case(
        "an unknown mount type is refused",
        "FROM BASE\nRUN --mount=type=x,target=/x true\n",
        fails='unsupported mount type "x"',
    ),
)

CONFIGURATION = (
    Case(
        "the last CMD is used",
        'FROM BASE\nCMD ["x"]\nCMD ["exec_cmd", "p1_cmd"]\n',
        config={"Config.Cmd": ["exec_cmd", "p1_cmd"], "Config.Entrypoint": None},
    ),
    Case(
        "ENTRYPOINT resets the CMD of the base image",
        "FROM BASE\nENTRYPOINT exec_entry p1_entry\n",
        config={"Config.Cmd": None, "Config.Entrypoint": ["/bin/sh", "-c", "exec_entry p1_entry"]},
    ),
    Case(
        "ENTRYPOINT keeps the CMD of its stage",
        'FROM BASE\nCMD exec_cmd p1_cmd\nENTRYPOINT ["exec_entry", "p1_entry"]\n',
        config={
            "Config.Cmd": ["/bin/sh", "-c", "exec_cmd p1_cmd"],
            "Config.Entrypoint": ["exec_entry", "p1_entry"],
        },
    ),
    Case(
        "ENTRYPOINT resets the CMD of the base stage",
        'FROM BASE AS a\nCMD ["x"]\nFROM a\nENTRYPOINT ["y"]\n',
        config={"Config.Cmd": None, "Config.Entrypoint": ["y"]},
    ),
    Case(
        "a LABEL without = is refused",
        'FROM BASE AS a\nLABEL "com.example.vendor"="ACME Incorporated" version="1.0"\nLABEL description="This text illustrates \\\nthat label-values can span multiple lines." a=b\\ c\n'
        "FROM BASE AS b\nLABEL of=b\nRUN echo b > /b\nFROM a\nLABEL version=2.0 old style\nCOPY --from=b /b /b\n",
        fails="can't find = in",
    ),
    Case(
        "labels come from base stages and the client",
        'FROM BASE AS a\nLABEL "com.example.vendor"="ACME Incorporated" version="1.0"\nLABEL description="This text illustrates \\\nthat label-values can span multiple lines." a=b\\ c\n'
        "FROM BASE AS b\nLABEL of=b\nRUN echo b > /b\nFROM a\nLABEL version=2.0\nLABEL old style  here\nCOPY --from=b /b /b\n",
        options=("--label", "version=3.0", "--label", "c="),
        config={
            "Config.Labels": {
                "com.example.vendor": "ACME Incorporated",
                "version": "3.0",
                "description": "This text illustrates that label-values can span multiple lines.",
                "a": "b c",
                "old": "style  here",
                "c": "",
            }
        },
    ),
    Case(
        "MAINTAINER sets the author",
        "FROM BASE\nMAINTAINER Me <me@example.org>\n",
        config={"Author": "Me <me@example.org>"},
    ),
    Case(
        "EXPOSE takes ranges and protocols",
        "FROM BASE\nEXPOSE 80 80/udp 90-92/TCP 100/sctp 127.0.0.1:8:9\n",
        config={
            "Config.ExposedPorts": {
                "80/tcp": {},
                "80/udp": {},
                "90/tcp": {},
                "91/tcp": {},
                "92/tcp": {},
                "100/sctp": {},
                "9/tcp": {},
            }
        },
    ),
    Case(
        "a port that is not a number is refused",
        "FROM BASE\nEXPOSE http\n",
        fails="nvalid containerPort: http",
    ),
    Case(
        "ENV takes pairs, quotes and the legacy form",
        'FROM BASE\nENV MY_NAME="John Doe" MY_DOG=Rex\\ The\\ Dog \\\n    MY_CAT=fluffy\nENV ONE TWO= THREE=world\n',
        config={
            "Config.Env": [
                PATH,
                "MY_NAME=John Doe",
                "MY_DOG=Rex The Dog",
                "MY_CAT=fluffy",
                "ONE=TWO= THREE=world",
            ]
        },
    ),
    Case("ENV without a value is refused", "FROM BASE\nENV A\n", fails="ENV must have two arguments"),
    Case(
        "VOLUME takes words or JSON and keeps what steps write",
        'FROM BASE\nVOLUME ["/v", "/w x"]\nVOLUME /a /b\nRUN mkdir -p /v && echo kept > /v/f\n',
        gives={"v/f": "kept\n"},
        config={"Config.Volumes": {"/v": {}, "/w x": {}, "/a": {}, "/b": {}}},
    ),
    Case(
        "USER takes names, numbers and groups",
        "FROM BASE\nRUN mkdir -m 777 /d\nUSER alice\nRUN id -u > /d/a; id -g >> /d/a\nUSER 5:6\nRUN id -u > /d/b; id -g >> /d/b\nUSER alice:root\nRUN id -g > /d/c\nUSER 1000\nRUN id -g > /d/d\nUSER 77\nRUN id -g > /d/e\n",
        gives={"d/a": "1000\n1001\n", "d/b": "5\n6\n", "d/c": "0\n", "d/d": "1001\n", "d/e": "0\n"},
        config={"Config.User": "77"},
    ),
    Case("an unknown user fails the step", "FROM BASE\nUSER nosuch\nRUN true\n", fails="nosuch"),
    Case(
        "relative working directories are below the last one",
        "FROM BASE\nWORKDIR /a\nWORKDIR b\nENV D=c/../d\nWORKDIR $D$NOSUCH\nRUN pwd > /o\n",
        gives={"o": "/a/b/d\n"},
        owned={"a/b/d": (0o755, 0, 0)},
        config={"Config.WorkingDir": "/a/b/d"},
    ),
    Case(
        "a new working directory belongs to the last USER",
        "FROM BASE\nRUN mkdir /there\nUSER alice\nWORKDIR /home/alice/w\nWORKDIR /there/x\nUSER 5\nWORKDIR /five\nUSER 5:6\nWORKDIR /six\nUSER nosuch\nWORKDIR /no\n",
        owned={
            "home": (0o755, 1000, 1001),
            "home/alice/w": (0o755, 1000, 1001),
            "there": (0o755, 0, 0),
            "there/x": (0o755, 1000, 1001),
            "five": (0o755, 5, 5),
            "six": (0o755, 5, 6),
            "no": (0o755, 0, 0),
        },
    ),
    Case(
        "an empty WORKDIR keeps the last one",
        "FROM BASE\nWORKDIR /a\nWORKDIR $NOSUCH\n",
        config={"Config.WorkingDir": "/a"},
    ),
    Case(
        "STOPSIGNAL takes a name or a number",
        "FROM BASE\nSTOPSIGNAL 9\nSTOPSIGNAL SIGRTMIN+3\n",
        config={"Config.StopSignal": "SIGRTMIN+3"},
    ),
    Case(
        "an unknown stop signal is refused",
        "FROM BASE\nSTOPSIGNAL SIGNOSUCH\n",
        fails="nvalid signal: SIGNOSUCH",
    ),
    Case(
        "HEALTHCHECK has all its options",
        "FROM BASE\nHEALTHCHECK CMD false\nHEALTHCHECK --interval=5m --timeout=3s --start-period=1s --start-interval=2s --retries=4 \\\n  CMD curl -f http://localhost/ || exit 1\n",
        config={
            "Config.Healthcheck": {
                "Test": ["CMD-SHELL", "curl -f http://localhost/ || exit 1"],
                "Interval": 300_000_000_000,
                "Timeout": 3_000_000_000,
                "StartPeriod": 1_000_000_000,
                "StartInterval": 2_000_000_000,
                "Retries": 4,
            }
        },
    ),
    Case(
        "HEALTHCHECK takes JSON or NONE",
        'FROM BASE AS a\nHEALTHCHECK CMD ["a", "b"]\nFROM a\nHEALTHCHECK NONE\n',
        config={"Config.Healthcheck": {"Test": ["NONE"]}},
    ),
    Case(
        "an interval below 1 ms is refused",
        "FROM BASE\nHEALTHCHECK --interval=1us CMD x\n",
        fails="cannot be less than 1ms",
    ),
)

TRIGGERS = (
    Case(
        "ONBUILD is stored in the image",
        "FROM BASE\nONBUILD RUN echo x > /o\nONBUILD copy a /a\n",
        config={"Config.OnBuild": ["RUN echo x > /o", "copy a /a"]},
    ),
    Case(
        "triggers of a stage run in stages based on it, in order, once",
        "FROM BASE AS a\nONBUILD RUN echo once >> /o\nONBUILD ENV T=t\nONBUILD COPY f /f\nFROM a AS b\nRUN echo own >> /o\nFROM b\nRUN echo $T >> /o\n",
        files={"f": "f"},
        gives={"o": "once\nown\nt\n", "f": "f"},
        config={"Config.OnBuild": None},
    ),
    Case(
        "a trigger uses stages of the Dockerfile that it runs in",
        "FROM BASE AS rt\nONBUILD COPY --from=build /out/app /app\nONBUILD RUN --mount=type=bind,from=build,source=/out,target=/in cp /in/app /mounted\n"
        "FROM BASE AS build\nRUN mkdir /out && echo made > /out/app\nFROM rt\n",
        gives={"app": "made\n", "mounted": "made\n"},
    ),
    Case(
        "chained triggers are refused",
        "FROM BASE\nONBUILD ONBUILD RUN x\n",
        fails="Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed",
    ),
    Case(
        "FROM as a trigger is refused",
        "FROM BASE\nONBUILD FROM x\n",
        fails="FROM isn't allowed as an ONBUILD trigger",
    ),
    Case(
        "a trigger that fails ends the build",
        "FROM BASE AS a\nONBUILD RUN exit 4\nFROM a\n",
        fails="did not complete successfully: exit code: 4",
    ),
    Case(
        "a trigger can have a here-document",
        "FROM BASE AS a\nONBUILD RUN <<EOF\necho here > /o\nEOF\nFROM a\nRUN true\n",
        gives={"o": "here\n"},
    ),
)

CONTEXTS = (
    Case(
        "a directory is a base and a source",
        "FROM more AS m\nRUN echo ran > /ran\nFROM BASE\nCOPY --from=more f /f\nRUN --mount=from=more,target=/m cat /m/f > /o\n",
        files={"f": "f\n"},
        options=("--build-context", "more=CONTEXT"),
        gives={"f": "f\n", "o": "f\n"},
    ),
    Case(
        "a directory replaces an image",
        "FROM alpine\nLABEL a=b\nCOPY f /g\n",
        files={"f": "f\n"},
        options=("--build-context", "docker.io/library/alpine:latest=CONTEXT"),
        gives={"f": "f\n", "g": "f\n"},
        config={"Config.Labels": {"a": "b"}},
    ),
    Case(
        "an image replaces a stage",
        "FROM nosuch:3 AS s\nRUN false\nFROM s\nRUN echo a > /o\n",
        options=("--build-context", "s=docker-image://busybox:1"),
        gives={"o": "a\n"},
    ),
)

TIMES = (
    Case(
        "SOURCE_DATE_EPOCH bounds the times of the image",
        "FROM BASE\nARG SOURCE_DATE_EPOCH\nRUN echo $SOURCE_DATE_EPOCH > /o\nENV A=b\n",
        options=("--build-arg", "SOURCE_DATE_EPOCH=1700000000"),
        gives={"o": "1700000000\n"},
        config={"Created": "2023-11-14T22:13:20Z"},
    ),
    Case(
        "a global ARG sets SOURCE_DATE_EPOCH",
        "ARG SOURCE_DATE_EPOCH=1700000000\nFROM BASE\nARG SOURCE_DATE_EPOCH\nRUN echo $SOURCE_DATE_EPOCH > /o\n",
        gives={"o": "1700000000\n"},
        config={"Created": "2023-11-14T22:13:20Z"},
        is_beyond=True,
    ),
    Case(
        "SOURCE_DATE_EPOCH is a number",
        "FROM BASE\nRUN true\n",
        options=("--build-arg", "SOURCE_DATE_EPOCH=yesterday"),
        fails="invalid SOURCE_DATE_EPOCH: yesterday",
    ),
)
