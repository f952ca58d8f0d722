"""Rare combinations of the language, each as a case with the result of the BuildKit in Docker Engine 28.5."""

from tests.support.builds.dockerfile_cases import Case

PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

WRITING = (
    Case(
        "a byte order mark precedes a directive",
        "\ufeff# escape=`\nFROM BASE\nRUN echo a `\n b > /o\n",
        gives={"o": "a b\n"},
    ),
    Case(
        "lines end with CR LF",
        '# escape=\\\r\nFROM BASE\r\nRUN echo a \\\r\n# inner\r\n && echo b > /o\r\nENV A=1 \\\r\n  B=2\r\nCMD ["a", \\\r\n "b"]\r\n',
        gives={"o": "b\n"},
        config={"Config.Env": [PATH, "A=1", "B=2"], "Config.Cmd": ["a", "b"]},
    ),
    Case(
        "a here-document has CR LF",
        "FROM BASE\r\nCOPY <<EOF /o\r\nline\r\nEOF\r\nRUN echo a > /p\r\n",
        gives={"o": "line\r\n", "p": "a\n"},
    ),
    Case(
        "two hashes are a comment", "## escape=`\nFROM BASE\nRUN echo a \\\n b > /o\n", gives={"o": "a b\n"}
    ),
    Case(
        "a directive has spaces around its parts",
        "#    escape    =    `   \nFROM BASE\nRUN echo a `\n b > /o\n",
        gives={"o": "a b\n"},
    ),
    Case(
        "a continued line has comments, empty lines and spaces after its escape",
        "FROM BASE\nRUN echo a \\  \n  # c1 \\\n# c2\n\\\n\n b > /o\nENV A=x\\ \\\n  B=y\n",
        gives={"o": "a b\n"},
        config={"Config.Env": [PATH, "A=x ", "B=y"]},
    ),
    Case("the last line may be continued", "FROM BASE\nRUN echo a > /o \\\n", gives={"o": "a\n"}),
    Case(
        "a backtick escapes quotes and variables",
        '# escape=`\nFROM BASE\nENV P=C:\\x\\y Q=`"q`" R="a`$b"\nCOPY a `\n /d`\n/\n',
        files={"a": "A"},
        gives={"d/a": "A"},
        config={"Config.Env": [PATH, "P=C:\\x\\y", 'Q="q"', "R=a$b"]},
    ),
    Case(
        "a JSON list has escapes",
        'FROM BASE\nCMD ["\\u00e9", "é", "a\\nb", "\\/"]\n',
        config={"Config.Cmd": ["é", "é", "a\nb", "/"]},
    ),
    Case(
        "text after a JSON list makes it a command for the shell",
        'FROM BASE\nRUN ["echo", "a"] x || echo shell > /o\n',
        gives={"o": "shell\n"},
    ),
    Case(
        "a JSON list with a comma at its end is for the shell",
        'FROM BASE\nCMD ["a",]\n',
        config={"Config.Cmd": ["/bin/sh", "-c", '["a",]']},
    ),
    Case(
        "here-documents of one instruction have quotes and tabs",
        'FROM BASE\nARG A=v\nCOPY <<a <<"b" <<-c /d/\nA $A\na\nB $A\nb\n\t\tC\n\tc\n',
        gives={"d/a": "A v\n", "d/b": "B $A\n", "d/c": "C\n"},
    ),
    Case(
        "a here-document has modifiers and escapes",
        "FROM BASE\nENV E=env\nCOPY <<EOF /o\n${E:-x} ${N:-none} \\$E \\\\ \\x \"q\" 's'\nEOF\n",
        gives={"o": "env none $E \\ x \"q\" 's'\n"},
    ),
    Case(
        "a here-document has a file descriptor",
        "FROM BASE\nRUN cat 3<<EOF <&3 > /o\nfd3\nEOF\n",
        gives={"o": "fd3\n"},
    ),
    Case(
        "a here-document is behind a continued line",
        "FROM BASE\nRUN echo a && \\\n  cat <<EOF > /o\nx\nEOF\n",
        gives={"o": "x\n"},
    ),
    Case(
        "a script of a here-document gets the options of its shebang",
        "FROM BASE\nRUN <<EOF\n#!/bin/sh -e\necho $0 | sed s,.*/,, > /o\nEOF\n",
        gives={"o": "EOF\n"},
    ),
    Case(
        "CMD takes no here-document",
        "FROM BASE\nCMD <<EOF\necho x\nEOF\n",
        fails="unknown instruction: echo",
        skep_says="unknown instruction: ECHO",
    ),
    Case(
        "names are not ASCII",
        'FROM BASE\nENV A=é B="ü ö"\nLABEL "ключ"="значение"\nRUN echo "$A" > /файл\nCOPY é /é\n',
        files={"é": "1"},
        gives={"файл": "é\n", "é": "1"},
        config={"Config.Env": [PATH, "A=é", "B=ü ö"], "Config.Labels": {"ключ": "значение"}},
    ),
)

