"""The rules of a Dockerfile's syntax, variables and stages, each as a case."""

from tests.support.builds.dockerfile_cases import Case

ENV = "RUN env | sort | grep -v -e ^HOSTNAME -e ^HOME -e ^PWD -e ^SHLVL -e ^PATH -e ^_ > /o\n"

TEXT = (
    Case(
        "an escape character continues a line and comments inside it are removed",
        "  # about\n   FROM BASE\nRUN echo a \\\n# not of the command\n   # nor this\n  b   \\\n\n  && echo '#c' | cat > /o\n"
        "RUN echo one \\   \n two >> /o\n",
        gives={"o": "#c\none two\n"},
    ),
    Case(
        "the escape character is chosen by a directive",
        "# EsCaPe = `\nFROM BASE\nENV P=c:\\dir\nRUN echo $P `\n two > /o\nLABEL a=`$P\n",
        gives={"o": "c:\\dir two\n"},
        config={"Config.Labels": {"a": "$P"}},
    ),
    Case(
        "a directive is given once",
        "# escape=`\n# escape=`\nFROM BASE\n",
        fails="only one escape parser directive can be used",
    ),
    Case(
        "another escape character is refused",
        "# escape=x\nFROM BASE\n",
        fails="invalid escape token 'x' does not match ` or \\",
    ),
    Case(
        "a directive after a comment is a comment",
        "# about\n# escape=`\n# syntax=nosuch/frontend\nFROM BASE\nRUN echo a \\\n b > /o\n",
        gives={"o": "a b\n"},
    ),
    Case(
        "an unknown directive ends the directives",
        "# unknown=x\n# syntax=nosuch/frontend\nFROM BASE\nLABEL a=b\n",
        config={"Config.Labels": {"a": "b"}},
    ),
    Case(
        "the syntax directive names Docker's language",
        "#syntax = docker/dockerfile:1\nFROM BASE\nLABEL a=b\n",
        config={"Config.Labels": {"a": "b"}},
        is_beyond=True,
    ),
    Case(
        "instructions are written in any case",
        "from BASE As x\nrun echo a > /o\nLaBeL a=b\n",
        gives={"o": "a\n"},
        config={"Config.Labels": {"a": "b"}},
    ),
    Case(
        "an unknown instruction is refused",
        "FROM BASE\nRUNN x\n",
        fails="unknown instruction: RUNN",
    ),
    Case("a file without instructions is refused", "# nothing\n", fails="file with no instructions"),
    Case("a Dockerfile begins with FROM or ARG", "RUN x\n", fails="no build stage in current context"),
)

