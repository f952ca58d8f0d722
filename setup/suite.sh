# Sourced by the other scripts: packages of another suite of the distribution, without touching the machine's apt.

# archive_of COMPONENT: the archive this machine already uses: its main suite, no updates or security suite.
archive_of() {
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk -v component="$1" '$3 == component && $2 !~ /[-\/]/ { print $1; exit }'
}

# use_suite DIRECTORY ARCHIVE SUITE COMPONENT KEYRING: apt's options for that suite alone, whose state lives in the
# directory; in $suite_options, words without blanks that are meant to be split.  Its index is fetched.
use_suite() {
    mkdir -p "$1"/{lists/partial,cache/archives/partial}
    echo "deb [signed-by=$5] $2 $3 $4" >"$1/sources.list"
    # _apt may not read a private directory of root's; the signatures are checked all the same.
    suite_options="-o APT::Sandbox::User=root
        -o Dir::Etc::SourceList=$1/sources.list -o Dir::Etc::SourceParts=/dev/null
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null
        -o Dir::State::Lists=$1/lists -o Dir::State::Status=/dev/null
        -o Dir::Cache=$1/cache -o Acquire::Languages=none -o APT::Update::Error-Mode=any"
    # shellcheck disable=SC2086
    apt-get $suite_options -q update
}