VALUES = (
    Case(
        "quotes and backslashes of ENV",
        'FROM BASE\nENV A="a b" D="a\\"b" E=\'a"b\' F="$A" G=\'$A\' H=\\$A I="\\$A" J=a\\\\b K="a\\\\b" L=\'a\\b\' M=a"b"c N="a"\'b\'c O=\n',
        config={
            "Config.Env": [
                PATH,
                "A=a b",
                'D=a"b',
                'E=a"b',
                "F=",
                "G=$A",
                "H=$A",
                "I=$A",
                "J=a\\b",
                "K=a\\b",
                "L=a\\b",
                "M=abc",
                "N=abc",
                "O=",
            ]
        },
    ),
    Case(
        "the legacy form of ENV keeps inner spaces",
        'FROM BASE\nENV A   b  c   d  \nENV B "x y" z\n',
        config={"Config.Env": [PATH, "A=b  c   d", "B=x y z"]},
    ),
    Case(
        "nested modifiers and variables of the shell",
        "FROM BASE\nENV N=A A=1\nENV B=${N:-${A}} C=${U:-${N:-x}} D=${U:-$A$N} G=a$ H=$$ I=[$1] K=[$@]\n",
        config={"Config.Env": [PATH, "N=A", "A=1", "B=A", "C=A", "D=1A", "G=a$", "H=", "I=[]", "K=[]"]},
    ),
    Case(
        "quotes of LABEL",
        'FROM BASE\nLABEL a="x y" b=\'x $PATH\' "c d"=e f="line1\\\nline2" g=a\\"b h="a\\\\b" i= j="" l=a=b\n',
        config={
            "Config.Labels": {
                "a": "x y",
                "b": "x $PATH",
                "c d": "e",
                "f": "line1line2",
                "g": 'a"b',
                "h": "a\\b",
                "i": "",
                "j": "",
                "l": "a=b",
            }
        },
    ),
    Case(
        "an empty given value overrides a default",
        'FROM BASE\nARG X=def\nRUN echo "[$X]" > /o\n',
        options=("--build-arg", "X="),
        gives={"o": "[]\n"},
    ),
    Case(
        "global arguments are substituted in one another",
        'ARG A=1 B=2\nARG A=3\nARG C=${A}x${B}\nFROM BASE AS x\nARG A\nARG C\nARG B=own\nRUN echo "$A $B $C" > /o\nFROM x\nRUN echo "$A $B $C" >> /o\nARG C=re\nRUN echo "$A $B $C" >> /o\n',
        gives={"o": "3 own 3x2\n3 own 3x2\n3 own re\n"},
    ),
    Case(
        "an argument of a stage does not name the next base",
        "FROM BASE AS a\nARG IMG=a\nFROM ${IMG}\n",
        fails="base name (${IMG}) should not be blank",
    ),
    Case(
        "EXPOSE splits a variable",
        'FROM BASE\nARG P="80 81" Q=90\nEXPOSE $P $Q/udp ${Q}0-${Q}1\n',
        config={
            "Config.ExposedPorts": {"80/tcp": {}, "81/tcp": {}, "90/udp": {}, "900/tcp": {}, "901/tcp": {}}
        },
    ),
    Case("a range of ports ascends", "FROM BASE\nEXPOSE 82-80\n", fails="82-80"),
    Case("a port has a known protocol", "FROM BASE\nEXPOSE 80/foo\n", fails="nvalid proto: foo"),
    Case(
        "VOLUME with text that is not JSON",
        "FROM BASE\nVOLUME /e,/f\nVOLUME rel\n",
        config={"Config.Volumes": {"/e,/f": {}, "rel": {}}},
    ),
    Case(
        "the words of a STOPSIGNAL",
        "FROM BASE\nARG S=TERM\nSTOPSIGNAL SIG$S\n",
        config={"Config.StopSignal": "SIGTERM"},
    ),
    Case("a signal is not zero", "FROM BASE\nSTOPSIGNAL 0\n", fails="nvalid signal: 0"),
    Case(
        "NONE takes no arguments",
        "FROM BASE\nHEALTHCHECK NONE x\n",
        fails="HEALTHCHECK NONE takes no arguments",
    ),
    Case(
        "a health check of a stage replaces that of its base",
        'FROM BASE AS a\nHEALTHCHECK --interval=5s --retries=2 CMD ["x"]\nFROM a\nHEALTHCHECK --timeout=1m CMD y z\n',
        config={"Config.Healthcheck": {"Test": ["CMD-SHELL", "y z"], "Timeout": 60_000_000_000}},
    ),
    Case(
        "a health check that is no JSON list is for the shell",
        "FROM BASE\nHEALTHCHECK CMD [\"a\", 'b']\n",
        config={"Config.Healthcheck": {"Test": ["CMD-SHELL", "[\"a\", 'b']"]}},
    ),
    Case(
        "retries are not negative",
        "FROM BASE\nHEALTHCHECK --retries=-1 CMD x\n",
        fails="--retries cannot be negative (-1)",
    ),
    Case(
        "WORKDIR has quotes, spaces and dots",
        'FROM BASE\nWORKDIR "/a b"\nRUN pwd > /o\nWORKDIR  x y \nRUN pwd >> /o\nWORKDIR ../z/./\nRUN pwd >> /o\n',
        gives={"o": "/a b\n/a b/x y\n/a b/z\n"},
    ),
    Case(
        "a directory that is there keeps its mode as WORKDIR",
        "FROM BASE\nRUN mkdir -m 700 /x\nUSER alice\nWORKDIR /x\nUSER root\nWORKDIR y\n",
        owned={"x": (0o700, 0, 0), "x/y": (0o755, 0, 0)},
    ),
    Case(
        "CMD has a mark for its arguments",
        "FROM BASE\nCMD x\n",
        config={"Config.ArgsEscaped": True, "Config.Cmd": ["/bin/sh", "-c", "x"]},
    ),
    Case(
        "a stage from scratch starts at the root",
        "FROM scratch\nCOPY a b/\n",
        files={"a": "A"},
        gives={"b/a": "A"},
        config={"Config.WorkingDir": "/", "Config.Env": [PATH]},
    ),
    Case(
        "the history of a build",
        'FROM BASE\nARG Z=1 A\nENV E=$Z\nEXPOSE 81-82 9/udp\nHEALTHCHECK --start-interval=2s CMD x\nONBUILD RUN y\nVOLUME /v\nRUN echo "$Z" > /o\nCOPY --chmod=640 --chown=7:8 ${N:-f} <<d /d/\nd\nRUN <<S\n#!/bin/sh\ntouch /p\nS\n',
        files={"f": "F"},
        options=("--label", "l=m"),
        config={"Config.Labels": {"l": "m"}, "Config.OnBuild": ["RUN y"]},
        history=(
            "ARG Z=1 A",
            "ENV E=1",
            "EXPOSE [81/tcp 82/tcp 9/udp]",
            'HEALTHCHECK &{["CMD-SHELL" "x"] "0s" "0s" "0s" "2s" \'\\x00\'}',
            "VOLUME [/v]",
            'RUN |2 Z=1 A= /bin/sh -c echo "$Z" > /o # buildkit',
            "COPY --chown=7:8 --chmod=640 f <<d /d/ # buildkit",
            "RUN |2 Z=1 A= /bin/sh -c /dev/pipes/S # buildkit",
        ),
    ),
)