VARIABLES = (
    Case(
        "modifiers give words for values that are set, empty or unset",
        "FROM BASE\nENV set=v empty=\nENV a=${set:-x}|${empty:-x}|${unset:-x}|${set-x}|${empty-x}|${unset-x}\n"
        "ENV b=${set:+y}|${empty:+y}|${unset:+y}|${set+y}|${empty+y}|${unset+y}\nENV c=${unset:-${set}w} d=${set:?no}${empty?no}\n"
        + ENV,
        gives={"o": "a=v|x|x|v||x\nb=y|||y|y|\nc=vw\nd=v\nempty=\nset=v\n"},
    ),
    Case(
        "a variable that has to be set fails the build with its text",
        'FROM BASE\nENV a="${unset:?give it}"\n',
        fails="unset: give it",
    ),
    Case(
        "a variable that may not be empty fails the build",
        "FROM BASE\nENV e=\nENV a=${e:?}\n",
        fails="e: is not allowed to be empty",
    ),
    Case(
        "an unknown modifier is refused",
        "FROM BASE\nENV a=${b^x}\n",
        fails="unsupported modifier (^) in substitution",
    ),
    Case(
        "patterns remove the shortest or longest part",
        "FROM BASE\nENV str=foobarbaz\nENV a=${str#f*b} b=${str##f*b} c=${str%b*} d=${str%%b*} e=${str#nosuch} f=${str#?o}\n"
        + ENV,
        gives={"o": "a=arbaz\nb=az\nc=foobar\nd=foo\ne=foobarbaz\nf=obarbaz\nstr=foobarbaz\n"},
    ),
    Case(
        "a replacement needs its second slash",
        "FROM BASE\nENV str=foobarbaz q=a?b*c/d\nENV a=${str/ba/fo} b=${str//ba/fo} c=${str//a*/X} d=${q/\\?/Q} e=${q//\\*/S} f=${q/\\//-} g=${str/b?r}\n"
        + ENV,
        fails="missing '/' in ${}",
    ),
    Case(
        "patterns are replaced once or everywhere",
        "FROM BASE\nENV str=foobarbaz q=a?b*c/d\nENV a=${str/ba/fo} b=${str//ba/fo} c=${str//a*/X} d=${q/\\?/Q} e=${q//\\*/S} f=${q/\\//-} g=${str/b?r/}\n"
        + ENV,
        gives={
            "o": "a=fooforbaz\nb=fooforfoz\nc=foobX\nd=aQb*c/d\ne=a?bSc/d\nf=a?b*c-d\ng=foobaz\nq=a?b*c/d\nstr=foobarbaz\n"
        },
    ),
    Case(
        "quotes and escapes protect",
        'FROM BASE\nENV foo=/bar\nENV a=\\$foo b=\\${foo} c=\'$foo\' d="$foo \\"x\\"" e=a\\ b f=\'a b\'\\ c g="it\'s"\n'
        + ENV,
        gives={"o": 'a=$foo\nb=${foo}\nc=$foo\nd=/bar "x"\ne=a b\nf=a b c\nfoo=/bar\ng=it\'s\n'},
    ),
    Case(
        "an instruction uses the values from before it",
        "FROM BASE\nENV abc=hello\nENV abc=bye def=$abc\nENV ghi=$abc\n" + ENV,
        gives={"o": "abc=bye\ndef=hello\nghi=bye\n"},
    ),
    Case(
        "configuration instructions substitute variables",
        "FROM BASE\nENV n=8 s=SIGQUIT u=alice v=/v k=key\nEXPOSE $n${n}0 ${n}1/udp\nLABEL $k=$n ${k}2='$n'\nSTOPSIGNAL $s\nUSER $u\nVOLUME $v /x$v\nWORKDIR ${v}/w\n",
        config={
            "Config.ExposedPorts": {"880/tcp": {}, "81/udp": {}},
            "Config.Labels": {"key": "8", "key2": "$n"},
            "Config.StopSignal": "SIGQUIT",
            "Config.User": "alice",
            "Config.Volumes": {"/v": {}, "/x/v": {}},
            "Config.WorkingDir": "/v/w",
        },
    ),
    Case(
        "the shell substitutes variables of commands",
        'FROM BASE\nENV a=b\nRUN ["/bin/sh", "-c", "echo $a > /o"]\nRUN ["/bin/echo", "$a"]\nCMD echo $a\nENTRYPOINT ["x", "$a"]\n',
        gives={"o": "b\n"},
        shows=(" $a\n",),
        config={"Config.Cmd": ["/bin/sh", "-c", "echo $a"], "Config.Entrypoint": ["x", "$a"]},
    ),
)