STEPS = (
    Case(
        "a secret that is missing is an empty variable",
        'FROM BASE\nRUN --mount=type=secret,id=none,env=TOKEN echo "[${TOKEN-unset}]" > /o\nRUN echo "[${TOKEN-unset}]" >> /o\n',
        gives={"o": "[]\n[unset]\n"},
    ),
    Case(
        "a secret has its id from its target",
        "FROM BASE\nRUN --mount=type=secret,target=/x/tok cat /x/tok > /o\n",
        files={"tok": "T"},
        options=("--secret", "id=tok,src=CONTEXT/tok"),
        gives={"o": "T"},
        lacks=("x/tok",),
    ),
    Case(
        "an ssh agent that is missing keeps its variable",
        'FROM BASE\nRUN --mount=type=ssh echo "$SSH_AUTH_SOCK" > /o\n',
        gives={"o": "/run/buildkit/ssh_agent.0\n"},
    ),
    Case(
        "a cache has a relative target and its user's rights",
        "FROM BASE\nRUN mkdir -m 777 /t\nWORKDIR /w\nRUN --mount=type=cache,id=r-UNIQUE,target=c,uid=1000,mode=0750 stat -c '%u %g %a' /w/c > /t/o\n"
        "USER alice\nRUN --mount=type=cache,id=r-UNIQUE,target=c,uid=1000,mode=0750 touch c/x && ls c > /t/p\n",
        gives={"t/o": "1000 0 750\n", "t/p": "x\n"},
    ),
    Case(
        "mounts are nested, and their keys have any case",
        "FROM BASE\nRUN --mount=TYPE=tmpfs,TARGET=/a --mount=type=tmpfs,target=/a/b touch /a/b/c && df /a/b | grep -c tmpfs > /o\n",
        gives={"o": "1\n"},
        lacks=("a", "a/b"),
    ),
    Case(
        "a mount has known keys",
        "FROM BASE\nRUN --mount=type=bind,targt=/x true\n",
        fails="unexpected key 'targt' in 'targt=/x'",
    ),
    Case(
        "a bind mount has no owner",
        "FROM BASE\nRUN --mount=type=bind,target=/c,uid=1 true\n",
        fails='uid not allowed for "bind" type mounts',
    ),
    Case("a mount has a target", "FROM BASE\nRUN --mount=type=bind true\n", fails="target"),
    Case(
        "a switch of a mount is true or false",
        "FROM BASE\nRUN --mount=type=cache,target=/c,ro=maybe true\n",
        fails="invalid value for ro: maybe",
    ),
    Case(
        "a flag is given once",
        "FROM BASE\nRUN --network=none --network=none true\n",
        fails="uplicate flag specified: --network",
        skep_says="Duplicate flag specified: network",
    ),
    Case(
        "triggers see given and global arguments",
        'ARG X=g\nFROM BASE AS a\nONBUILD ARG X\nONBUILD ARG V=1\nONBUILD RUN echo "$X $V" > /o\nONBUILD WORKDIR /w\nONBUILD LABEL v=$V\n'
        "FROM a AS b\nONBUILD RUN echo b >> /o\nRUN pwd >> /o\nFROM b\nRUN pwd >> /o\n",
        options=("--build-arg", "V=7"),
        gives={"o": "g 7\n/w\nb\n/w\n"},
        config={"Config.Labels": {"v": "7"}, "Config.WorkingDir": "/w", "Config.OnBuild": None},
    ),
    Case(
        "triggers change the whole configuration",
        'FROM BASE AS a\nONBUILD ENV X=y\nONBUILD USER alice\nONBUILD ENTRYPOINT ["e"]\nONBUILD CMD ["c"]\nONBUILD EXPOSE 1\nONBUILD VOLUME /v\n'
        'ONBUILD STOPSIGNAL 3\nONBUILD HEALTHCHECK NONE\nONBUILD SHELL ["/bin/sh","-ec"]\nFROM a\n',
        config={
            "Config.Env": [PATH, "X=y"],
            "Config.User": "alice",
            "Config.Entrypoint": ["e"],
            "Config.Cmd": ["c"],
            "Config.ExposedPorts": {"1/tcp": {}},
            "Config.Volumes": {"/v": {}},
            "Config.StopSignal": "3",
            "Config.Healthcheck": {"Test": ["NONE"]},
            "Config.Shell": ["/bin/sh", "-ec"],
        },
    ),
    Case(
        "a trigger may be of an instruction that is unknown here",
        "FROM BASE\nONBUILD FOO x\n",
        config={"Config.OnBuild": ["FOO x"]},
    ),
    Case(
        "the ignore file of a Dockerfile has all forms",
        "FROM BASE\nCOPY . /d/\n",
        files={
            "Dockerfile.dockerignore": "# c\n**/*.tmp\n!keep.tmp\ndocs/**\n!docs/**/*.md\n[a-b]z\n",
            ".dockerignore": "*\n",
            "a.tmp": "",
            "keep.tmp": "",
            "az": "",
            "cz": "",
            "docs/a": "",
            "docs/b.md": "",
            "docs/x/y/c.md": "",
            "s/t.tmp": "",
            "s/keep.tmp": "",
        },
        gives={"d/keep.tmp": "", "d/cz": "", "d/docs/b.md": "", "d/docs/x/y/c.md": ""},
        lacks=("d/a.tmp", "d/az", "d/docs/a", "d/s/t.tmp", "d/s/keep.tmp"),
    ),
    Case(
        "an ignore file excludes all but some files",
        "FROM BASE\nCOPY . /d/\n",
        files={
            ".dockerignore": "*\n!src\nsrc/*.o\n!src/keep.o\n**/gen\n",
            "src/a.c": "",
            "src/a.o": "",
            "src/keep.o": "",
            "src/sub/b.o": "",
            "src/gen/x": "",
            "other/x": "",
            "top": "",
        },
        gives={"d/src/a.c": "", "d/src/keep.o": "", "d/src/sub/b.o": ""},
        lacks=("d/src/a.o", "d/src/gen", "d/other", "d/top", "d/.dockerignore"),
    ),
    Case(
        "exclude patterns have exceptions",
        "FROM BASE\nCOPY --exclude=*.md --exclude=!keep.md --exclude=**/tmp src /d/\n",
        files={
            "src/a": "",
            "src/b.md": "",
            "src/keep.md": "",
            "src/tmp/x": "",
            "src/y/tmp/z": "",
            "src/y/w": "",
        },
        gives={"d/a": "", "d/keep.md": "", "d/y/w": ""},
        lacks=("d/b.md", "d/tmp", "d/y/tmp"),
    ),
    Case(
        "exclude takes no variables",
        "FROM BASE\nARG P=*.md\nCOPY --exclude=$P src /d/\n",
        files={"src/b.md": ""},
        gives={"d/b.md": ""},
    ),
    Case(
        "files of COPY do not belong to the user",
        "FROM BASE\nUSER alice\nWORKDIR /w\nCOPY a b/\nCOPY --chown=5 a /n/m/a\nCOPY --chown=alice:root a c\n",
        files={"a": "A"},
        owned={
            "w": (0o755, 1000, 1001),
            "w/b": (0o755, 0, 0),
            "w/b/a": (0o644, 0, 0),
            "n/m": (0o755, 5, 5),
            "n/m/a": (0o644, 5, 5),
            "w/c": (0o644, 1000, 0),
        },
    ),
    Case(
        "symbolic modes change files and directories",
        "FROM BASE\nCOPY --chmod=u=rwx,go-w a /a\nCOPY --chmod=a+X d /d\nCOPY --chmod=+t,u+s a /b\n",
        files={"a": "A", "d/b": "B"},
        owned={"a": (0o744, 0, 0), "d/b": (0o644, 0, 0), "d": (0o755, 0, 0), "b": (0o5644, 0, 0)},
    ),
    Case(
        "a copy from a stage keeps links, modes and owners",
        "FROM BASE AS s\nRUN mkdir -m 711 /x && touch /x/f && chown 3:4 /x && ln -s f /x/l && ln /x/f /x/h && ln -s /nosuch /x/dangling\n"
        "FROM BASE\nCOPY --from=S /x /y\nCOPY --from=s --chown=9 /x /w\nRUN for l in /y/l /y/dangling /w/l; do readlink $l >> /o; done; stat -c %h /y/f >> /o\n",
        gives={"o": "f\n/nosuch\nf\n2\n"},
        owned={"y": (0o755, 0, 0), "y/f": (0o644, 0, 0), "w": (0o755, 9, 9), "w/f": (0o644, 9, 9)},
    ),
    Case(
        "a volume keeps later writes, copies and removals",
        "FROM BASE\nRUN mkdir /v && echo a > /v/a\nVOLUME /v\nRUN echo b > /v/b; rm /v/a\nCOPY c /v/c\n",
        files={"c": "C"},
        gives={"v/b": "b\n", "v/c": "C"},
        lacks=("v/a",),
    ),
    Case(
        "files and directories of the base change places",
        "FROM BASE\nRUN rm /etc/group && mkdir /etc/group && rm -rf /tmp && touch /tmp\n",
        gives={"tmp": ""},
        owned={"etc/group": (0o755, 0, 0)},
    ),
    Case(
        "a directory does not replace a file",
        "FROM BASE\nRUN echo > /f\nCOPY d /f\n",
        files={"d/b": "B"},
        fails="cannot copy to non-directory: ",
    ),
    Case(
        "a copy does not read its own stage",
        "FROM BASE AS a\nCOPY --from=a /x /x\n",
        fails="circular dependency detected on stage: a",
        skep_says="refers to current build stage",
    ),
    Case(
        "flags precede the sources", "FROM BASE\nCOPY a --chown=1 /x/\n", files={"a": "A"}, fails="--chown=1"
    ),
    Case("two dashes end the flags", "FROM BASE\nCOPY -- a /x\n", files={"a": "A"}, gives={"x": "A"}),
)

REFUSALS = (
    Case(
        "a base image that is here for another platform is refused",
        "FROM --platform=linux/arm64 BASE\nRUN true\n",
        fails="is here for linux/amd64, not linux/arm64",
        is_beyond=True,
    ),
    Case(
        "another language is refused by name",
        "FROM BASE\nRUN true\n",
        options=("--build-arg", "BUILDKIT_SYNTAX=nosuch/frontend:1"),
        fails="front end nosuch/frontend:1 is not supported",
        is_beyond=True,
    ),
    Case(
        "a context of an OCI layout is refused by name",
        "FROM BASE\nCOPY --from=more a /a\n",
        options=("--build-context", "more=oci-layout://CONTEXT/layout@sha256:" + 64 * "0"),
        fails="named context more is not supported",
        is_beyond=True,
    ),
    Case(
        "the name of a build changes nothing",
        "FROM BASE\nRUN echo a > /o\n",
        options=("--build-arg", "BUILDKIT_BUILD_NAME=x"),
        gives={"o": "a\n"},
    ),
    Case(
        "a name that the image lacks owns no file",
        "FROM BASE\nCOPY --chown=nosuch a /a\n",
        files={"a": "A"},
        fails="can't find uid for user nosuch",
        is_beyond=True,
    ),
    Case(
        "a stop signal exists on the node",
        "FROM BASE\nSTOPSIGNAL 65\n",
        fails="Invalid signal: 65",
        is_beyond=True,
    ),
    Case(
        "the path of WORKDIR is cleaned",
        "FROM BASE\nWORKDIR /a/./b//\n",
        config={"Config.WorkingDir": "/a/b"},
        is_beyond=True,
    ),
    Case(
        "a new directory in one with the set-group-ID bit belongs to root",
        "FROM BASE\nRUN mkdir /d && chmod 2775 /d && chgrp staff /d\nCOPY x /d/x\nWORKDIR /d/w\nRUN mkdir /d/r\n",
        files={"x/y": "Y"},
        is_beyond=True,
        owned={
            "d": (0o2775, 0, 1001),
            "d/x": (0o755, 0, 0),
            "d/x/y": (0o644, 0, 0),
            "d/r": (0o2755, 0, 1001),
        },
    ),
)