SCOPES = (
    Case(
        "a global argument is known in a stage once declared there",
        'ARG TAG=1\nARG NAME=busybox\nFROM ${NAME}:$TAG AS a\nRUN echo "[$TAG]" > /o\nARG TAG\nARG NAME=own\nRUN echo "[$TAG] [$NAME]" >> /o\n',
        gives={"o": "[]\n[1] [own]\n"},
    ),
    Case(
        "a given value is used wherever the argument is declared",
        "ARG A=1\nARG B=$A-b\nFROM BASE\nARG A\nARG B\nARG C=c D=$C\nRUN echo $A $B $C $D > /o\n",
        options=("--build-arg", "A=2", "--build-arg", "C=given"),
        gives={"o": "2 2-b given given\n"},
    ),
    Case(
        "a stage inherits arguments and variables from its base stage only",
        'FROM BASE AS base\nARG A=1 E=arg\nENV V=v E=env\nFROM base AS mid\nARG B=2\nFROM mid\nRUN echo "$A $B $V $E" > /o\n'
        'FROM BASE AS other\nRUN echo "[$A$B$V]" > /o\nFROM mid\nCOPY --from=other /o /other\nRUN echo "$A $B $V $E" > /o\n',
        gives={"o": "1 2 v env\n", "other": "[]\n"},
    ),
    Case(
        "the later of ARG and ENV wins within a stage",
        "FROM BASE\nARG A=arg\nENV A=env\nRUN echo $A > /o\nARG A=again\nENV B=$A\nRUN echo $A $B >> /o\n",
        gives={"o": "env\nagain again\n"},
        config={
            "Config.Env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "A=env",
                "B=again",
            ]
        },
    ),
    Case(
        "ENV can persist an argument with a default",
        "FROM BASE\nARG VER\nENV VER=${VER:-v1.0.0}\nRUN echo $VER > /o\n",
        gives={"o": "v1.0.0\n"},
    ),
    Case(
        "an argument has no value before its declaration",
        "FROM BASE\nRUN mkdir -m 777 /t\nUSER ${username:-root}\nRUN id -un > /o\nARG username\nUSER $username\nRUN id -un > /t/p\n",
        options=("--build-arg", "username=alice"),
        gives={"o": "root\n", "t/p": "alice\n"},
    ),
    Case(
        "the default of a given argument is not evaluated",
        "FROM BASE\nARG A=${NO:?unset}\nRUN echo $A > /o\n",
        options=("--build-arg", "A=x"),
        gives={"o": "x\n"},
    ),
    Case(
        "platform arguments are global and declared per stage",
        'ARG P=$TARGETOS-$BUILDARCH\nFROM BASE AS last\nRUN echo "[$TARGETARCH]" > /o\nARG TARGETPLATFORM\nARG TARGETOS\nARG TARGETARCH\nARG TARGETVARIANT\n'
        'ARG BUILDPLATFORM\nARG P\nARG TARGETSTAGE\nRUN echo "$TARGETPLATFORM $TARGETOS $TARGETARCH[$TARGETVARIANT] $BUILDPLATFORM $P $TARGETSTAGE" >> /o\n',
        gives={"o": "[]\nlinux/amd64 linux amd64[] linux/amd64 linux-amd64 last\n"},
    ),
    Case(
        "proxies reach commands in both spellings and no instruction",
        "FROM BASE\nENV p=[$HTTP_PROXY$http_proxy]\n" + ENV,
        options=("--build-arg", "HTTP_PROXY=http://p", "--build-arg", "no_proxy=n"),
        gives={"o": "HTTP_PROXY=http://p\nNO_PROXY=n\nhttp_proxy=http://p\nno_proxy=n\np=[]\n"},
    ),
    Case(
        "a declared proxy is an argument",
        "FROM BASE\nARG http_proxy\nENV p=$http_proxy\n",
        options=("--build-arg", "http_proxy=http://p"),
        config={
            "Config.Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "p=http://p"]
        },
    ),
)

STAGES = (
    Case(
        "stages that the target does not need are skipped",
        "FROM BASE AS broken\nRUN false\nFROM BASE AS a\nRUN echo a > /o\nFROM a AS Target\nRUN echo t >> /o\nFROM broken\nRUN false\n",
        options=("--target", "target"),
        gives={"o": "a\nt\n"},
    ),
    Case(
        "an unknown target is refused",
        "FROM BASE AS a\n",
        options=("--target", "b"),
        fails='target stage "b" could not be found',
    ),
    Case(
        "the later of two stages with one name is used",
        "FROM BASE AS a\nRUN echo 1 > /o\nFROM a AS a\nRUN echo 2 >> /o\nFROM a\nRUN echo 3 >> /o\n",
        gives={"o": "1\n2\n3\n"},
    ),
    Case(
        "a stage name starts with a letter",
        "FROM BASE AS 1a\n",
        fails="name can't start with a number or contain symbols",
    ),
    Case(
        "FROM takes one or three arguments",
        "FROM BASE AS a b\n",
        fails="FROM requires either one or three arguments",
    ),
    Case("FROM with a number means an image", "FROM BASE\nFROM 0\nRUN true\n", fails="0"),
    Case(
        "COPY --from takes a stage by number",
        "FROM BASE\nRUN echo 0 > /o\nFROM BASE\nRUN echo 1 > /o\nFROM BASE\nCOPY --from=1 /o /one\nCOPY --from=0 /o /zero\n",
        gives={"zero": "0\n", "one": "1\n"},
    ),
    Case(
        "a later stage cannot be copied from",
        "FROM BASE AS a\nCOPY --from=b /x /x\nFROM BASE AS b\nFROM a\n",
        fails="needs to be defined before",
    ),
    Case("an empty base name is refused", "FROM $NOSUCH\n", fails="base name ($NOSUCH) should not be blank"),
    Case(
        "an empty platform is refused",
        "FROM --platform=$NOSUCH BASE\nRUN true\n",
        fails="empty platform value from expression $NOSUCH",
    ),
    Case(
        "a platform may be a variable",
        "FROM --platform=$BUILDPLATFORM BASE\nRUN echo a > /o\n",
        gives={"o": "a\n"},
    ),
    Case(
        "scratch is an empty base",
        "FROM scratch\nCOPY a /a\nLABEL x=y\n",
        files={"a": "a"},
        gives={"a": "a"},
        config={"Config.Labels": {"x": "y"}},
    ),
)
